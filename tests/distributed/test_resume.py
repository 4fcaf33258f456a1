"""A run that stops and goes on is the run that never stopped: to the bit in the same layout, within the
rounding of another order of sums in another."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import REPOSITORY, Bench
from .stored import stored_tensor
from .test_layouts import OVERLAP, PP2, PP4, SP, TP2, VPP2

pytestmark = pytest.mark.slow

HALF = "train.exit_interval=10"
OTHERS = {
    1: {"single": []},
    2: {"dp2": [], "pp2_vpp2": [PP2, VPP2]},
    4: {"tp2_dp2_sp": [TP2, SP], "pp4": [PP4]},
}


@pytest.fixture(scope="module")
def stopped(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict]]:
    """A TP2 x PP2 run that saved at step 10 and stopped, went on, and one that was left alone."""
    run = tmp_path_factory.mktemp("resume") / "run"
    layout = [TP2, PP2, SP]
    results = bench.train(4, {"undisturbed": layout, "first": [*layout, HALF, f"run_dir={run}"]})
    kept = run.with_name("at_step_10")
    shutil.copytree(run, kept)
    results |= bench.train(4, {"second": [*layout, f"run_dir={run}"]})
    return kept, results


def losses(result: dict) -> list[str]:
    return [row["loss"] for row in result["steps"]]


def test_same_layout_goes_on_to_the_bit(stopped: tuple[Path, dict[str, dict]]) -> None:
    _, results = stopped
    assert results["second"]["first_step"] == 10
    assert len(losses(results["first"])) == 10
    assert losses(results["first"]) + losses(results["second"]) == losses(results["undisturbed"])
    norms = [row["grad_norm"] for half in ("first", "second") for row in results[half]["steps"]]
    assert norms == [row["grad_norm"] for row in results["undisturbed"]["steps"]]


def test_other_layouts_go_on_within_rounding(
    bench: Bench, stopped: tuple[Path, dict[str, dict]], tmp_path: Path
) -> None:
    kept, results = stopped
    expected = [float.fromhex(x) for x in losses(results["undisturbed"])[10:]]
    for world_size, layouts in OTHERS.items():
        jobs = {}
        for name, overrides in layouts.items():
            shutil.copytree(kept, tmp_path / name)
            jobs[name] = [*overrides, f"run_dir={tmp_path / name}"]
        for name, result in bench.train(world_size, jobs).items():
            assert result["first_step"] == 10
            found = [float.fromhex(x) for x in losses(result)]
            assert len(found) == 10
            largest = max(abs(a - b) for a, b in zip(found, expected, strict=True))
            print(f"TP2 PP2 -> {name}: largest loss difference {largest:.2e}")
            assert largest <= 5e-6, name


def test_bf16_goes_on_to_the_bit(bench: Bench, tmp_path: Path) -> None:
    """Also the fp32 master weights and moments come back whole."""
    run = f"run_dir={tmp_path / 'run'}"
    layout = [PP2, "precision.params_dtype=bf16"]
    results = bench.train(2, {"undisturbed": layout, "first": [*layout, HALF, run], "second": [*layout, run]})
    assert results["second"]["first_step"] == 10
    assert losses(results["first"]) + losses(results["second"]) == losses(results["undisturbed"])


def test_weights_gathered_late_are_saved_and_evaluated_as_they_are(bench: Bench, tmp_path: Path) -> None:
    """With the parameter gather overlapped, ranks hold old weights between steps: neither a checkpoint nor an
    evaluation may see them."""
    run, evaluate = f"run_dir={tmp_path / 'run'}", "train.eval_interval=5"
    results = bench.train(
        2,
        {
            "plain": [evaluate],
            "undisturbed": [*OVERLAP, evaluate],
            "first": [*OVERLAP, evaluate, "train.exit_interval=7", run],  # saved between two evaluations
            "second": [*OVERLAP, evaluate, run],
        },
    )
    assert losses(results["first"]) + losses(results["second"]) == losses(results["undisturbed"])
    assert len(results["plain"]["validation"]) == 4
    for plain, late in zip(results["plain"]["validation"], results["undisturbed"]["validation"], strict=True):
        assert late["en"] == pytest.approx(plain["en"], abs=5e-6)
    stored = tmp_path / "run" / "checkpoints" / "iter_0000007"
    for name in ("embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_layernorm.weight"):
        weight, master = stored_tensor(stored, name), stored_tensor(stored, f"optimizer.state.param.{name}")
        assert weight.equal(master), name


def test_the_three_ways_to_start_agree(
    bench: Bench, stopped: tuple[Path, dict[str, dict]], tmp_path: Path
) -> None:
    """Shards = the Hugging Face folder they came from; a checkpoint = the Hugging Face folder exported from it."""
    kept, results = stopped
    convert = [sys.executable, str(REPOSITORY / "tools/convert_checkpoint.py")]
    shards, exported = tmp_path / "shards", tmp_path / "exported"
    subprocess.run(
        [*convert, "import", "--from", str(bench.folder / "seed"), "--out", str(shards),
         "--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"], check=True,
    )  # fmt: skip
    checkpoint = next((kept / "checkpoints").glob("iter_*"))
    subprocess.run([*convert, "export", "--from", str(checkpoint), "--out", str(exported)], check=True)
    found = bench.train(
        4,
        {
            "shards": [TP2, PP2, SP, f"checkpoint.initialize_from={shards}", "train.exit_interval=5"],
            "checkpoint": [TP2, PP2, SP, f"checkpoint.initialize_from={checkpoint}", "train.exit_interval=5"],
            "exported": [TP2, PP2, SP, f"checkpoint.initialize_from={exported}", "train.exit_interval=5"],
            "resharded": [PP4, f"checkpoint.initialize_from={shards}", "train.exit_interval=5"],
        },
    )
    assert losses(found["shards"]) == losses(results["undisturbed"])[:5]
    assert losses(found["checkpoint"]) == losses(found["exported"])
    assert losses(found["checkpoint"]) != losses(found["shards"])
    gap = [
        float.fromhex(a) - float.fromhex(b)
        for a, b in zip(losses(found["resharded"]), losses(found["shards"]), strict=True)
    ]
    assert max(map(abs, gap)) <= 5e-6


def test_training_from_scratch(bench: Bench, tmp_path: Path) -> None:
    """Starts at the entropy of the vocabulary, the same each time, with layers that differ across stages."""
    import math

    scratch = [PP2, "checkpoint.initialize_from=null", "optimizer.lr=1.0e-30", "schedule.lr_warmup_init=0.0"]
    scratch.append("train.exit_interval=1")
    found = bench.train(2, {"one": [*scratch, f"run_dir={tmp_path / 'run'}"], "two": scratch})
    assert abs(float.fromhex(losses(found["one"])[0]) - math.log(2560)) < 0.2
    assert losses(found["one"]) == losses(found["two"])
    stored = tmp_path / "run" / "checkpoints" / "iter_0000001"
    weights = stored_tensor(stored, "decoder.layers.self_attention.linear_qkv.weight")  # [layers, ...]
    for layer in range(1, 4):
        assert (weights[0] - weights[layer]).abs().max() > 1e-3
