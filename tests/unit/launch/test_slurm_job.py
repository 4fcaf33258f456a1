"""``launch/job.py``: what becomes of a job after one start."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "launch"))

import job


@pytest.mark.parametrize(
    ("code", "by_slurm", "progress", "before", "expected"),
    [
        # code, ended from outside by, saved something, starts without progress before -> state, requeue, exit, count
        (0, None, True, 0, ("COMPLETED", False, 0, 0)),
        (0, "cancelled", True, 0, ("COMPLETED", False, 0, 0)),
        (75, None, True, 2, ("REQUEUED", True, 75, 0)),
        (75, None, False, 0, ("REQUEUED", True, 75, 1)),
        (75, None, False, 1, ("REQUEUED", True, 75, 2)),
        (75, None, False, 2, ("FAILED", False, 70, 3)),
        (137, None, True, 0, ("REQUEUED", True, 75, 0)),
        (139, None, False, 2, ("FAILED", False, 70, 3)),
        (65, None, True, 0, ("FAILED", False, 65, 0)),
        (70, None, False, 0, ("FAILED", False, 70, 1)),
        (75, "cancelled", True, 0, ("STOPPED", False, 75, 0)),
        (143, "cancelled", False, 1, ("STOPPED", False, 75, 1)),
        (75, "requeued", False, 2, ("REQUEUED", False, 75, 2)),
        (143, "requeued", True, 2, ("REQUEUED", False, 75, 0)),
        (75, "timeout", True, 0, ("REQUEUED", True, 75, 0)),
        (137, "timeout", False, 2, ("FAILED", False, 70, 3)),
        (70, "timeout", True, 0, ("REQUEUED", True, 75, 0)),
    ],
)
def test_decide(
    code: int, by_slurm: str | None, progress: bool, before: int, expected: tuple[str, bool, int, int]
) -> None:
    ending = job.decide(code, by_slurm, progress, before, limit=3)
    assert (ending.state, ending.requeue, ending.exit_code, ending.no_progress) == expected


@pytest.mark.parametrize(
    ("recorded", "srun", "expected"),
    [
        (None, 138, 138),
        (75, 75, 75),
        (65, 137, 65),
        (0, 139, 0),
        (70, 137, 137),
        (70, 70, 70),
        (70, 143, 143),
    ],
)
def test_trainer_code(recorded: int | None, srun: int, expected: int) -> None:
    assert job.trainer_code(recorded, srun) == expected


def fields(**changes: str) -> dict[str, str]:
    times = {"StartTime": "2026-01-01T10:00:00", "EndTime": "2026-01-01T10:20:00", "TimeLimit": "01:00:00"}
    return {"JobState": "COMPLETING", "Restarts": "0", **times, **changes}


@pytest.mark.parametrize(
    ("job_fields", "expected"),
    [
        (fields(JobState="RUNNING"), None),
        (fields(), "cancelled"),
        (fields(Restarts="1"), "requeued"),
        (fields(EndTime="2026-01-01T11:00:12"), "timeout"),
        (fields(EndTime="2026-01-01T11:00:12", TimeLimit="1-00:00:00"), "cancelled"),
        (fields(TimeLimit="UNLIMITED"), "cancelled"),
        ({}, None),
    ],
)
def test_ended_by(job_fields: dict[str, str], expected: str | None) -> None:
    assert job.ended_by(job_fields, restarts=0) == expected


def test_time_limits_as_scontrol_prints_them() -> None:
    assert job.parse_limit("00:10:00") == 600
    assert job.parse_limit("2-12:30:01") == 2 * 86400 + 12 * 3600 + 30 * 60 + 1
    assert job.parse_limit("UNLIMITED") is None


def test_last_saved_counts_whole_checkpoints_only(tmp_path: Path) -> None:
    assert job.last_saved(tmp_path) is None
    for name, whole in (
        ("iter_0000020", True),
        ("iter_0000100", True),
        ("iter_0000120", False),
        ("iter_0000140.tmp", True),
    ):
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        if whole:
            (folder / "manifest.json").write_text("{}")
    assert job.last_saved(tmp_path) == 100


def test_status_keeps_its_history(tmp_path: Path) -> None:
    job.record(tmp_path, "INIT", restarts=0)
    job.record(tmp_path, "PENDING", job_id=7)
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["job_id"], status["restarts"]) == ("PENDING", 7, 0)
    assert [event["state"] for event in status["history"]] == ["INIT", "PENDING"]
    assert [each.name for each in tmp_path.iterdir()] == ["status.json"]


def test_a_start_killed_before_its_end_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Node loss takes this process too: the next start finds RUNNING and no new checkpoint."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    job.record(tmp_path, "PENDING", job_id=7, no_progress_starts=0)
    assert job.begin(tmp_path, 7, restarts=0, limit=2) is None
    assert job.begin(tmp_path, 7, restarts=1, limit=2) is None
    assert job.begin(tmp_path, 7, restarts=2, limit=2) == 70
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "FAILED" and "no progress: 2 starts" in status["reason"]


def test_a_folder_of_a_live_job_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job.record(tmp_path, "RUNNING", job_id=7)
    monkeypatch.setattr(job, "ask_slurm", lambda number: {"JobState": "RUNNING"})
    before = (tmp_path / "status.json").read_bytes()
    assert job.begin(tmp_path, 8, restarts=0, limit=3) == 73
    assert (tmp_path / "status.json").read_bytes() == before


def test_lock_of_a_dead_job_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "run.lock"
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    for holder, state, kept in (("7", "RUNNING", True), ("7", "CANCELLED", False), ("9", "RUNNING", True)):
        lock.write_text(json.dumps({"host": "n1", "pid": 1, "job": holder}))
        monkeypatch.setattr(job, "ask_slurm", lambda number, state=state: {"JobState": state})
        job.release_dead_lock(tmp_path)
        assert lock.exists() is kept
    lock.write_text(json.dumps({"host": "n1", "pid": 1, "job": None}))  # not a job's: not ours to judge
    job.release_dead_lock(tmp_path)
    assert lock.exists()
