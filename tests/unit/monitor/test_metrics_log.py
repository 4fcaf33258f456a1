"""metrics.jsonl survives a disk that is full for a while, and a line that was cut off by a kill."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_syne.errors import IOFault
from megatron_syne.monitor.metrics_log import MetricsLog


def at(step: int, evaluated_step: int = 0) -> Any:
    """A trainer of which the log sees no more."""
    return SimpleNamespace(state=SimpleNamespace(step=step, evaluated_step=evaluated_step), fp8_record=None)


def records(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def room() -> Iterator[Any]:
    """``room(bytes)``: no file may grow beyond; the process's own limit stands in for the disk's."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_once_and_made_up_for(tmp_path: Path, room: Any, capsys: Any) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.on_train_start(at(0))
    room(100)
    for step in range(1, 6):
        log.on_evaluation(at(step), {"en": step / 3})
    assert path.stat().st_size == 100
    words = capsys.readouterr().err
    assert words.count(str(path)) == 1 and "File too large" in words and "training goes on" in words
    room(resource.RLIM_INFINITY)
    log.on_evaluation(at(6), {"en": 2.0})
    assert "room again" in capsys.readouterr().err
    log.on_train_end(at(6))
    assert [(row["step"], row["validation"]["en"]) for row in records(path)] == [
        (step, step / 3) for step in range(1, 7)
    ]


def test_what_is_lost_in_the_end_is_told(tmp_path: Path, room: Any, capsys: Any) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.on_train_start(at(0))
    room(100)
    for step in range(1, 6):
        log.on_evaluation(at(step), {"en": 1.0})
    log.on_exception(at(5), RuntimeError())
    assert "the last 4 records are lost" in capsys.readouterr().err
    room(resource.RLIM_INFINITY)
    MetricsLog(path).on_train_start(at(5, 5))  # the torn line goes
    assert [row["step"] for row in records(path)] == [1]


def test_no_room_at_the_start_is_an_error_that_names_the_file(tmp_path: Path, room: Any) -> None:
    path = tmp_path / "metrics.jsonl"
    kept = "".join(json.dumps({"step": n, "loss": 1.0}) + "\n" for n in range(1, 20))
    path.write_text(kept)
    room(50)
    with pytest.raises(IOFault, match=r"metrics\.jsonl: File too large; make room"):
        MetricsLog(path).on_train_start(at(10))
    assert path.read_text() == kept and list(tmp_path.iterdir()) == [path]


def test_lost_work_and_rubbish_are_dropped_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 1}\n\xff\xfe\n{"step": 3}\n[]\n{"step": 2, "validation": {}}\n{"step": 2, "lo'
    )
    log = MetricsLog(path)
    log.on_train_start(at(2))
    log.on_train_end(at(2))
    assert records(path) == [{"step": 1}]
