"""Checkpoints written beside the training are those written while it waits, and no death of a process harms them."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from megatron_syne.checkpoint.folder import read_manifest, read_metadata

from .conftest import Bench
from .full_disk import SmallDisk, assert_full_disk_is_told
from .ranks import logs_of, run_ranks, start_ranks, wait_ranks
from .stored import stored_tensor
from .test_layouts import TP2

pytestmark = pytest.mark.slow

ASYNC = "checkpoint.async_save=true"
SHORT = ["checkpoint.save_interval=5", "train.exit_interval=10"]
# States that are stored in bf16 are written in fp32: those were made for the checkpoint alone.
BF16 = ["precision.params_dtype=bf16", "optimizer.use_precision_aware_optimizer=true"]
BF16 += ["optimizer.exp_avg_dtype=bf16", "optimizer.exp_avg_sq_dtype=bf16"]
# Several buckets, each padded to a multiple of 128: parameters lie otherwise than in a row.
BUCKETS = ["parallel.overlap_grad_reduce=true", "parallel.ddp_bucket_size=30000"]


@pytest.fixture(scope="module")
def runs(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict]]:
    """TP2 and DP2, waiting and beside; one of them abandoned while a checkpoint is being written, and gone on with."""
    folder = tmp_path_factory.mktemp("async")
    jobs = {
        "tp2": [TP2, *BF16, *SHORT],
        "tp2_beside": [TP2, *BF16, *SHORT, ASYNC],
        "dp2": [*BUCKETS, "checkpoint.save_interval=10"],
        "dp2_beside": [*BUCKETS, "checkpoint.save_interval=10", ASYNC],
        "abandoned": [*BUCKETS, "checkpoint.save_interval=5", ASYNC, f"run_dir={folder / 'again'}"],
        "again": [*BUCKETS, ASYNC],
    }
    listed = {name: [f"run_dir={folder / name}", *overrides] for name, overrides in jobs.items()}
    slow = {"slow_writing": True}
    options = {"abandoned": {"abandon_at": 10}, "tp2_beside": slow, "dp2_beside": slow}
    results = bench.train(2, listed, options)
    return folder, results


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def losses(result: dict) -> list[str]:
    return [row["loss"] for row in result["steps"]]


@pytest.mark.parametrize(("layout", "steps"), [("tp2", (5, 10)), ("dp2", (10, 20))])
def test_the_files_are_the_same(
    runs: tuple[Path, dict[str, dict]], layout: str, steps: tuple[int, int]
) -> None:
    """Also where nothing is written until training has done its next step, and changed all values in place."""
    folder, results = runs
    assert set(results[f"{layout}_beside"]["held_back"]) == {steps[0]}
    waiting, beside = folder / layout, folder / f"{layout}_beside"
    assert losses(results[layout]) == losses(results[f"{layout}_beside"])
    every = [f"iter_{step:07d}" for step in steps]
    assert checkpoints(waiting) == checkpoints(beside) == every
    for name in every:
        one, other = waiting / "checkpoints" / name, beside / "checkpoints" / name
        files = read_manifest(one)["files"]
        assert files.keys() == read_manifest(other)["files"].keys()
        for file in files.keys() - {".metadata"}:
            assert (one / file).read_bytes() == (other / file).read_bytes(), (name, file)
        tensors, others = (read_metadata(each) for each in (one, other))
        tensors.storage_meta = others.storage_meta  # the folder's name
        assert tensors == others


def test_masters_are_those_of_their_weights(runs: tuple[Path, dict[str, dict]]) -> None:
    """In fp32 the two are one, wherever in which bucket a parameter lies."""
    folder, _ = runs
    stored = folder / "dp2_beside" / "checkpoints" / "iter_0000010"
    names = [
        "embedding.word_embeddings.weight",
        "decoder.layers.self_attention.linear_proj.weight",
        "decoder.layers.mlp.linear_fc1.weight",
        "decoder.final_layernorm.weight",
        "output_layer.weight",
    ]
    for name in names:
        assert stored_tensor(stored, name).equal(stored_tensor(stored, f"optimizer.state.param.{name}")), name


def test_training_fails_while_one_is_written(runs: tuple[Path, dict[str, dict]]) -> None:
    """The one before it is gone on from, and what was left is cleared away."""
    folder, results = runs
    first = results["again"]["first_step"]
    assert first in (5, 10)  # 10: all had been written when training failed
    assert losses(results["abandoned"])[:first] + losses(results["again"]) == losses(results["dp2"])
    assert not list((folder / "again" / "checkpoints").glob("*.tmp"))


def command(bench: Bench, run: Path, *overrides: str) -> list[str]:
    return ["--config", str(bench.config), f"run_dir={run}", ASYNC, *overrides]


def test_killed_while_writing(bench: Bench, runs: tuple[Path, dict[str, dict]], tmp_path: Path) -> None:
    """The second checkpoint waits for the first; the processes die half-way through it."""
    run, options = tmp_path / "run", [*BUCKETS, "checkpoint.save_interval=4"]
    faults = {"SLOW_STEP": "4", "KILL_STEP": "8"}
    ranks = start_ranks(2, ["-m", "distributed.faulty_writer", *command(bench, run, *options)], faults)
    codes = wait_ranks(ranks)
    assert -signal.SIGKILL in codes and 0 not in codes, logs_of(ranks[0])[-2000:]
    assert logs_of(ranks[0]).count("step 8: waited") == 1
    assert checkpoints(run) == ["iter_0000004", "iter_0000008.tmp"]
    run_ranks(2, ["-m", "megatron_syne.train", *command(bench, run, *options)])
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss_hex"] for row in found] == losses(runs[1]["dp2"])
    assert checkpoints(run) == ["iter_0000012", "iter_0000016", "iter_0000020"]


def test_a_disk_that_fills_in_the_background(bench: Bench, small_disk: SmallDisk) -> None:
    """A real small disk: the first checkpoint fits, the second does not; told as when training waits."""
    with small_disk("12m") as disk:
        run = disk / "run"
        ranks = start_ranks(
            2, ["-m", "megatron_syne.train", *command(bench, run, "checkpoint.save_interval=4")]
        )
        assert_full_disk_is_told(ranks)
        assert checkpoints(run) == ["iter_0000004"]
        read_manifest(run / "checkpoints" / "iter_0000004")
        assert json.loads((run / "last_exit.json").read_text())["exit_code"] == 74
