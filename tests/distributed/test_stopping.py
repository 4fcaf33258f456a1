"""Signals, locks and damaged checkpoints, with the real program."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import time
from pathlib import Path

import pytest

from .conftest import Bench
from .full_disk import SmallDisk, assert_full_disk_is_told
from .ranks import logs_of, run_ranks, start_ranks, wait_ranks

pytestmark = pytest.mark.slow


def command(bench: Bench, run: Path, *overrides: str) -> list[str]:
    return ["-m", "megatron_syne.train", "--config", str(bench.config), f"run_dir={run}", *overrides]


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def wait_for_step(run: Path, step: int) -> None:
    end = time.monotonic() + 90
    while time.monotonic() < end:
        if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step} in {run}")


@pytest.fixture(scope="module")
def undisturbed(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    run_ranks(2, command(bench, run))
    return [row["loss_hex"] for row in metrics(run)]


@pytest.mark.parametrize("signalled", [0, 1])
def test_a_signal_to_one_rank_saves_and_stops_all(
    bench: Bench, tmp_path: Path, undisturbed: list[str], signalled: int
) -> None:
    run = tmp_path / "run"
    ranks = start_ranks(2, command(bench, run))
    wait_for_step(run, 3)
    for _ in range(2):  # Slurm and a launcher may each send one
        os.kill(ranks[signalled].pid, signal.SIGTERM)
    assert wait_ranks(ranks) == [75, 75], [logs_of(r)[-2000:] for r in ranks]
    assert logs_of(ranks[0]).count("everything is saved") == 1
    left = json.loads((run / "last_exit.json").read_text())
    assert left["exit_code"] == 75 and 3 <= left["iteration"] < 20
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"iter_{left['iteration']:07d}"]
    run_ranks(2, command(bench, run))
    assert [row["loss_hex"] for row in metrics(run)] == undisturbed


def test_a_killed_run_goes_on_from_its_last_checkpoint(
    bench: Bench, tmp_path: Path, undisturbed: list[str]
) -> None:
    run = tmp_path / "run"
    ranks = start_ranks(2, command(bench, run, "checkpoint.save_interval=4"))
    wait_for_step(run, 6)
    for rank in ranks:
        rank.kill()
    wait_ranks(ranks)
    run_ranks(2, command(bench, run, "checkpoint.save_interval=4"))
    assert [
        row["loss_hex"] for row in metrics(run)
    ] == undisturbed  # one line a step: none twice, none missing
    assert not list((run / "checkpoints").glob("*.tmp"))


def test_the_survivor_of_a_killed_rank_says_so(bench: Bench, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ranks = start_ranks(2, command(bench, run))
    wait_for_step(run, 2)
    ranks[1].kill()
    assert wait_ranks(ranks) == [70, -signal.SIGKILL]
    assert "another rank is gone" in logs_of(ranks[0]) and "Traceback" not in logs_of(ranks[0])
    assert json.loads((run / "last_exit.json").read_text())["exit_code"] == 70


def test_a_second_run_in_the_same_folder_is_refused(bench: Bench, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = start_ranks(1, command(bench, run))
    wait_for_step(run, 1)
    os.kill(first[0].pid, signal.SIGSTOP)
    try:
        second = start_ranks(1, command(bench, run))
        assert wait_ranks(second) == [73]
        assert f"pid {first[0].pid}" in logs_of(second[0]) and "Traceback" not in logs_of(second[0])
    finally:
        os.kill(first[0].pid, signal.SIGCONT)
    assert wait_ranks(first) == [0]


def test_a_full_disk_keeps_the_earlier_checkpoint(
    bench: Bench, tmp_path: Path, small_disk: SmallDisk, undisturbed: list[str]
) -> None:
    """A real small disk: the first checkpoint fits, the second does not."""
    with small_disk("12m") as disk:
        run = disk / "run"
        ranks = start_ranks(2, command(bench, run, "checkpoint.save_interval=4"))
        assert_full_disk_is_told(ranks)
        assert [p.name for p in (run / "checkpoints").iterdir()] == ["iter_0000004"]
        assert json.loads((run / "last_exit.json").read_text())["exit_code"] == 74
        moved = shutil.copytree(run, tmp_path / "run")
    run_ranks(2, command(bench, moved))
    assert [row["loss_hex"] for row in metrics(moved)] == undisturbed


class TestDamage:
    """What lies in the run folder is not what was saved."""

    @pytest.fixture(scope="class")
    def saved(self, bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
        run = tmp_path_factory.mktemp("damage") / "run"
        ranks = start_ranks(1, command(bench, run, "checkpoint.save_interval=4", "train.exit_interval=8"))
        assert wait_ranks(ranks) == [75]
        return run

    def test_a_truncated_newest_checkpoint_is_passed_over(
        self, bench: Bench, saved: Path, tmp_path: Path
    ) -> None:
        run = tmp_path / "run"
        shutil.copytree(saved, run)
        file = next((run / "checkpoints" / "iter_0000008").glob("*.distcp"))
        file.write_bytes(file.read_bytes()[:-1])
        ranks = start_ranks(1, command(bench, run, "train.exit_interval=6"))
        assert wait_ranks(ranks) == [75]
        assert file.name in logs_of(ranks[0]) and "damaged" in logs_of(ranks[0])
        assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4, 5, 6]

    def test_bytes_that_changed_in_place_are_told(self, bench: Bench, saved: Path, tmp_path: Path) -> None:
        """Same size, other bytes, where the storage format notices them."""
        run = tmp_path / "run"
        shutil.copytree(saved, run)
        for file in (run / "checkpoints" / "iter_0000008").glob("*.distcp"):
            file.write_bytes(b"\0" * file.stat().st_size)
        ranks = start_ranks(1, command(bench, run))
        assert wait_ranks(ranks) == [65], logs_of(ranks[0])[-2000:]
        assert "iter_0000008: damaged" in logs_of(ranks[0]) and "Traceback" not in logs_of(ranks[0])

    def test_a_run_never_starts_again_in_silence(self, bench: Bench, saved: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        shutil.copytree(saved, run)
        for folder in (run / "checkpoints").iterdir():
            (folder / "common.pt").unlink()
        ranks = start_ranks(1, command(bench, run))
        assert wait_ranks(ranks) == [65]
        assert "common.pt is missing" in logs_of(ranks[0]) and "Traceback" not in logs_of(ranks[0])

    def test_code_in_a_checkpoint_is_not_run(self, bench: Bench, saved: Path, tmp_path: Path) -> None:
        run, canary = tmp_path / "run", tmp_path / "canary"
        shutil.copytree(saved, run)

        class Boom:
            def __reduce__(self) -> tuple:
                return os.system, (f"touch {canary}",)

        metadata = run / "checkpoints" / "iter_0000008" / ".metadata"
        metadata.write_bytes(pickle.dumps(Boom()))
        manifest = metadata.with_name("manifest.json")
        sizes = json.loads(manifest.read_text())
        sizes["files"][".metadata"] = metadata.stat().st_size
        manifest.write_text(json.dumps(sizes))
        ranks = start_ranks(1, command(bench, run))
        assert wait_ranks(ranks) == [77]
        assert "posix.system" in logs_of(ranks[0]) and not canary.exists()

    def test_another_model_or_another_past_are_refused(
        self, bench: Bench, saved: Path, tmp_path: Path
    ) -> None:
        for override, word in (
            ("model.rotary_base=10000", "rotary_base"),
            ("train.seed=7", "train.seed: 1234 -> 7"),
        ):
            ranks = start_ranks(1, command(bench, saved, override))
            assert wait_ranks(ranks) == [64]
            assert word in logs_of(ranks[0])
