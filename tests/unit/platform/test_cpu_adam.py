"""The CPU platform's AdamW: torch's update, Transformer Engine's formats, states that come back to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_syne.platform.cpu_adam import MASTER, MOMENTS, GroupStepAdamW

FP8 = torch.uint8
ERROR = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, FP8: 2.0**-4}
"""Largest rounding error of a value, relative to it: half of the last bit."""


def weights(dtype: torch.dtype = torch.float32, count: int = 257) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(size).to(dtype)) for size in (count, 3)]


def set_gradients(params: list[torch.nn.Parameter], step: int, name: str = "grad") -> None:
    torch.manual_seed(100 + step)
    for p in params:
        gradient = torch.randn(p.shape, dtype=torch.float32)
        setattr(p, name, gradient if name == "decoupled_grad" else gradient.to(p.dtype))


def aware(params: Any, **options: Any) -> GroupStepAdamW:
    return GroupStepAdamW(
        params,
        lr=1e-2,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        master_weights=True,
        use_decoupled_grad=True,
        **options,
    )


def test_the_update_is_torchs() -> None:
    ours, theirs = weights(), weights()
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    optimizers = GroupStepAdamW(ours, **options), torch.optim.AdamW(theirs, foreach=False, **options)
    for step in range(5):
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            set_gradients(params, step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert optimizers[0].param_groups[0]["step"] == 5


def test_master_weights_of_bf16_follow_the_fp32_run() -> None:
    """bf16 weights are the rounded master weights, and those are of a run in fp32 from the same start."""
    bf16 = weights(torch.bfloat16)
    fp32 = [torch.nn.Parameter(p.detach().float()) for p in bf16]
    one, other = aware(bf16), GroupStepAdamW(fp32, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95))
    for step in range(5):
        set_gradients(bf16, step, "decoupled_grad")
        set_gradients(fp32, step)
        one.step()
        other.step()
    for p, q in zip(bf16, fp32, strict=True):
        assert torch.equal(one.get_unscaled_state(p, MASTER), q)
        assert torch.equal(p, q.bfloat16())


@pytest.mark.parametrize("name", [*MOMENTS, MASTER])
@pytest.mark.parametrize("dtype", ERROR)
def test_a_state_is_rounded_by_its_format(name: str, dtype: torch.dtype) -> None:
    if name == MASTER and dtype not in (torch.float32, torch.float16):
        return
    (param,) = weights(torch.bfloat16)[:1]
    optimizer = aware([param], **{"master_weight_dtype" if name == MASTER else f"{name}_dtype": dtype})
    optimizer.initialize_state(param)
    value = torch.rand(param.shape) + 0.5  # far from what FP8 rounds to 0
    optimizer.set_scaled_state(param, name, value.clone())
    found = optimizer.get_unscaled_state(param, name)
    stored = optimizer.state[param][name]
    assert found.dtype is torch.float32
    assert stored.element_size() == {torch.float32: 4, FP8: 1}.get(dtype, 2)
    assert (found - value).abs().max() <= ERROR[dtype] * value.max()
    if dtype is FP8:
        assert stored.dtype is torch.float8_e4m3fn
        assert stored.float().abs().max() == 448
    if dtype is torch.float16:
        assert stored.abs().max() == 32752  # half of the format's range


SCALED = [torch.float16, FP8]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    size=st.sampled_from([1, 2, 100]),
    exponent=st.integers(-80, 60),
    spread=st.integers(0, 12),
)
@pytest.mark.parametrize("dtype", SCALED)
def test_unscaled_values_are_stored_as_themselves(
    dtype: torch.dtype, seed: int, size: int, exponent: int, spread: int
) -> None:
    """What a checkpoint holds comes back to the bit."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(size, generator=generator) * 2.0**exponent
    value = value * torch.exp(torch.randn(size, generator=generator) * spread)
    param = torch.nn.Parameter(torch.zeros(size, dtype=torch.bfloat16))
    optimizer = aware([param], exp_avg_dtype=dtype)
    optimizer.initialize_state(param)
    optimizer.set_scaled_state(param, "exp_avg", value)
    once = optimizer.get_unscaled_state(param, "exp_avg")
    assert once.isfinite().all()
    optimizer.set_scaled_state(param, "exp_avg", once.clone())
    assert torch.equal(optimizer.get_unscaled_state(param, "exp_avg"), once)


def test_a_tensor_of_zeros_stays_zero() -> None:
    (param,) = weights(torch.bfloat16)[:1]
    optimizer = aware([param], exp_avg_dtype=FP8, exp_avg_sq_dtype=torch.float16)
    optimizer.initialize_state(param)
    for name in MOMENTS:
        assert optimizer.get_unscaled_state(param, name).eq(0).all()


@pytest.mark.parametrize("first", ERROR)
@pytest.mark.parametrize("second", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("master", [torch.float32, torch.float16])
def test_a_loaded_optimizer_goes_on_to_the_bit(
    first: torch.dtype, second: torch.dtype, master: torch.dtype
) -> None:
    formats = {"exp_avg_dtype": first, "exp_avg_sq_dtype": second, "master_weight_dtype": master}
    left_alone, saved = weights(torch.bfloat16), weights(torch.bfloat16)
    one, two = aware(left_alone, **formats), aware(saved, **formats)
    for step in range(6):
        if step == 3:
            state = two.state_dict()
            assert {t.dtype for s in state["state"].values() for t in s.values()} == {torch.float32}
            saved = [torch.nn.Parameter(p.detach().clone()) for p in saved]
            two = aware(saved, **formats)
            two.load_state_dict(state)
        for params, optimizer in ((left_alone, one), (saved, two)):
            set_gradients(params, step, "decoupled_grad")
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(left_alone, saved, strict=True))
    states = one.state_dict()["state"], two.state_dict()["state"]
    assert states[0].keys() == states[1].keys() == {0, 1}
    assert all(torch.equal(states[0][i][n], states[1][i][n]) for i in (0, 1) for n in (*MOMENTS, MASTER))


def test_a_state_is_loaded_into_other_formats() -> None:
    params = weights(torch.bfloat16)
    fp32 = aware(params)
    set_gradients(params, 0, "decoupled_grad")
    fp32.step()
    bf16 = aware(params, exp_avg_dtype=torch.bfloat16, exp_avg_sq_dtype=torch.bfloat16)
    bf16.load_state_dict(fp32.state_dict())
    for p in params:
        for name in MOMENTS:
            assert bf16.state[p][name].dtype is torch.bfloat16
            assert torch.equal(bf16.state[p][name], fp32.state[p][name].bfloat16())
    assert bf16.param_groups[0]["step"] == 1


def test_second_moments_in_fp8_lose_the_small_ones() -> None:
    """Why they are refused: what is below 2**-19 of the largest is stored as 0."""
    param = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    optimizer = aware([param], exp_avg_sq_dtype=FP8)
    optimizer.initialize_state(param)
    optimizer.set_scaled_state(param, "exp_avg_sq", torch.tensor([1.0, 2.0**-20]))
    assert optimizer.get_unscaled_state(param, "exp_avg_sq").tolist() == [pytest.approx(1.0), 0.0]


@pytest.mark.parametrize("option", [{"store_param_remainders": True}, {"adam_w_mode": False}])
def test_what_is_not_there_is_refused(option: dict[str, bool]) -> None:
    with pytest.raises(NotImplementedError):
        GroupStepAdamW(weights(), **option)
