"""Writing gigabytes: whole pages past the page cache (O_DIRECT), the few bytes at the ends through it.

The kernel's copy into the page cache and its writeback cost more processor time than all hashing together,
and push other people's files out of memory. A file system that refuses O_DIRECT is written as usual.
"""

from __future__ import annotations

import errno
import mmap
import os

import numpy as np

from megatron_syne.convert.numbers import ITEM_BYTES
from megatron_syne.convert.streams import Bytes, Place

PAGE = 4096
"""Offsets, lengths and addresses of direct writes are multiples of it (no disk in use asks for more)."""
STAGE_BYTES = 4 * 2**20
"""Written at once."""
STAGES_BYTES = 8 * 2**20
"""Memory of one thread for what waits to be written."""
_LEAST_STAGE = 2**16


class OutFile:
    """A file of the output, made where it is missing. Safe from several threads."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        flags = os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self.descriptor = os.open(path, flags | os.O_RDWR, 0o666)
        self._direct = -1
        try:
            self._direct = os.open(path, (flags | os.O_WRONLY | os.O_DIRECT) & ~os.O_CREAT)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                self.close()
                raise

    @property
    def direct(self) -> bool:
        """Whether the file system takes direct writes, as far as is known."""
        return self._direct >= 0

    def write(self, view: memoryview, offset: int) -> None:
        """Write all of ``view``, through the page cache."""
        write_all(self.descriptor, view, offset)

    def write_pages(self, view: memoryview, offset: int) -> None:
        """Write whole pages, past the page cache where that can be. ``view`` starts on a page of memory."""
        if self.direct:
            try:
                write_all(self._direct, view, offset)
                return
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        write_all(self.descriptor, view, offset)

    def close(self) -> None:
        """Close the file; what was written is not yet on the disk without ``os.fsync`` before."""
        for descriptor in (self._direct, self.descriptor):
            if descriptor >= 0:
                os.close(descriptor)


class Stream:
    """Bytes on their way to consecutive places of a file, gathered in ``stage`` (memory that begins on a page;
    two pages or more)."""

    def __init__(self, file: OutFile, offset: int, stage: Bytes) -> None:
        self._file, self._stage = file, stage
        self._offset = offset
        """Byte of the file where ``stage[self._start]`` goes; both are equally far into a page."""
        self._start = self._stop = offset % PAGE

    def append(self, part: Bytes) -> None:
        """Copy a matrix of bytes, whose rows may lie apart in memory, to the end of the stream."""
        if part.flags.c_contiguous:
            self._append(part.reshape(-1))
            return
        row = 0
        while row < len(part):
            count = min((len(self._stage) - self._stop) // part.shape[1], len(part) - row)
            if count:
                size = count * part.shape[1]
                self._stage[self._stop : self._stop + size].reshape(count, -1)[...] = part[row : row + count]
                self._stop += size
                row += count
            else:  # the rest of the stage is shorter than a row
                self._append(part[row])
                row += 1

    def _append(self, line: Bytes) -> None:
        while len(line):
            count = min(len(line), len(self._stage) - self._stop)
            self._stage[self._stop : self._stop + count] = line[:count]
            self._stop += count
            line = line[count:]
            if self._stop == len(self._stage):
                self._flush()

    def _flush(self) -> None:
        """Write the whole pages; what is left moves to the front."""
        first = -(-self._start // PAGE) * PAGE
        last = self._stop // PAGE * PAGE
        view = memoryview(self._stage)  # type: ignore[arg-type]
        if first >= last:  # less than one page
            return
        if self._start < first:
            self._file.write(view[self._start : first], self._offset)
        at = self._offset + first - self._start
        self._file.write_pages(view[first:last], at)
        left = self._stop - last
        self._stage[:left] = self._stage[last : self._stop]
        self._offset, self._start, self._stop = at + last - first, 0, left

    def finish(self) -> None:
        """Write what is left."""
        self._flush()
        if self._start < self._stop:
            view = memoryview(self._stage)[self._start : self._stop]  # type: ignore[arg-type]
            self._file.write(view, self._offset)
            self._start = self._stop


class Stages:
    """One thread's memory for streams: cut into as many stages as are needed at once."""

    def __init__(self) -> None:
        self._memory: Bytes = np.frombuffer(mmap.mmap(-1, STAGES_BYTES), np.uint8)
        self._free: list[Bytes] = []

    def cut(self, count: int) -> None:
        """Have ``count`` stages, if that many of a sensible size fit. No stream may be under way."""
        size = max(_LEAST_STAGE, min(STAGE_BYTES, STAGES_BYTES // max(1, count) // PAGE * PAGE))
        self._free = [self._memory[at : at + size] for at in range(0, STAGES_BYTES - size + 1, size)]

    def take(self) -> Bytes | None:
        """A stage, or None where all are in use."""
        return self._free.pop() if self._free else None

    def give(self, stage: Bytes) -> None:
        """A stage that a finished stream had."""
        self._free.append(stage)


def is_streamed(place: Place) -> bool:
    """Whether a place is one run of bytes, and long enough to be worth a stream."""
    (top, bottom), (left, right) = place.piece.rows, place.piece.cols
    stride = place.columns * ITEM_BYTES[place.dtype]
    return right - left == place.columns and (bottom - top) * stride >= _LEAST_STAGE


def open_at_once(places: list[Place]) -> int:
    """How many of the places are under way at the same time when a tensor goes by from its first row on."""
    events = sorted(
        (row, step) for p in places for row, step in ((p.piece.rows[0], 1), (p.piece.rows[1], -1))
    )
    most = now = 0
    for _, step in events:
        now += step
        most = max(most, now)
    return most


def write_all(descriptor: int, view: memoryview, offset: int) -> None:
    """Write all of ``view`` at ``offset`` of a file."""
    done = os.pwrite(descriptor, view, offset)
    while done < len(view):  # one call moves 2 GiB at most
        done += os.pwrite(descriptor, view[done:], offset + done)
