"""What a run leaves to be looked at is read back: tensorboard's own reader, metrics.jsonl, the run folder."""

from __future__ import annotations

import json
import math
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from .conftest import Bench
from .ranks import logs_of, run_ranks, start_ranks, wait_ranks

pytestmark = pytest.mark.slow

PARTS = ("data", "forward_backward", "optimizer", "checkpoint")
# 6 x (4 layers x 64 x ((2 x 8 + 2 x 4) x 8 + 3 x 192) + 2560 x 64) + 6 x 2 x 4 layers x 64 x 64 / 2
FLOPS = 6 * (4 * 64 * (24 * 8 + 3 * 192) + 2560 * 64) + 12 * 4 * 64 * 32
RATE = {1: 1e-3, 2: 1.5e-3, 3: 2e-3, 4: 2.5e-3, 5: 3e-3}  # warm-up from a non-zero start


@pytest.fixture(scope="module")
def run(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, stopped at step 8 and resumed to 20, with evaluation; then killed work done twice."""
    run = tmp_path_factory.mktemp("watch") / "run"
    command = [
        "-m", "megatron_syne.train", "--config", str(bench.config), f"run_dir={run}",
        "parallel.pipeline_model_parallel_size=2", "monitor.tensorboard=true", "monitor.progress=true",
        "train.eval_interval=10", "train.eval_iters=2", "monitor.norms_interval=5", "monitor.peak_flops=1e12",
    ]  # fmt: skip
    first = start_ranks(2, [*command, "train.exit_interval=8"])
    assert wait_ranks(first) == [75, 75], logs_of(first[0])
    with (run / "metrics.jsonl").open(
        "a"
    ) as stream:  # a step done after the save, by a process that was killed
        stream.write(json.dumps({"step": 9, "loss": 0.0}) + '\n{"step": 10, "lo')
    run_ranks(2, command)
    return run


@cache
def events_of(run: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    events = events_of(run)
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_every_curve_without_gap_or_repeat(run: Path) -> None:
    found = scalars(run)
    for tag in (
        "train/loss", "train/grad_norm", "train/learning_rate", "speed/tokens_per_second",
        "progress/consumed_tokens", "speed/data_share_percent", "tokens/en", "mixture/en", "memory/peak_bytes",
        "train_loss/en", "train_loss/zh", "speed/tokens_per_second_per_gpu", "speed/tflops_per_gpu", "speed/mfu",
        "speed/step_seconds", "progress/stage", *(f"time/{part}_seconds" for part in PARTS),
    ):  # fmt: skip
        assert [step for step, _ in found[tag]] == list(range(1, 21)), tag
        assert all(math.isfinite(value) for _, value in found[tag])
    assert found["progress/consumed_tokens"][-1][1] == 20 * 8 * 64
    assert found["tokens/en"][-1][1] + found["tokens/zh"][-1][1] == 20 * 8 * 64
    assert [value for _, value in found["mixture/en"]] == [0.75] * 12 + [0.5] * 8  # the two stages
    assert [value for _, value in found["progress/stage"]] == [0.0] * 12 + [1.0] * 8
    groups = ["embedding", *(f"layer_{n}" for n in range(4)), "final_norm", "output_layer"]
    for tag in ("norm/parameters", *(f"grad_norm/{group}" for group in groups)):
        assert [step for step, _ in found[tag]] == [5, 10, 15, 20], tag
    assert all(0 <= value <= 100 for _, value in found["speed/data_share_percent"])
    rates = dict(found["train/learning_rate"])
    for step, rate in RATE.items():
        assert rates[step] == pytest.approx(rate, rel=1e-6)
    assert [step for step, _ in found["validation_loss/en"]] == [10, 20]
    for (_, loss), (_, perplexity) in zip(
        found["validation_loss/en"], found["validation_perplexity/en"], strict=True
    ):
        assert perplexity == pytest.approx(math.exp(loss), rel=1e-4)


def test_metrics_file_agrees_and_forgets_lost_work(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == list(range(1, 21))
    logged = dict(scalars(run)["train/loss"])
    for row in rows:
        if "loss" in row:
            assert row["loss"] == pytest.approx(logged[row["step"]], rel=1e-6)
            assert float.fromhex(row["loss_hex"]) == row["loss"]
    assert [row["step"] for row in rows if "validation" in row] == [10, 20]


def test_the_times_of_a_step_are_parts_of_it(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    for row in steps:
        parts = [row[f"{part}_seconds"] for part in PARTS[:3]]
        assert all(part > 0 for part in parts) and sum(parts) <= row["step_seconds"]
        tokens, seconds = row["tokens_per_second_per_gpu"], row["step_seconds"]
        assert tokens * 2 == row["tokens_per_second"] == pytest.approx(8 * 64 / seconds)
        assert row["mfu"] == pytest.approx(row["tflops_per_gpu"])  # of 1e12
        flops = row["tflops_per_gpu"] * 1e12 / tokens
        assert flops == pytest.approx(FLOPS)
    assert not any(row["checkpoint_seconds"] for row in steps)  # saved at the ends alone
    assert [row["stage"] for row in steps] == ["one"] * 12 + ["two"] * 8


def test_tensorboard_has_the_page_the_dashboard_and_the_options(run: Path) -> None:
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = events_of(run)
    found = set(scalars(run))
    page = events.Tensors("run/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "pipeline_model_parallel_size: 2" in page and "layers 2-3, output" in page
    layout = Layout()
    layout.ParseFromString(events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    tags = [tag for each in layout.category for chart in each.chart for tag in chart.multiline.tag]
    wanted = {"train_loss/zh", "grad_norm/layer_3", "time/checkpoint_seconds", "tokens/en"}
    assert wanted <= {one for one in found if any(re.match(tag, one) for tag in tags)}
    alone = {tag for tag in tags if sum(bool(re.match(tag, one)) for one in found) == 1}
    assert set(tags) - alone <= {"validation_loss/.*"}
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    options = HParamsPluginData.FromString(content).session_start_info.hparams
    assert options["optimizer.lr"].number_value == 3e-3 and options["world_size"].number_value == 2
    assert options["precision.params_dtype"].string_value == "fp32"
    assert not any(name.startswith("launch") for name in options)
    experiment = HParamsPluginData.FromString(
        events.summary_metadata["_hparams_/experiment"].plugin_data.content
    ).experiment
    finals = {info.name.tag for info in experiment.metric_infos}
    assert finals == {"train/loss", "validation_loss/en"} and finals <= found
    assert "_hparams_/session_end_info" in events.summary_metadata


def test_checkpoints_and_losses_of_watched_and_unwatched_steps(bench: Bench, tmp_path: Path) -> None:
    """What watches does not change what is trained, and saving is told with the next step that is logged."""
    jobs = {
        "watched": ["monitor.norms_interval=1", "checkpoint.save_interval=3", "monitor.tensorboard=true"],
        "unwatched": [
            "monitor.norms_interval=null",
            "monitor.loss_per_source=false",
            "monitor.log_interval=4",
        ],
    }
    listed = {name: [f"run_dir={tmp_path / name}", *overrides] for name, overrides in jobs.items()}
    # abandoned: the checkpoint at the end is not waited for
    results = bench.train(1, listed, {name: {"abandon_at": 5} for name in jobs})
    losses = {name: [row["loss"] for row in result["steps"]] for name, result in results.items()}
    norms = {name: [row["grad_norm"] for row in result["steps"]] for name, result in results.items()}
    assert losses["watched"] == losses["unwatched"] and norms["watched"] == norms["unwatched"]
    rows = [json.loads(line) for line in (tmp_path / "watched" / "metrics.jsonl").read_text().splitlines()]
    assert [row["checkpoint_seconds"] > 0 for row in rows] == [False, False, False, True, False]
    rows = [json.loads(line) for line in (tmp_path / "unwatched" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4]
    assert not any("norm/" in name or name.startswith(("loss/", "param")) for row in rows for name in row)


def test_the_run_folder_tells_its_own_story(run: Path) -> None:
    assert {p.name for p in run.iterdir()} >= {
        "config.yaml",
        "checkpoints",
        "tensorboard",
        "metrics.jsonl",
        "hf",
    }
    assert json.loads((run / "last_exit.json").read_text())["exit_code"] == 0
    assert "pipeline_model_parallel_size: 2" in (run / "config.yaml").read_text()
    assert not (run / "run.lock").exists()


def test_only_rank_0_shows_progress(bench: Bench, tmp_path: Path) -> None:
    ranks = start_ranks(
        2,
        ["-m", "megatron_syne.train", "--config", str(bench.config), f"run_dir={tmp_path / 'run'}",
         "monitor.progress=true", "train.exit_interval=2"],
    )  # fmt: skip
    assert wait_ranks(ranks) == [75, 75]
    text = logs_of(ranks[0])
    assert "tok/s" in text and "steps 0 -> 20" in text and " %  one  left" in text
    assert logs_of(ranks[1]) == ""


def test_truncated_weights_are_told_before_anything_is_written(bench: Bench, tmp_path: Path) -> None:
    broken = shutil.copytree(bench.folder / "seed", tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    ranks = start_ranks(
        2,
        ["-m", "megatron_syne.train", "--config", str(bench.config), f"run_dir={tmp_path / 'run'}",
         f"checkpoint.initialize_from={broken}"],
    )  # fmt: skip
    assert wait_ranks(ranks) == [65, 65]
    assert "model.safetensors: truncated" in logs_of(ranks[0]) and logs_of(ranks[1]) == ""
    assert not (tmp_path / "run").exists()


def test_vocabulary_larger_than_the_embedding_is_refused(bench: Bench, tmp_path: Path) -> None:
    from .conftest import make_seed

    small = make_seed(tmp_path / "small", vocab_size=2048)
    ranks = start_ranks(
        2,
        ["-m", "megatron_syne.train", "--config", str(bench.config), f"run_dir={tmp_path / 'run'}",
         f"model.hf_path={small}", f"checkpoint.initialize_from={small}"],
    )  # fmt: skip
    assert wait_ranks(ranks) == [65, 65]
    text = logs_of(ranks[0]) + logs_of(ranks[1])
    assert "2560" in text and "2048" in text and "Traceback" not in text
    assert text.count("error") == 1
    assert not (tmp_path / "run").exists()
