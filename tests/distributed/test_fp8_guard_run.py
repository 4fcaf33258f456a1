"""The guard at work on emulated FP8: it changes nothing by looking, and what falls back stays so in any layout."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from .conftest import Bench
from .fp8_runs import train_fp8
from .test_watching import scalars

pytestmark = pytest.mark.slow

FP8 = ["precision.params_dtype=bf16", "precision.fp8=delayed", "precision.fp8_amax_history_len=8"]
GUARD = [*FP8, "precision.fp8_guard.interval=2", "monitor.tensorboard=true"]
TP2 = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
PP2 = ["parallel.pipeline_model_parallel_size=2"]
LAYOUTS = {
    "tp2": TP2,
    "pp2": PP2,
    "pp2_vpp2": [*PP2, "parallel.virtual_pipeline_model_parallel_size=2", "train.micro_batch_size=1"],
    "dp2": ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"],
    "cp2": ["parallel.context_parallel_size=2"],
}
SPOILED = "decoder.layers.2.mlp.linear_fc1.input"
LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
NAMES = [f"decoder.layers.{layer}.{linear}" for layer in range(4) for linear in LINEARS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fp8_guard")


@pytest.fixture(scope="module")
def results(bench: Bench, folder: Path) -> dict[str, dict]:
    jobs: dict[str, list[str]] = {}
    extra: dict[str, dict] = {}
    for name, layout in LAYOUTS.items():
        jobs[f"{name}_plain"] = [*layout, *FP8]
        jobs[f"{name}_guarded"] = [*layout, *GUARD, f"run_dir={folder / name}"]
        extra |= {f"{name}_{how}": {"saves": False, "abandon_at": 5} for how in ("plain", "guarded")}
    falling = [*GUARD, f"run_dir={folder / 'falling'}", "precision.fp8_guard.max_overflow=0.2"]
    jobs["falling_1"] = [*TP2, *falling, "train.exit_interval=8"]
    extra["falling_1"] = {"spoil": {"scale": SPOILED, "factor": 4.0, "step": 6}}
    jobs["falling_2"] = [*PP2, *falling]
    nothing = [*GUARD, f"run_dir={folder / 'nothing'}", "precision.fp8_guard.max_loss_gap=0.5"]
    jobs["nothing"] = [*PP2, *nothing]
    extra["nothing"] = {"saves": False, "spoil": {"scale": SPOILED, "factor": math.nan, "step": 6}}
    return train_fp8(bench.folder, bench.config, 2, jobs, extra)


def losses(result: dict) -> list[str]:
    return [row["loss"] for row in result["steps"]]


def known(folder: Path, rank: int) -> dict:
    return json.loads((folder / f"fp8_{rank}.json").read_text())


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_looking_changes_nothing(results: dict[str, dict], name: str) -> None:
    plain, guarded = losses(results[f"{name}_plain"]), losses(results[f"{name}_guarded"])
    assert len(plain) == 5 and plain == guarded


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_every_layer_of_every_rank_is_in_tensorboard(
    results: dict[str, dict], folder: Path, name: str
) -> None:
    found = scalars(folder / name)
    for figure in ("amax", "overflow", "underflow"):
        expected = {
            f"fp8/{figure}/{layer}/{tensor}" for layer in NAMES for tensor in ("input", "weight", "grad")
        }
        assert {tag for tag in found if tag.startswith(f"fp8/{figure}/")} == expected
    for tag, values in found.items():
        if tag.startswith("fp8/"):
            assert [step for step, _ in values] == [2, 4], tag
    assert all(0 < value < 0.05 for _, value in found["fp8/loss_gap"])
    assert all(value == 0 for _, value in found["fp8/bf16_layers"])
    reference = scalars(folder / "tp2")
    same = [f"fp8/amax/{layer}/weight" for layer in NAMES] + [f"fp8/amax/{NAMES[0]}/input"]
    for (
        tag
    ) in same:  # the same values, wherever they lie (what lies behind an FP8 product differs by its noise)
        assert found[tag][0][1] == pytest.approx(reference[tag][0][1], rel=0.05), tag


def test_metrics_file_has_the_gap_and_not_each_layer(results: dict[str, dict], folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "pp2" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "fp8/loss_gap" in row] == [2, 4]
    assert {key for row in rows for key in row if key.startswith("fp8/")} == {
        "fp8/loss_gap", "fp8/max_overflow", "fp8/max_underflow", "fp8/bf16_layers"
    }  # fmt: skip


def test_a_layer_with_a_stale_scale_falls_back_and_stays_so(results: dict[str, dict], folder: Path) -> None:
    """TP 2 x SP sees it in step 6 and stops after step 8; PP 2 goes on."""
    run = folder / "falling"
    first, second = known(run, 0), known(run, 1)
    assert first == second  # of the resumed run: both stages
    assert first["bf16_layers"] == first["record"]["bf16_layers"] == [2]
    (event,) = first["record"]["events"]
    assert (event["step"], event["from_step"], event["layers"]) == (6, 7, [2])
    assert event["reason"].startswith(f"{SPOILED.removesuffix('.input')} input: overflow of ")
    (kept,) = run.glob("checkpoints/iter_0000008/state.json")
    assert json.loads(kept.read_text())["fp8"] == first["record"]
    assert results["falling_2"]["first_step"] == 8 and len(results["falling_2"]["steps"]) == 12
    found = scalars(run)
    assert found[f"fp8/overflow/{SPOILED.replace('.input', '/input')}"][2][1] > 0.2
    assert [step for step, _ in found["fp8/loss_gap"]] == list(range(2, 21, 2))
    assert [value for _, value in found["fp8/bf16_layers"]] == [0, 0] + [1] * 8
    later = [tag for tag, values in found.items() if tag.startswith("fp8/amax/") and values[-1][0] == 20]
    assert {tag.split("/")[2] for tag in later} == {name for name in NAMES if ".layers.2." not in name}


def test_the_fallback_is_told_in_every_log(results: dict[str, dict], folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = folder / "falling"
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    (text,) = events.Tensors("fp8/fallback/text_summary")
    assert text.step == 6
    assert b"layers 2 in bf16 from step 7 on" in text.tensor_proto.string_val[0]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    told = [row for row in rows if "fp8/events" in row]
    assert [row["step"] for row in told] == [6]
    assert told[0]["fp8/events"] == known(run, 0)["record"]["events"]


def test_a_loss_that_is_no_number_in_fp8_alone_does_not_end_the_run(
    results: dict[str, dict], folder: Path
) -> None:
    run = folder / "nothing"
    assert known(run, 0) == known(run, 1)
    assert known(run, 0)["bf16_layers"] == [0, 1, 2, 3]
    (event,) = known(run, 0)["record"]["events"]
    assert (event["step"], event["from_step"]) == (6, 6) and "loss nan against" in event["reason"]
    found = [float.fromhex(loss) for loss in losses(results["nothing"])]
    assert len(found) == 20 and all(math.isfinite(loss) for loss in found)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["fp8/loss_gap"] for row in rows if "fp8/loss_gap" in row] == [
        pytest.approx(0.0, abs=0.05)
    ] * 2 + [None]
