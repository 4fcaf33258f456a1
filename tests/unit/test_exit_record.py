"""One rank speaks for a failed run, and its code is the one that is kept."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from megatron_syne.resilience import exit_record
from megatron_syne.resilience.exit_record import ExitRecord


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exit_record, "HEAD_START_SECONDS", 0.05)


def test_the_first_failure_is_kept(tmp_path: Path) -> None:
    assert ExitRecord(tmp_path, 3).claim(65, 12, met_alike=True)
    assert not ExitRecord(tmp_path, 0).claim(70, 12, met_alike=False)
    kept = json.loads((tmp_path / "last_exit.json").read_text())
    assert (kept["exit_code"], kept["rank"], kept["iteration"]) == (65, 3, 12)
    assert [p.name for p in tmp_path.iterdir()] == ["last_exit.json"]


def test_of_many_ranks_one_speaks(tmp_path: Path) -> None:
    won: list[int] = []

    def fail(rank: int) -> None:
        if ExitRecord(tmp_path, rank).claim(70, 5, met_alike=False):
            won.append(rank)

    threads = [threading.Thread(target=fail, args=(rank,)) for rank in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert json.loads((tmp_path / "last_exit.json").read_text())["rank"] == won[0]


def test_rank_0_tells_what_all_ranks_met(tmp_path: Path) -> None:
    ranks = [ExitRecord(tmp_path, rank) for rank in range(4)]
    threads = [threading.Thread(target=r.claim, args=(64, -1, True)) for r in reversed(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert json.loads((tmp_path / "last_exit.json").read_text())["rank"] == 0


def test_a_new_start_forgets_and_a_good_end_replaces(tmp_path: Path) -> None:
    record = ExitRecord(tmp_path, 0)
    record.claim(70, 3, met_alike=False)
    record.forget()
    record.forget()
    assert record.claim(65, 4, met_alike=True)
    record.write(0, 20)
    assert json.loads((tmp_path / "last_exit.json").read_text())["exit_code"] == 0
