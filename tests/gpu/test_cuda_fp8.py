"""Transformer Engine's FP8 for real: agrees with its emulation, keeps its state, is guarded. Not run on a GPU yet."""

from __future__ import annotations

import pytest

from .lab import Lab
from .plan import FORMATS, RECIPES

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("fp8_format", FORMATS)
def test_the_emulation_agrees_with_the_kernels(lab: Lab, recipe: str, fp8_format: str) -> None:
    """One linear layer, four rounds with growing values: output and both gradients to 1 % of their norm (both
    round the same values to FP8; they differ in the order of the sums and in bf16 roundings, 0.3 %). A scale that is
    off by its last bit breaks ties of E5M2 the other way: 0.6 % of the gradients, 1.5 % of the norm."""
    rounds = lab.result("main", f"kernels.{recipe}.{fp8_format}")["rounds"]
    names = ("output", "grad_input", "grad_weight")
    print(f"{recipe} {fp8_format}: relative difference of emulation and kernels (of kernels and bf16)")
    for number, found in enumerate(rounds):
        print(
            f"  round {number}: "
            + ", ".join(f"{n} {found[n]:.1e} ({found[n + '_lossless']:.1e})" for n in names)
        )
    lab.figure(
        "emulation beside kernels", recipe=recipe, format=fp8_format,
        **{name: max(found[name] for found in rounds) for name in (*names, *(f"{n}_lossless" for n in names))},
    )  # fmt: skip
    assert len(rounds) == 4
    for found in rounds:
        assert all(found[name] < 0.01 for name in names), rounds
        assert all(found[f"{name}_lossless"] > 0.01 for name in names), "FP8 was not on"


def test_state_and_fallback_survive_a_resume(lab: Lab) -> None:
    """Stopped after step 5: the resumed run begins with the amax histories and scales that were saved."""
    import torch

    lab.result("main", "state.first"), lab.result("main", "state.second")
    end, start = (
        torch.load(lab.folder / "main" / f"state.{name}.pt", weights_only=True)
        for name in ("first.end", "second.start")
    )
    assert start["state"].keys() == end["state"].keys() and len(start["state"]) == 4 * 4 * 3 * 2
    for key, value in end["state"].items():
        assert torch.equal(start["state"][key], value), key
    histories = [value for key, value in end["state"].items() if key.endswith("amax_history")]
    lab.figure(
        "FP8 state", tensors=len(end["state"]), histories_in_use=sum(bool(each.any()) for each in histories)
    )
    assert all(bool(each.any()) for each in histories)
    assert (
        end["bf16_layers"] == start["bf16_layers"] == [0, 1, 2, 3]
    )  # no gap is that small: step 4 was in bf16


@pytest.mark.parametrize("recipe", RECIPES)
def test_looking_changes_nothing(lab: Lab, recipe: str) -> None:
    """Deterministic kernels, ten steps, with and without the guard: the same bits."""
    guarded = lab.result("exact", f"guarded.{recipe}")["rows"]
    assert [row["step"] for row in guarded if "fp8/loss_gap" in row] == [3, 6, 9]
    assert lab.hexes("exact", f"guarded.{recipe}") == lab.hexes("exact", f"whole.{recipe}")
