"""Where each document of some inputs stands, so that they can be read in any order with the texts on the disk."""

from __future__ import annotations

import os
import tempfile
from array import array
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO

from megatron_syne.curation.records import Record, line_of
from megatron_syne.errors import DataError

_OPEN_FILES = 128
_MOST = 0xFFFF
_COPY = 0  # the number of our own copy among the files
_MARK = b"\xef\xbb\xbf"


class DocumentIndex:
    """Documents by number in order of ``add``: 24 bytes each, the caller's number and group included.

    Lines of plain JSONL are read where they stand; those of compressed files, parquet, plain text and the standard
    input are copied to a temporary file in ``folder``. To be used in a ``with`` statement.
    """

    def __init__(self, folder: Path) -> None:
        self.values = array("d")
        self.groups = array("H")
        self.names: list[str] = []
        self._numbers: dict[str, int] = {}
        self._offsets = array("q")
        self._lengths = array("I")
        self._homes = array("H")
        self._paths = [""]
        self._states: list[tuple[int, int]] = [(0, 0)]
        self._open: OrderedDict[int, BinaryIO] = OrderedDict()
        self._folder = folder
        self._copy: BinaryIO | None = None
        self._last = ("", _COPY)

    def __enter__(self) -> DocumentIndex:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in [*self._open.values(), *([self._copy] if self._copy else [])]:
            stream.close()

    def add(self, record: Record, value: float, group: str) -> None:
        """One more document; the records of a file come one after another."""
        if record.path != self._last[0]:
            self._last = record.path, self._home_of(record)
        home = self._last[1]
        offset, length = record.line.offset, len(record.line.raw)
        if home == _COPY:
            if self._copy is None:
                self._copy = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  closed by __exit__
            line = line_of(record, {})
            offset, length = self._copy.tell(), len(line)
            self._copy.write(line)
        if group not in self._numbers:
            self._numbers[group] = len(self.names)
            self.names.append(group)
            if len(self.names) > _MOST:
                raise DataError(f"more than {_MOST:,} groups, such as {group!r}; is that the right field?")
        self.values.append(value)
        self.groups.append(self._numbers[group])
        self._offsets.append(offset)
        self._lengths.append(length)
        self._homes.append(home)

    def _home_of(self, record: Record) -> int:
        """The number of the record's file; that of our copy where a line is not found at its offset."""
        if record.line.plain or not os.path.isfile(record.path):
            return _COPY
        with open(record.path, "rb") as stream:
            status = os.fstat(stream.fileno())
            found = os.pread(stream.fileno(), len(record.line.raw), record.line.offset)
        if found != record.line.raw:  # compressed, or parquet: offsets count in what was unpacked
            return _COPY
        self._paths.append(record.path)
        self._states.append((status.st_size, status.st_mtime_ns))
        if len(self._paths) > _MOST:
            raise DataError(f"more than {_MOST:,} input files; join some of them")
        return len(self._paths) - 1

    def read(self, number: int) -> bytes:
        """The line of a document; DataError where its file is no longer what it was."""
        home, length = self._homes[number], self._lengths[number]
        if home == _COPY:
            assert self._copy is not None
            self._copy.flush()
            stream = self._copy
        else:
            stream = self._opened(home)
        line = os.pread(stream.fileno(), length, self._offsets[number])
        if len(line) != length:
            raise DataError(
                f"{self._paths[home]}: changed while it was read; start again once it is complete"
            )
        return line.removeprefix(_MARK)

    def _opened(self, home: int) -> BinaryIO:
        """A stream of an input, of which few are open at a time."""
        if home not in self._open:
            if len(self._open) >= _OPEN_FILES:
                self._open.popitem(last=False)[1].close()
            self._open[home] = open(self._paths[home], "rb")  # noqa: SIM115  closed by __exit__
        self._open.move_to_end(home)
        return self._open[home]

    def check_unchanged(self) -> None:
        """DataError where an input changed since its lines were found."""
        for path, state in zip(self._paths[1:], self._states[1:], strict=True):
            try:
                status = os.stat(path)
            except OSError:
                status = None
            if status is None or (status.st_size, status.st_mtime_ns) != state:
                raise DataError(f"{path}: changed while it was read; start again once it is complete")
