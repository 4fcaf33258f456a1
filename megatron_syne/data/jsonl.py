"""Lines of a JSONL file, in chunks, and the text of one line; every fault is named by line and byte.

Lines count from 1, bytes are offsets in the file from 0. Nothing here depends on how the file is cut into
chunks, so any number of workers sees the same lines.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from megatron_syne.errors import DataError, MissingInput

CHUNK_BYTES = 1 << 20
MAX_LINE_BYTES = 1 << 26

_KEPT_OF_OVERLONG = 1 << 10
_ESCAPE = re.compile(rb"\\(?:u([0-9a-fA-F]{4})|.)", re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}


class Line(NamedTuple):
    """One line as read: ``raw`` is shorter than ``length`` where the line exceeds the limit."""

    number: int
    offset: int
    raw: bytes
    length: int


class BadLine(ValueError):
    """A line that gives no text: ``reason`` and the ``byte`` of the file at which it went wrong."""

    def __init__(self, reason: str, byte: int) -> None:
        super().__init__(reason)
        self.reason = reason
        self.byte = byte


class SourceFile:
    """One input file, read once: ``chunks()``, then ``sha256`` and ``size`` of what was read.

    Raises MissingInput where it cannot be read, DataError where it is not text or changed under the reader.
    """

    def __init__(
        self, path: str | Path, chunk_bytes: int = CHUNK_BYTES, max_line_bytes: int = MAX_LINE_BYTES
    ) -> None:
        self.path = str(path)
        if not os.path.exists(path):
            raise MissingInput(f"{path}: no such file")
        if not os.path.isfile(path):
            raise DataError(f"{path}: not a regular file")
        if not os.access(path, os.R_OK):
            raise MissingInput(f"{path}: may not be read by this user")
        self.size = os.path.getsize(path)
        self.sha256 = ""
        self._chunk_bytes = chunk_bytes
        self._max_line_bytes = max_line_bytes

    def chunks(self) -> Iterator[list[Line]]:
        """Lists of consecutive lines of about ``chunk_bytes`` together (at least one line each)."""
        digest = hashlib.sha256()
        number, offset = 0, 0
        chunk: list[Line] = []
        filled = 0
        with open(self.path, "rb") as stream:
            before = os.fstat(stream.fileno())
            while raw := stream.readline(self._max_line_bytes + 1):
                digest.update(raw)
                length = len(raw)
                if length > self._max_line_bytes and not raw.endswith(b"\n"):
                    raw = raw[:_KEPT_OF_OVERLONG]
                    while rest := stream.readline(self._chunk_bytes):
                        digest.update(rest)
                        length += len(rest)
                        if rest.endswith(b"\n"):
                            break
                number += 1
                if number == 1:
                    self._check_start(raw)
                chunk.append(Line(number, offset, raw, length))
                offset += length
                filled += len(raw)
                if filled >= self._chunk_bytes:
                    yield chunk
                    chunk, filled = [], 0
            if chunk:
                yield chunk
            after = os.fstat(stream.fileno())
        if (before.st_size, before.st_mtime_ns) != (
            after.st_size,
            after.st_mtime_ns,
        ) or offset != after.st_size:
            raise DataError(f"{self.path}: changed while it was read; start again once it is complete")
        self.size = offset
        self.sha256 = digest.hexdigest()

    def _check_start(self, raw: bytes) -> None:
        for magic, name in _COMPRESSED.items():
            if raw.startswith(magic):
                raise DataError(f"{self.path}: is compressed with {name}; unpack it first")
        if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise DataError(f"{self.path}:1:0: is UTF-16; convert it to UTF-8 first")


def text_of(line: Line, key: str) -> str | None:
    """The text of one line, None for a blank line; raises BadLine."""
    if line.length > len(line.raw):
        raise BadLine(f"line of {line.length} bytes is longer than the limit", line.offset)
    raw, start = line.raw, line.offset
    if line.number == 1 and raw.startswith(b"\xef\xbb\xbf"):  # a byte-order mark says nothing in UTF-8
        raw, start = raw[3:], start + 3
    if not raw.strip():
        return None
    cut = "" if raw.endswith(b"\n") else " (the file ends inside this line: truncated?)"
    if (nul := raw.find(b"\0")) >= 0:
        raise BadLine("NUL byte", start + nul)
    try:
        decoded = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadLine(f"invalid UTF-8: {error.reason}{cut}", start + error.start) from None
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
    if key not in record:
        raise BadLine(f"no field {key!r}; fields here: {', '.join(sorted(record)[:8]) or 'none'}", start)
    text = record[key]
    if not isinstance(text, str):
        raise BadLine(f"field {key!r} must be a string, found {_json_type(text)}", start)
    if "\0" in text:
        raise BadLine("escaped NUL character in the text", start + _first_escape(raw, nul=True))
    if _SURROGATE.search(text):
        raise BadLine("lone surrogate escape in the text", start + _first_escape(raw, nul=False))
    return text


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
