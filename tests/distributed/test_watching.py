"""What a run leaves to be looked at is read back: tensorboard's own reader, metrics.jsonl, the run folder."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from .conftest import Bench
from .ranks import logs_of, run_ranks, start_ranks, wait_ranks

pytestmark = pytest.mark.slow

RATE = {1: 1e-3, 2: 1.5e-3, 3: 2e-3, 4: 2.5e-3, 5: 3e-3}  # warm-up from a non-zero start


@pytest.fixture(scope="module")
def run(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, stopped at step 8 and resumed to 20, with evaluation; then killed work done twice."""
    run = tmp_path_factory.mktemp("watch") / "run"
    command = [
        "-m", "megatron_syne.train", "--config", str(bench.config), f"run_dir={run}",
        "parallel.pipeline_model_parallel_size=2", "monitor.tensorboard=true", "monitor.progress=true",
        "train.eval_interval=10", "train.eval_iters=2",
    ]  # fmt: skip
    first = start_ranks(2, [*command, "train.exit_interval=8"])
    assert wait_ranks(first) == [75, 75], logs_of(first[0])
    with (run / "metrics.jsonl").open(
        "a"
    ) as stream:  # a step done after the save, by a process that was killed
        stream.write(json.dumps({"step": 9, "loss": 0.0}) + '\n{"step": 10, "lo')
    run_ranks(2, command)
    return run


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_every_curve_without_gap_or_repeat(run: Path) -> None:
    found = scalars(run)
    for tag in (
        "train/loss", "train/grad_norm", "train/learning_rate", "speed/tokens_per_second",
        "progress/consumed_tokens", "speed/data_share_percent", "tokens/en", "mixture/en",
    ):  # fmt: skip
        assert [step for step, _ in found[tag]] == list(range(1, 21)), tag
        assert all(math.isfinite(value) for _, value in found[tag])
    assert found["progress/consumed_tokens"][-1][1] == 20 * 8 * 64
    assert found["tokens/en"][-1][1] + found["tokens/zh"][-1][1] == 20 * 8 * 64
    assert [value for _, value in found["mixture/en"]] == [0.75] * 12 + [0.5] * 8  # the two stages
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
