"""One run a folder: who holds it is named; only a holder that is surely gone is replaced."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_syne.errors import CannotCreate
from megatron_syne.resilience.run_lock import RunLock, _identity


def hold(folder: Path, **changes: object) -> None:
    (folder / "run.lock").write_text(json.dumps({**_identity(), **changes}))


def test_a_live_holder_is_named_and_kept(tmp_path: Path) -> None:
    first = RunLock(tmp_path)
    first.acquire()
    with pytest.raises(CannotCreate, match=f"pid {os.getpid()}"):
        RunLock(tmp_path).acquire()
    first.release()
    RunLock(tmp_path).acquire()


def test_a_dead_process_of_this_machine_is_replaced(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    hold(tmp_path, pid=gone.pid, started="1")
    RunLock(tmp_path).acquire()
    assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()


def test_a_reused_process_number_is_not_taken_for_the_holder(tmp_path: Path) -> None:
    hold(tmp_path, started="1")  # this very pid, but of a process that started at another time
    RunLock(tmp_path).acquire()


def test_another_machine_is_never_replaced(tmp_path: Path) -> None:
    hold(tmp_path, host="elsewhere", pid=1)
    with pytest.raises(CannotCreate, match="host elsewhere"):
        RunLock(tmp_path).acquire()


def test_a_requeued_job_takes_over_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hold(tmp_path, host="elsewhere", job="42", restart="0")
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    RunLock(tmp_path).acquire()


def test_the_same_start_of_a_job_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hold(tmp_path, host="elsewhere", job="42", restart="0")
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    with pytest.raises(CannotCreate, match="job 42"):
        RunLock(tmp_path).acquire()


def test_something_else_of_that_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_text("notes")
    with pytest.raises(CannotCreate, match="not a lock"):
        RunLock(tmp_path).acquire()
    assert (tmp_path / "run.lock").read_text() == "notes"


def test_a_hundred_races_have_one_winner_each(tmp_path: Path) -> None:
    for race in range(100):
        folder = tmp_path / str(race)
        folder.mkdir()
        if race % 2:
            hold(folder, pid=2**22 + 1, started="1")  # a dead holder, to be replaced by one of them
        won: list[int] = []

        def enter(number: int, folder: Path = folder, won: list[int] = won) -> None:
            try:
                RunLock(folder).acquire()
                won.append(number)
            except CannotCreate:
                pass

        threads = [threading.Thread(target=enter, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1, f"race {race}: {won}"
