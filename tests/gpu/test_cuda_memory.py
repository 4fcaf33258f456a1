"""What saves memory changes no loss on the GPU, or within what is stated. Not run on a GPU yet.

Tolerances: fp32 5e-6, as between layouts (products in fp32, ten steps); bf16 2e-3 of the loss at each of 20 steps (the
losses of single batches lie between 2 and 11; the CPU's chunked loss is 3.5e-4 off); the formats of the optimizer 1e-2.
"""

from __future__ import annotations

import pytest
from distributed.test_fp8_training import LIMIT
from distributed.test_memory import TOLERANCE

from .lab import Lab
from .plan import RECIPES
from .test_cuda_training import gaps_of_means

pytestmark = pytest.mark.gpu

FP32, BF16 = 5e-6, 2e-3


def gap(lab: Lab, group: str, name: str, beside: str, relative: bool = False) -> float:
    """Largest difference of the losses of two trainings, of which the figures are kept."""
    found = lab.losses(group, name)
    expected = lab.losses(group, beside)[: len(found)]
    pairs = list(zip(found, expected, strict=True))
    largest, of_loss = max(abs(a - b) for a, b in pairs), max(abs(a / b - 1) for a, b in pairs)
    peaks = {each: lab.result(group, each).get("peak_memory_bytes") for each in (name, beside)}
    same = lab.hexes(group, name) == lab.hexes(group, beside)[: len(found)]
    lab.figure(
        "beside the plain run", run=name, steps=len(found), largest_gap=largest, same_bits=same, peaks=peaks
    )
    return of_loss if relative else largest


@pytest.mark.parametrize("name", ["full32", "selective32"])
def test_recomputed_layers_give_the_losses_of_kept_ones(lab: Lab, name: str) -> None:
    """Deterministic kernels on the same values: to the bit."""
    assert gap(lab, "exact", name, "plain32") == 0.0
    assert lab.hexes("exact", name) == lab.hexes("exact", "plain32")


@pytest.mark.parametrize("name", ["chunked32", "unfused32", "offloaded32"])
def test_fp32_agrees(lab: Lab, name: str) -> None:
    """The loss in parts, unfused accumulation of the weights' gradients, activations in host memory."""
    assert gap(lab, "exact", name, "plain32") <= FP32


def test_accumulation_is_fused_where_it_can_be(lab: Lab) -> None:
    """Else the comparison of fused and unfused above is of two runs that are alike."""
    fused, unfused = (lab.result("exact", name)["fused"] for name in ("plain32", "unfused32"))
    lab.figure("layers that add their weights' gradients in the product", fused=fused, unfused=unfused)
    assert fused == 4 * 4 and unfused == 0


@pytest.mark.parametrize("name", ["chunked", "full", "selective", "offloaded", "state_offloaded"])
def test_bf16_agrees(lab: Lab, name: str) -> None:
    assert gap(lab, "main", name, "bf16", relative=True) <= BF16


def test_bf16_moments_train_beside_fp32_ones(lab: Lab) -> None:
    assert 0 < gap(lab, "main", "moments", "bf16") <= TOLERANCE


@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_kept_in_fp8_train_beside_bf16_ones(lab: Lab, recipe: str) -> None:
    """``precision.fp8_param_gather``: the products see the same FP8 weights; the mean of 20 steps within 1 %."""
    found = lab.hexes("main", f"gathered.{recipe}")
    (relative,) = gaps_of_means(found, lab.hexes("main", recipe)[:20])
    lab.figure("fp8_param_gather", recipe=recipe, relative=relative)
    assert len(found) == 20 and relative < LIMIT
