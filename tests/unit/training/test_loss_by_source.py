"""The loss of each source adds up to the whole as it was computed in fp32, tokens without weight left out."""

from __future__ import annotations

import pytest
import torch

from megatron_syne.training.forward import by_source
from megatron_syne.training.trainer import loss_by_source


def example(masked: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(6, 500, generator=generator) * 12
    mask = (torch.rand(6, 500, generator=generator) > 0.3).float() if masked else torch.ones(6, 500)
    return losses, mask, torch.tensor([2, 0, 2, 2, 0, 4])


@pytest.mark.parametrize("masked", [True, False])
def test_sums_and_tokens(masked: bool) -> None:
    losses, mask, ids = example(masked)
    whole = (losses * mask).sum().double()  # in fp32, as the loss is
    found = by_source(losses * mask, mask, ids, 5, whole)
    sums, tokens = found[:5], found[5:]
    assert found.dtype == torch.float64
    assert float(sums.sum()) == pytest.approx(float(whole), rel=1e-14)
    for source in range(5):
        rows = ids == source
        exact = (losses.double() * mask.double())[rows].sum()
        assert float(sums[source]) == pytest.approx(float(exact), rel=1e-6)
        assert float(tokens[source]) == float(mask[rows].sum())
    assert sums[1] == sums[3] == tokens[1] == tokens[3] == 0


def test_one_source_has_the_whole() -> None:
    losses, mask, ids = example(True)
    whole = (losses * mask).sum().double()
    found = by_source(losses * mask, mask, torch.zeros_like(ids), 1, whole)
    assert float(found[0]) == pytest.approx(float(whole), rel=1e-14) and float(found[1]) == float(mask.sum())


def test_nothing_that_weighs_is_no_number_of_nothing() -> None:
    losses, mask, ids = example(False)
    found = by_source(0 * losses, 0 * mask, ids, 5, torch.zeros((), dtype=torch.float64))
    assert torch.equal(found, torch.zeros(10, dtype=torch.float64))


def test_metrics_leave_out_what_has_no_token() -> None:
    assert loss_by_source(["en", "zh", "code"], [6.0, 0.0, 9.0, 3.0, 0.0, 2.0]) == {
        "loss/en": 2.0,
        "loss/code": 4.5,
    }
    assert loss_by_source([], []) == {}
