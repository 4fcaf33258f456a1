"""Loss per source and the norms, held to the engine's own figures and to one process, in every layout."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from .conftest import Bench, make_seed

pytestmark = pytest.mark.slow

STEPS = 3
TP, PP, VPP, CP = (
    f"parallel.{name}_parallel_size=2"
    for name in ("tensor_model", "pipeline_model", "virtual_pipeline_model", "context")
)
SP = "parallel.sequence_parallel=true"
PLAIN_OPTIMIZER = "parallel.use_distributed_optimizer=false"
BF16 = "precision.params_dtype=bf16"
AWARE = ["optimizer.use_precision_aware_optimizer=true", "optimizer.exp_avg_dtype=bf16"]
FROZEN = "optimizer.freeze=['embedding.*', 'decoder.layers.0.*', 'decoder.layers.1.*']"
OVERLAP = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]

ONE = {"single": [], "bf16": [BF16], "frozen": [FROZEN], "plain optimizer": [PLAIN_OPTIMIZER]}
TWO = {
    "tp2": [TP],
    "tp2 sp": [TP, SP],
    "pp2": [PP],
    "pp2 vpp2": [PP, VPP],
    "dp2": [],
    "dp2 overlapped": OVERLAP,
    "dp2 plain optimizer": [PLAIN_OPTIMIZER],
    "cp2": [CP],
    "cp2 plain optimizer": [CP, PLAIN_OPTIMIZER],
    "bf16 dp2": [BF16],
    "bf16 dp2 precision-aware": [BF16, *AWARE],
    "frozen pp2": [PP, FROZEN],
    "frozen tp2": [TP, SP, FROZEN],
}
FOUR = {"tp2 dp2": [TP, SP], "pp2 cp2 plain optimizer": [PP, CP, PLAIN_OPTIMIZER]}
TIED = {"tied": (1, []), "tied pp2": (2, [PP]), "tied tp2": (2, [TP])}
WORLDS = {1: ONE, 2: TWO, 4: FOUR}
NAMES = [*(name for jobs in WORLDS.values() for name in jobs), *TIED]


@pytest.fixture(scope="module")
def steps(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """By layout, the records of the first steps; norms at each."""
    folder = tmp_path_factory.mktemp("figures")
    tied = make_seed(folder / "seed", tie_word_embeddings=True)
    worlds = {size: dict(jobs) for size, jobs in WORLDS.items()}
    for name, (size, overrides) in TIED.items():
        worlds[size][name] = [*overrides, f"model.hf_path={tied}", f"checkpoint.initialize_from={tied}"]
    option = {"saves": False, "abandon_at": STEPS}
    for size, jobs in worlds.items():
        listed = {
            name: [f"run_dir={folder / name.replace(' ', '_')}", "monitor.norms_interval=1", *overrides]
            for name, overrides in jobs.items()
        }
        bench.train(size, listed, dict.fromkeys(listed, option))
    return {name: records(folder / name.replace(" ", "_")) for name in NAMES}


def records(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return rows


def single_of(name: str) -> str:
    """What one process must agree with."""
    return next((kind for kind in ("bf16", "frozen", "tied") if name.startswith(kind)), "single")


def tokens_of(rows: list[dict[str, Any]], step: int, source: str) -> float:
    before = rows[step - 1][f"tokens/{source}"] if step else 0.0
    return rows[step][f"tokens/{source}"] - before


@pytest.mark.parametrize("name", NAMES)
def test_losses_of_the_sources_make_up_the_whole(steps: dict[str, Any], name: str) -> None:
    for n, row in enumerate(steps[name]):
        tokens = {source: tokens_of(steps[name], n, source) for source in ("en", "zh")}
        assert all(tokens.values())
        whole = sum(row[f"loss/{source}"] * count for source, count in tokens.items())
        assert whole / sum(tokens.values()) == pytest.approx(row["loss"], rel=1e-12)
        assert row["loss/en"] != row["loss/zh"]


@pytest.mark.parametrize("name", NAMES)
def test_losses_of_the_sources_are_those_of_one_process(steps: dict[str, Any], name: str) -> None:
    tolerance = 3e-3 if "bf16" in name else 5e-6
    for row, one in zip(steps[name], steps[single_of(name)], strict=True):
        for source in ("en", "zh"):
            assert row[f"loss/{source}"] == pytest.approx(one[f"loss/{source}"], abs=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_norms_of_the_layers_make_up_the_engines(steps: dict[str, Any], name: str) -> None:
    for row in steps[name]:
        groups = {key: value for key, value in row.items() if key.startswith("grad_norm/")}
        assert math.hypot(*groups.values()) == pytest.approx(row["grad_norm"], rel=1e-5)
        expected = {f"grad_norm/{group}" for group in trained(name)}
        assert set(groups) == expected


def trained(name: str) -> set[str]:
    """The groups with parameters that train."""
    groups = {*(f"layer_{n}" for n in range(4)), "embedding", "final_norm", "output_layer"}
    if "tied" in name:
        return groups - {"output_layer"}
    return groups - {"embedding", "layer_0", "layer_1"} if "frozen" in name else groups


@pytest.mark.parametrize("name", NAMES)
def test_norms_are_those_of_one_process(steps: dict[str, Any], name: str) -> None:
    """Each layer's, so that none is taken for another; the parameters' before anything was trained to 1e-6."""
    ours, one = steps[name], steps[single_of(name)]
    assert ours[0]["param_norm"] == pytest.approx(one[0]["param_norm"], rel=1e-6)
    for row, other in zip(ours, one, strict=True):
        for key in (key for key in other if key.startswith("grad_norm/")):
            assert row[key] == pytest.approx(other[key], rel=5e-2 if "bf16" in name else 1e-4), key
        assert row["param_norm"] == pytest.approx(other["param_norm"], rel=1e-5 if "bf16" in name else 1e-6)
