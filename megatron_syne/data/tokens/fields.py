"""A number for each document, such as its perplexity: ``PREFIX.FIELD.npy``, float64, in the documents' order."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_syne.errors import ConfigError

HEADER_BYTES = 128  # numpy pads its header so that a count of up to 21 digits leaves its size as it is
_BLOCK = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")


def check_field_name(name: str) -> str:
    """The name, as it becomes part of a file's name (ConfigError)."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"--keep: {name!r} cannot name a file; use letters, digits, _ and -")
    return name


def stale_fields(prefix: str, keep: Sequence[str]) -> list[Path]:
    """Files of numbers that the manifest about to be replaced names, and its successor will not."""
    try:
        names = json.loads(Path(f"{prefix}.json").read_bytes())["fields"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [Path(f"{prefix}.{name}.npy") for name in names if _NAME.fullmatch(name) and name not in keep]


class NumberWriter:
    """Write numbers to an open ``.npy`` (``r+b``, ``w+b``), in memory that does not grow with them."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._stream.write(bytes(HEADER_BYTES))
        self.count = 0

    def add(self, values: NDArray[np.float64]) -> None:
        """Append the numbers of some documents."""
        self._stream.write(np.ascontiguousarray(values, dtype="<f8").tobytes())
        self.count += len(values)

    def resume(self, count: int) -> None:
        """Go on behind so many numbers that the file already holds; the rest of it is cut off."""
        self.count = count
        self._stream.seek(HEADER_BYTES + 8 * count)
        self._stream.truncate()

    def finish(self) -> dict[str, Any]:
        """Write the header; returns size and SHA-256 of the file, as the manifest has them."""
        header = io.BytesIO()
        described = {"descr": "<f8", "fortran_order": False, "shape": (self.count,)}
        np.lib.format.write_array_header_1_0(header, described)
        assert len(header.getvalue()) == HEADER_BYTES
        self._stream.seek(0)
        self._stream.write(header.getvalue())
        self._stream.seek(0)
        digest = hashlib.sha256()
        while block := self._stream.read(_BLOCK):
            digest.update(block)
        return {"bytes": self._stream.seek(0, os.SEEK_END), "sha256": digest.hexdigest()}
