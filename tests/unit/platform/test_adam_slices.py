"""Adam's step in slices: the same bits, one step counted, never more copies than a slice has."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_syne.platform.adam_slices import in_slices, slices
from megatron_syne.platform.cpu_adam import GroupStepAdamW

SIZES = (40, 7, 64, 1, 1, 90, 3)
OPTIONS: dict[str, Any] = {
    "lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95), "master_weights": True, "use_decoupled_grad": True,
    "master_weight_dtype": torch.float16, "exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.bfloat16,
}  # fmt: skip


def groups() -> list[dict[str, Any]]:
    """Two groups with parameters and one without, the second at another learning rate."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(size).bfloat16()) for size in SIZES]
    return [{"params": params[:4]}, {"params": params[4:], "lr": 3e-3}, {"params": []}]


def test_every_parameter_is_in_one_slice_in_order() -> None:
    params = [torch.empty(size) for size in SIZES]
    found = list(slices(params, 70))
    assert [[p.numel() for p in part] for part in found] == [[40, 7], [64, 1, 1], [90], [3]]
    assert list(slices([], 70)) == []


@pytest.mark.parametrize("limit", [1, 70, 10**9])
def test_the_update_is_that_of_whole_groups(limit: int) -> None:
    """Weights and states to the bit after five steps; the largest sum of a call is a slice's."""
    calls: list[int] = []

    class Counting(GroupStepAdamW):
        def step(self, closure: Any = None) -> None:
            calls.append(sum(p.numel() for group in self.param_groups for p in group["params"]))
            super().step(closure)

    whole, cut = GroupStepAdamW(groups(), **OPTIONS), in_slices(Counting)(groups(), **OPTIONS)
    cut.slice_numbers = limit
    for step in range(5):
        for optimizer in (whole, cut):
            torch.manual_seed(100 + step)
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.decoupled_grad = torch.randn(p.shape)
            optimizer.step()
    assert [group["step"] for group in cut.param_groups] == [5, 5, 5]
    pairs = zip(whole.param_groups, cut.param_groups, strict=True)
    for a, b in ((a, b) for one, other in pairs for a, b in zip(one["params"], other["params"], strict=True)):
        assert torch.equal(a, b)
        assert all(torch.equal(whole.state[a][name], cut.state[b][name]) for name in whole.state[a])
    assert max(calls) <= max(limit, max(SIZES)) and isinstance(cut, GroupStepAdamW)


def test_groups_are_whole_again_after_an_error() -> None:
    optimizer = in_slices(GroupStepAdamW)(groups(), **OPTIONS)
    optimizer.slice_numbers = 1
    before = optimizer.param_groups
    before[0]["params"][1].decoupled_grad = torch.randn(3)  # of another shape
    before[0]["params"][0].decoupled_grad = torch.randn(40)
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert optimizer.param_groups is before and [len(group["params"]) for group in before] == [4, 3, 0]
