"""Training on the GPU follows training on the CPU, and FP8 follows bf16. Not run on a GPU yet.

The demo's base model on the demo's mixture, 512 tokens a step, learning rate 1e-3.
"""

from __future__ import annotations

import pytest
from distributed.test_fp8_training import LIMIT, WINDOW, means

from .lab import Lab
from .plan import RECIPES

pytestmark = pytest.mark.gpu

START = 2e-3
"""Of the first loss in bf16: the same weights and tokens, so only the rounding of one forward pass (the CPU's own
differs by 0.5e-3 from fp32)."""


def gaps_of_means(found: list[str], expected: list[str]) -> list[float]:
    """Relative difference of the mean losses of each window of 20 steps."""
    return [abs(a / b - 1) for a, b in zip(means(found), means(expected), strict=True)]


def test_fifty_steps_in_bf16_follow_the_cpus(lab: Lab) -> None:
    """Different kernels, the same arithmetic: every step within 1 % of the loss, every window of 20 within 0.3 %."""
    count = lab.steps(50)
    found, expected = lab.hexes("main", "bf16")[:count], lab.hexes("reference", "whole")
    pairs = [(float.fromhex(a), float.fromhex(b)) for a, b in zip(found, expected, strict=True)]
    each, windows = [abs(a / b - 1) for a, b in pairs], gaps_of_means(found, expected)
    lab.figure(
        "bf16 curve beside the CPU's", steps=count, first_gap=each[0], largest_step=max(each),
        largest_window=max(windows), last=pairs[-1][0], cpu_last=pairs[-1][1],
    )  # fmt: skip
    assert len(pairs) == count
    assert each[0] < START
    assert max(each) < 0.01 and max(windows) < 0.003


def test_bf16_learns(lab: Lab) -> None:
    """Else all others would follow it by standing still."""
    losses = lab.losses("main", "bf16")
    assert len(losses) == lab.steps(300)
    assert lab.rehearse or means(lab.hexes("main", "bf16"))[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_loss_in_fp8_is_within_one_percent_of_bf16(lab: Lab, recipe: str) -> None:
    """300 steps: every window of 20, and so the last. The guard looks along and finds nothing."""
    gaps = gaps_of_means(lab.hexes("main", recipe), lab.hexes("main", "bf16"))
    found = lab.result("main", recipe)["rows"]
    looks = [row for row in found if "fp8/loss_gap" in row]
    lab.figure(
        "FP8 beside bf16", recipe=recipe, steps=len(found), largest_window=max(gaps), last_window=gaps[-1],
        last=means(lab.hexes("main", recipe))[-1], largest_look=max(row["fp8/loss_gap"] for row in looks),
    )  # fmt: skip
    assert len(found) == lab.steps(300) and 0 < max(gaps) < LIMIT
    interval = lab.steps(300) // 6
    assert [row["step"] for row in looks] == [interval * n for n in range(1, 7)]
    assert all(0 < row["fp8/loss_gap"] < 0.05 and row["fp8/bf16_layers"] == 0 for row in looks)


@pytest.mark.parametrize("recipe", RECIPES)
def test_emulated_on_the_gpu_it_trains_alike(lab: Lab, recipe: str) -> None:
    """``precision.fp8_emulation``: the mean of 20 steps within 1 % of Transformer Engine's kernels'."""
    emulated, kernels = lab.hexes("main", f"emulated.{recipe}"), lab.hexes("main", recipe)[:WINDOW]
    (gap,) = gaps_of_means(emulated, kernels)
    lab.figure("emulated beside kernels, 20 steps", recipe=recipe, relative=gap)
    assert gap < LIMIT


def test_validation_follows_the_cpus(lab: Lab) -> None:
    """The loss of a validation source after 10 and 20 steps, within 0.5 %; evaluating changes no step."""
    found, expected = (lab.result(group, "validation") for group in ("main", "reference"))
    pairs = [(a["en"], b["en"]) for a, b in zip(found["validation"], expected["validation"], strict=True)]
    lab.figure("validation beside the CPU's", losses=pairs)
    assert len(pairs) == 2 and pairs[0] != pairs[1]
    assert all(abs(a / b - 1) < 0.005 for a, b in pairs)
