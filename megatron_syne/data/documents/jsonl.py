"""Lines of JSON as read from a file, and the record, text or number of one; every fault is named by line and byte.

Lines count from 1, bytes are offsets in the file from 0: of a compressed file in its unpacked bytes, of a parquet
file in the JSON lines that its rows become (line N is row N). ``inputs`` makes the lines.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NamedTuple

import orjson

MAX_LINE_BYTES = 1 << 26

_ESCAPE = re.compile(rb"\\(?:u([0-9a-fA-F]{4})|.)", re.DOTALL)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Line(NamedTuple):
    """One line as read, its newline included: ``raw`` is shorter than ``length`` where it exceeds the limit."""

    number: int
    offset: int
    raw: bytes
    length: int
    plain: str = ""
    """Not empty: ``raw`` is no JSON but itself the text of the field of this name (a plain text file)."""
    fault: str = ""
    """Not empty: what the reader found wrong here, such as the end of a truncated gzip file."""


class BadLine(ValueError):
    """A line that gives no text: ``reason`` and the ``byte`` of the file at which it went wrong."""

    def __init__(self, reason: str, byte: int) -> None:
        super().__init__(reason)
        self.reason = reason
        self.byte = byte


def record_of(line: Line) -> dict[str, Any] | None:
    """The JSON object of one line, None for a blank line; raises BadLine."""
    if line.fault:
        raise BadLine(line.fault, line.offset + line.length)
    if line.length > len(line.raw):
        raise BadLine(f"line of {line.length} bytes is longer than the limit", line.offset)
    raw, start = line.raw, line.offset
    if start == 0 and raw.startswith(_BYTE_ORDER_MARK):  # a byte-order mark says nothing in UTF-8
        raw, start = raw[3:], 3
    if not line.plain and (not raw or raw.isspace()):
        return None
    cut = "" if line.plain or raw.endswith(b"\n") else " (the file ends inside this line: truncated?)"
    if (nul := raw.find(b"\0")) >= 0:
        raise BadLine("NUL byte", start + nul)
    if not line.plain:
        try:
            record = orjson.loads(raw)
        except orjson.JSONDecodeError:
            pass  # the standard library says where, and takes some that are stricter here (NaN, deep nesting)
        else:
            if isinstance(record, dict):
                return record
    try:
        decoded = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadLine(f"invalid UTF-8: {error.reason}{cut}", start + error.start) from None
    if line.plain:
        return {line.plain: decoded}
    try:
        record = json.loads(decoded)
    except json.JSONDecodeError as error:
        byte = start + len(decoded[: error.pos].encode("utf-8"))
        raise BadLine(f"invalid JSON: {error.msg}{cut}", byte) from None
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise BadLine(f"invalid JSON: {what}", start) from None
    if not isinstance(record, dict):
        raise BadLine(f"expected a JSON object, found {_json_type(record)}", start)
    return record


def text_of(line: Line, key: str) -> str | None:
    """The text of one line, None for a blank line; raises BadLine."""
    record = record_of(line)
    return None if record is None else text_in(record, key, line)


def text_in(record: dict[str, Any], key: str, line: Line) -> str:
    """The text of a record made from ``line``; raises BadLine where it is no string or holds what no text may."""
    text = _field(record, key, line)
    if not isinstance(text, str):
        raise BadLine(f"field {key!r} must be a string, found {_json_type(text)}", line.offset)
    if "\0" in text:
        raise BadLine("escaped NUL character in the text", line.offset + _first_escape(line.raw, nul=True))
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        byte = line.offset + _first_escape(line.raw, nul=False)
        raise BadLine("lone surrogate escape in the text", byte) from None
    return text


def number_in(record: dict[str, Any], key: str, line: Line) -> float:
    """A number stored with the text, such as its perplexity; raises BadLine where it is none, NaN or infinite."""
    number = _field(record, key, line)
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise BadLine(f"field {key!r} must be a number, found {_json_type(number)}", line.offset)
    try:
        value = float(number)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise BadLine(f"field {key!r} must be a finite number, found {value}", line.offset)
    return value


def _field(record: dict[str, Any], key: str, line: Line) -> Any:
    if key not in record:
        here = ", ".join(sorted(record)[:8]) or "none"
        raise BadLine(f"no field {key!r}; fields here: {here}", line.offset)
    return record[key]


def _json_type(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _first_escape(raw: bytes, *, nul: bool) -> int:
    r"""Offset in the line of its first ``\u0000``, or of its first surrogate escape without a partner."""
    pending: int | None = None
    end_of_pending = -1
    for match in _ESCAPE.finditer(raw):
        code = int(match[1], 16) if match[1] else -1
        if nul:
            if code == 0:
                return match.start()
            continue
        if pending is not None:
            if 0xDC00 <= code <= 0xDFFF and match.start() == end_of_pending:
                pending = None
                continue
            return pending
        if 0xDC00 <= code <= 0xDFFF:
            return match.start()
        if 0xD800 <= code <= 0xDBFF:
            pending, end_of_pending = match.start(), match.end()
    return pending or 0
