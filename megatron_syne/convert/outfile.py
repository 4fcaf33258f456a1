"""Writing gigabytes: whole pages past the page cache (O_DIRECT), the few bytes at the ends through it.

The kernel's copy into the page cache and its writeback cost more processor time than all hashing together,
and push other people's files out of memory. A file system that refuses O_DIRECT is written as usual.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue

import numpy as np

from megatron_syne.convert.numbers import ITEM_BYTES
from megatron_syne.convert.pieces import Span
from megatron_syne.convert.streams import Bytes, Place

PAGE = 4096
"""Offsets, lengths and addresses of direct writes are multiples of it (no disk in use asks for more)."""
STAGE_BYTES = 4 * 2**20
"""Written at once."""
STAGES_BYTES = 16 * 2**20
"""Memory of one thread for what waits to be written."""
_LEAST_STAGE = 2**16
_SPARE_STAGES = 3
_LATER = 128


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


class Writer:
    """A few threads that write whole pages while others fill the next: a direct write needs no processor."""

    def __init__(self, number: int) -> None:
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._loop, daemon=True) for _ in range(number)]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Callable[[], None]) -> None:
        """Do ``job``, which raises nothing, soon."""
        self._queue.put(job)

    def close(self) -> None:
        """Wait until all jobs are done."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _loop(self) -> None:
        while (job := self._queue.get()) is not None:
            job()


class Stages:
    """One thread's memory for streams: cut into equal stages, which go round between it and the writer."""

    def __init__(self, writer: Writer | None = None) -> None:
        """Without a ``writer`` pages are written at once."""
        self._writer = writer
        self._memory: Bytes | None = None
        self._free: SimpleQueue[Bytes] = SimpleQueue()
        self._number = 0
        self._error: BaseException | None = None
        self._later: list[tuple[OutFile, int, bytes]] = []

    def room(self, streams: int) -> int:
        """Have stages for as many streams at once and for what is being written; for how many there really are.
        No stream may be under way."""
        if self._number > streams:
            return self._number - 1
        self.drain()
        if self._memory is None:
            self._memory = np.frombuffer(mmap.mmap(-1, STAGES_BYTES), np.uint8)
        size = STAGES_BYTES // (streams + _SPARE_STAGES) // PAGE * PAGE
        size = max(_LEAST_STAGE, min(STAGE_BYTES, size))
        self._free = SimpleQueue()
        starts = range(0, STAGES_BYTES - size + 1, size)
        for at in starts:
            self._free.put(self._memory[at : at + size])
        self._number = len(starts)
        return self._number - 1

    def take(self) -> Bytes:
        """A stage; waits for the writer where all are full. Raises what went wrong in the writer."""
        stage = self._free.get()
        if self._error is not None:
            self._free.put(stage)
            raise self._error
        return stage

    def give(self, stage: Bytes) -> None:
        """A stage that is not needed any more."""
        self._free.put(stage)

    def write(self, file: OutFile, stage: Bytes, pages: Span, offset: int) -> None:
        """Write bytes ``pages`` of a stage to ``offset`` of a file; the stage is free afterwards."""

        def job() -> None:
            try:
                view = memoryview(stage)  # type: ignore[arg-type]
                file.write_pages(view[pages[0] : pages[1]], offset)
            except BaseException as error:
                self._error = error
            self._free.put(stage)

        if self._writer is None:
            job()
        else:
            self._writer.submit(job)

    def write_later(self, file: OutFile, view: memoryview, offset: int) -> None:
        """Write a few bytes through the page cache, many at a time: the kernel has them wait for the direct
        writes that are under way to the same file, and the next direct writes for them."""
        self._later.append((file, offset, bytes(view)))
        if len(self._later) >= _LATER:
            self._write_waiting()

    def drain(self) -> None:
        """Wait until all is written. Raises what went wrong. No stream may be under way."""
        for stage in [self._free.get() for _ in range(self._number)]:
            self._free.put(stage)
        self._write_waiting()
        if self._error is not None:
            raise self._error

    def _write_waiting(self) -> None:
        for file, offset, content in self._later:
            file.write(memoryview(content), offset)
        self._later.clear()


class Stream:
    """Bytes on their way to consecutive places of a file."""

    def __init__(self, file: OutFile, offset: int, stages: Stages) -> None:
        self._file, self._stages = file, stages
        self._stage = stages.take()
        self._held = True
        self._offset = offset
        """Byte of the file where ``_stage[_start]`` goes; both are equally far into a page."""
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

    def finish(self) -> None:
        """Write what is left, the pages perhaps only soon (``Stages.drain``)."""
        pages = self._pages()
        self._held = False
        if pages[0] < pages[1]:
            self._write_odd(self._start, pages[0])
            self._write_odd(pages[1], self._stop)
            self._stages.write(self._file, self._stage, pages, self._offset + pages[0] - self._start)
        else:  # less than a page
            self._write_odd(self._start, self._stop)
            self._stages.give(self._stage)

    def abandon(self) -> None:
        """Give the memory back; what was not written is lost."""
        if self._held:
            self._held = False
            self._stages.give(self._stage)

    def _append(self, line: Bytes) -> None:
        while len(line):
            count = min(len(line), len(self._stage) - self._stop)
            self._stage[self._stop : self._stop + count] = line[:count]
            self._stop += count
            line = line[count:]
            if self._stop == len(self._stage):
                self._flush()

    def _flush(self) -> None:
        """Hand the whole pages of a full stage to the writer; what is left goes to the front of the next."""
        full, (first, last) = self._stage, self._pages()
        self._write_odd(self._start, first)
        at = self._offset + first - self._start
        left = self._stop - last
        self._stages.write(self._file, full, (first, last), at)
        self._held = False
        self._stage = self._stages.take()  # perhaps the same: nobody else fills stages, so its end is intact
        self._held = True
        self._stage[:left] = full[last : self._stop]
        self._offset, self._start, self._stop = at + last - first, 0, left

    def _pages(self) -> Span:
        """The whole pages among what is in the stage."""
        return -(-self._start // PAGE) * PAGE, self._stop // PAGE * PAGE

    def _write_odd(self, start: int, stop: int) -> None:
        """Write part of a page."""
        if start < stop:
            view = memoryview(self._stage)[start:stop]  # type: ignore[arg-type]
            self._stages.write_later(self._file, view, self._offset + start - self._start)


def is_streamed(place: Place) -> bool:
    """Whether a place is one run of bytes, and long enough to be worth a stream."""
    whole_rows = place.piece.cols[1] - place.piece.cols[0] == place.columns
    return whole_rows and _size(place) >= _LEAST_STAGE


def is_small(place: Place) -> bool:
    """Whether a place is so short that its bytes can wait in memory."""
    return _size(place) < _LEAST_STAGE


def _size(place: Place) -> int:
    (top, bottom), (left, right) = place.piece.rows, place.piece.cols
    return (bottom - top) * (right - left) * ITEM_BYTES[place.dtype]


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
