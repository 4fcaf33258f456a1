"""How far a preparation has come: what a killed run's successor needs to go on and give the same bytes.

``PREFIX.journal.tmp`` lies beside the unfinished outputs and has a line for every few seconds of work, written
once the outputs up to there are on the disk. The last whole line counts; one of another request (inputs, options,
tokenizer) does not. It goes when the outputs are published.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any, BinaryIO

_MAX_BYTES = 1 << 28


def request_of(*parts: Any) -> str:
    """SHA-256 of everything that decides the bytes of the outputs."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode("utf-8")).hexdigest()


class Journal:
    """Read what is left, then ``write`` a state now and then."""

    def __init__(self, stream: BinaryIO, request: str) -> None:
        self._stream, self._request = stream, request
        self.found, self.state = _last_line(stream)
        """Whether anything is left of an earlier run; its last state, if it did the same."""
        if self.state is not None and self.state.get("request") != request:
            self.state = None

    def write(self, state: dict[str, Any], streams: Sequence[BinaryIO]) -> None:
        """Put the streams on the disk, then the state that describes them."""
        for stream in streams:
            stream.flush()
            os.fsync(stream.fileno())
        line = json.dumps({"request": self._request, **state}).encode("ascii")
        self._stream.seek(0, os.SEEK_END)
        self._stream.write(line + b"\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def clear(self) -> None:
        """Forget what was left."""
        self._stream.seek(0)
        self._stream.truncate()
        self.state = None


def _last_line(stream: BinaryIO) -> tuple[bool, dict[str, Any] | None]:
    stream.seek(0, os.SEEK_END)
    size = stream.tell()
    stream.seek(max(0, size - _MAX_BYTES))
    lines = stream.read().split(b"\n")[:-1]  # a line without its end was cut off
    stream.seek(0, os.SEEK_END)
    for line in reversed(lines):
        try:
            state = json.loads(line)
        except ValueError:
            continue
        if isinstance(state, dict):
            return True, state
    return size > 0, None
