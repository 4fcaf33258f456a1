"""``metrics.jsonl``: one JSON object a line, read line by line up to the first that is broken."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from megatron_syne.runs.recorder import Recorder

MAX_LINE_BYTES = 1 << 26


def read_metrics(path: Path, keep: Sequence[str] | None = None) -> tuple[Recorder, list[str], bool]:
    """(what was read, what could not be, whether good lines may follow what is broken).

    A last line that breaks off is a run that is being written or was killed; a broken line before the last one
    means damage, and what follows it is not read. A file that a run appends to is read to its present end.
    """
    recorder = Recorder(keep)
    with path.open("rb", buffering=1 << 20) as stream:
        number, raw, fault = 0, b"", ""
        for raw in iter(lambda: stream.readline(MAX_LINE_BYTES), b""):
            number += 1
            try:
                record = _record(raw)
                if record is not None:
                    recorder.add(record["step"], record, f"{path}:{number}")
            except (ValueError, OverflowError, RecursionError) as error:
                fault = str(error)
                break
        problems = recorder.problems()
        if not fault:
            return recorder, problems, False
        last = _nothing_follows(stream)
    if last:
        torn = "breaks off in the middle of a line" if not raw.endswith(b"\n") else f"the last line: {fault}"
        problems.append(f"{path}:{number}: {torn}; read up to there")
    else:
        problems.append(f"{path}:{number}: {fault}; read up to there, later lines were left out")
    return recorder, problems, not last


def _record(raw: bytes) -> dict[str, Any] | None:
    """The record of one line, None for a blank one; ValueError says what is wrong."""
    try:
        record = orjson.loads(raw)
    except orjson.JSONDecodeError:
        if not raw.strip():
            return None
        if len(raw) == MAX_LINE_BYTES:
            raise ValueError(f"a line of more than {MAX_LINE_BYTES:,} bytes") from None
        if b"\0" in raw:
            raise ValueError("NUL bytes (a disk that lost its cache?)") from None
        record = _lenient(raw)
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {type(record).__name__}")
    step = record.get("step")
    if type(step) is not int or not 0 <= step < 1 << 62:
        raise ValueError(f'expected "step" with a number from 0, found {str(step)[:40]!r}')
    return record


def _lenient(raw: bytes) -> Any:
    """With NaN and Infinity, which are no JSON but which Python and others write."""
    try:
        record = json.loads(raw, parse_int=_whole)
        json.dumps(record, ensure_ascii=False).encode()
        return record
    except UnicodeEncodeError:
        raise ValueError("half a surrogate pair in text") from None
    except UnicodeDecodeError:
        raise ValueError("invalid UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON at byte {error.pos + 1} of the line: {error.msg}") from None


def _whole(text: str) -> int:
    """OverflowError for a number of so many digits that no metric can hold it."""
    number = int(text)
    float(number)
    return number


def _nothing_follows(stream: BinaryIO) -> bool:
    return not stream.read(1 << 16).strip()
