"""FP8 runs that stop and go on: to the bit in the same layout, their state to the bit in another, to and from bf16."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_syne.checkpoint.fp8_state import check_version, holds_fp8_state, wanted_fp8_state
from megatron_syne.errors import DataError

from .conftest import Bench
from .test_layouts import PP2, SP, TP2

RECIPES = ("delayed", "tensorwise", "blockwise")
LENGTH = 64
BF16 = ["precision.params_dtype=bf16", f"precision.fp8_amax_history_len={LENGTH}"]
RECOMPUTE = ["memory.recompute_granularity=full", "memory.recompute_method=uniform"]
HALF, WHOLE = "train.exit_interval=4", "train.exit_interval=8"
LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
# Blockwise scaling under sequence parallelism wants wider layers than these (preflight).
SAME = {
    1: {recipe: [] for recipe in RECIPES},
    2: {"delayed_sp": [TP2, SP], "tensorwise_sp": [TP2, SP], "blockwise_tp": [TP2]},
}
OTHERS: dict[str, list[str]] = {"tp2_sp": [TP2, SP], "pp2": [PP2], "dp2": []}


def fp8(recipe: str) -> list[str]:
    return [*BF16, f"precision.fp8={recipe}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fp8_state")


@pytest.fixture(scope="module")
def results(bench: Bench, folder: Path) -> dict[str, dict]:
    """Every run of this file: whole ones, their two halves, the other layouts, the changes of precision."""
    found: dict[str, dict] = {}
    for world, runs in SAME.items():
        jobs: dict[str, list[str]] = {}
        for name, layout in runs.items():
            overrides = [*fp8(name.partition("_")[0]), *layout]
            run_dir = f"run_dir={folder / name}"
            jobs[f"{name}_whole"] = [*overrides, WHOLE]
            jobs[f"{name}_first"] = [*overrides, HALF, run_dir]
            jobs[f"{name}_second"] = [*overrides, WHOLE, run_dir]
        if world == 1:
            jobs["recomputed"] = [*fp8("delayed"), *RECOMPUTE, WHOLE]
            jobs["bf16_whole"] = [*BF16, WHOLE]
            run_dir = f"run_dir={folder / 'switch'}"
            jobs["switch_1"] = [*BF16, HALF, run_dir]
            jobs["switch_2"] = [*fp8("delayed"), "train.exit_interval=6", run_dir]
            jobs["switch_3"] = [*BF16, WHOLE, run_dir]
        for name, layout in OTHERS.items() if world == 2 else ():
            run_dir = folder / f"to_{name}"
            shutil.copytree(folder / "delayed", run_dir)
            shutil.rmtree(run_dir / "checkpoints" / "iter_0000008")
            jobs[f"to_{name}"] = [*fp8("delayed"), *layout, "train.exit_interval=5", f"run_dir={run_dir}"]
        found |= bench.train(world, jobs)
    return found


def losses(result: dict) -> list[str]:
    return [row["loss"] for row in result["steps"]]


def numbers(result: dict) -> list[float]:
    return [float.fromhex(x) for x in losses(result)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for runs in SAME.values() for name in runs])
def test_the_same_layout_goes_on_to_the_bit(results: dict[str, dict], name: str) -> None:
    whole, first, second = (results[f"{name}_{part}"] for part in ("whole", "first", "second"))
    assert second["first_step"] == 4 and len(losses(first)) == len(losses(second)) == 4
    assert losses(first) + losses(second) == losses(whole)
    norms = [row["grad_norm"] for part in (first, second) for row in part["steps"]]
    assert norms == [row["grad_norm"] for row in whole["steps"]]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_is_not_bf16_but_close(results: dict[str, dict], recipe: str) -> None:
    bf16, ours = numbers(results["bf16_whole"]), numbers(results[f"{recipe}_whole"])
    assert ours != bf16
    assert max(abs(a / b - 1) for a, b in zip(ours, bf16, strict=True)) < 0.01


@pytest.mark.slow
def test_recomputation_changes_nothing(results: dict[str, dict]) -> None:
    assert losses(results["recomputed"]) == losses(results["delayed_whole"])


def checkpoint(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"iter_{step:07d}"


def stored_state(folder: Path) -> dict[str, Any]:
    """All FP8 tensors of a checkpoint, by torch's own reader."""
    import torch
    import torch.distributed.checkpoint as dcp

    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state: dict[str, Any] = {key: torch.empty(stored[key].size) for key in stored if key.startswith("fp8.")}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_layouts_take_the_state_over_to_the_bit(
    results: dict[str, dict], folder: Path, name: str
) -> None:
    """A step later each history has moved on by its micro-batches: the older rows are those of the checkpoint."""
    result = results[f"to_{name}"]
    expected = numbers(results["delayed_whole"])[4]
    assert result["first_step"] == 4 and abs(numbers(result)[0] - expected) < 3e-3
    rounds = 2 if name == "dp2" else 4  # micro-batches of a step: 8 samples, 2 at a time
    before = stored_state(checkpoint(folder / "delayed", 4))
    after = stored_state(checkpoint(folder / f"to_{name}", 5))
    assert set(before) == set(after)
    for layer in range(4):
        for linear in LINEARS:
            for tensor in ("input", "weight", "grad"):
                key = f"fp8.v1.decoder.layers.{layer}.{linear}.{tensor}"
                old = before[f"{key}.amax_history"]
                new = after[f"{key}.amax_history"]
                assert old.shape == new.shape == (LENGTH,) and old[-1 if tensor != "weight" else -4] > 0
                assert (new[1 : LENGTH - rounds] == old[1 + rounds :]).all(), key
                assert new[0] == 0
                top = 57344.0 if tensor == "grad" else 448.0
                scale = after[f"{key}.scale"]
                # float / tensor would be a reciprocal and a product, rounded twice
                assert scale.shape == () and scale == new.new_tensor(top) / new.max(), key


@pytest.mark.slow
def test_a_checkpoint_holds_plain_tensors_and_nothing_pickled_of_a_module(
    results: dict[str, dict], folder: Path
) -> None:
    import torch.distributed.checkpoint as dcp

    for name in ("delayed", "tensorwise"):
        keys = dcp.FileSystemReader(checkpoint(folder / name, 8)).read_metadata().state_dict_metadata
        assert not [key for key in keys if "_extra_state" in key]
        states = [key for key in keys if key.startswith("fp8.")]
        assert len(states) == (4 * 4 * 3 * 2 if name == "delayed" else 0)


@pytest.mark.slow
def test_from_bf16_to_fp8_and_back(results: dict[str, dict]) -> None:
    bf16 = results["bf16_whole"]
    parts = [results[f"switch_{n}"] for n in (1, 2, 3)]
    assert [part["first_step"] for part in parts] == [0, 4, 6]
    assert losses(parts[0]) == losses(bf16)[:4]
    assert losses(parts[1]) != losses(bf16)[4:6], "FP8 must show"
    found = [x for part in parts for x in numbers(part)]
    assert max(abs(a / b - 1) for a, b in zip(found, numbers(bf16), strict=True)) < 0.01


def test_a_version_that_is_not_known_is_refused() -> None:
    check_version({"model.weight": None, "fp8.v1.a.input.scale": None})
    with pytest.raises(DataError, match=r"unknown version: fp8\.v2\.a\.scale, expected fp8\.v1"):
        check_version({"fp8.v2.a.scale": None})
    with pytest.raises(DataError):
        holds_fp8_state({"fp8.a.scale": None})


def test_a_checkpoint_without_fp8_state_is_asked_for_none() -> None:
    class Layers:
        def state(self) -> dict[str, Any]:
            return {"a.input.scale": SimpleNamespace()}

    stored = {"decoder.layers.self_attention.linear_qkv.weight": None}
    assert wanted_fp8_state(Layers(), stored) == {} and not holds_fp8_state(stored)  # type: ignore[arg-type]
