"""Every layout trains to the same losses as one process, from one seed checkpoint."""

from __future__ import annotations

import pytest

from .conftest import Bench

SP = "parallel.sequence_parallel=true"
TP2, PP2 = "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"
PP4, VPP2 = "parallel.pipeline_model_parallel_size=4", "parallel.virtual_pipeline_model_parallel_size=2"

OVERLAP = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]

LAYOUTS = {
    1: {"single": []},
    2: {"tp2_sp": [TP2, SP], "pp2": [PP2], "dp2": [], "pp2_vpp2": [PP2, VPP2], "dp2_overlap": OVERLAP},
    4: {
        "pp4": [PP4],
        "tp2_pp2_sp": [TP2, PP2, SP],
        "tp2_dp2_sp": [TP2, SP],
        "pp2_dp2": [PP2],
        "tp2_pp2_vpp2_sp": [TP2, PP2, VPP2, SP],
    },
}
NAMES = [name for layouts in LAYOUTS.values() for name in layouts if name != "single"]
TOLERANCE = {"fp32": 5e-6, "bf16": 3e-3}
STEPS = 20


@pytest.fixture(scope="module")
def losses(bench: Bench) -> dict[str, dict[str, list[float]]]:
    """``losses[dtype][layout]``: the loss of each step."""
    found: dict[str, dict[str, list[float]]] = {"fp32": {}, "bf16": {}}
    for world_size, layouts in LAYOUTS.items():
        jobs = {
            f"{dtype}.{name}": [*overrides, f"precision.params_dtype={dtype}"]
            for dtype in found
            for name, overrides in layouts.items()
        }
        for key, result in bench.train(world_size, jobs).items():
            dtype, name = key.split(".")
            found[dtype][name] = [float.fromhex(row["loss"]) for row in result["steps"]]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_layout_trains_to_the_losses_of_one_process(
    losses: dict[str, dict[str, list[float]]], dtype: str, name: str
) -> None:
    single, layout = losses[dtype]["single"], losses[dtype][name]
    assert len(single) == len(layout) == STEPS
    largest = max(abs(a - b) for a, b in zip(single, layout, strict=True))
    print(f"{dtype} {name}: largest loss difference {largest:.2e}")
    assert largest <= TOLERANCE[dtype]


@pytest.mark.slow
def test_the_run_learns_so_that_a_wrong_gradient_would_show(
    losses: dict[str, dict[str, list[float]]],
) -> None:
    single = losses["fp32"]["single"]
    assert single[-1] < single[0] - 0.3
