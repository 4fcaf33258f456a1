"""Streams write exactly their bytes, wherever they start, however they come, with and without direct writes."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_syne.convert import outfile
from megatron_syne.convert.outfile import PAGE, OutFile, Stages, Stream, Writer, open_at_once
from megatron_syne.convert.pieces import Piece
from megatron_syne.convert.streams import Place

SIZE = 40 * PAGE


@given(
    offset=st.integers(0, 3 * PAGE),
    parts=st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 3 * PAGE), st.integers(0, 5)), min_size=1, max_size=6
    ),
    stages=st.integers(1, 4),
    direct=st.booleans(),
    threads=st.booleans(),
)
@settings(deadline=None, max_examples=300)
def test_stream(
    tmp_path_factory: pytest.TempPathFactory,
    offset: int,
    parts: list[tuple[int, int, int]],
    stages: int,
    direct: bool,
    threads: bool,
) -> None:
    """``parts``: rows, bytes of a row, bytes between rows in memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outfile, "STAGES_BYTES", 8 * PAGE)
        patch.setattr(outfile, "_LEAST_STAGE", 2 * PAGE)
        if not direct:
            patch.setattr(os, "O_DIRECT", 0)
        path = tmp_path_factory.getbasetemp() / "stream"
        path.write_bytes(b"\xee" * SIZE)
        writer = Writer(2) if threads else None
        file, pool = OutFile(path), Stages(writer)
        assert pool.room(stages) >= 1
        stream, expected, random = Stream(file, offset, pool), b"", np.random.default_rng(len(parts))
        for rows, width, gap in parts:
            rows = min(rows, (SIZE - offset - len(expected)) // width)
            if rows > 0:
                wide = random.integers(0, 256, (rows, width + gap), np.uint8)
                stream.append(wide[:, :width])
                expected += wide[:, :width].tobytes()
        stream.finish()
        pool.drain()
        file.close()
        if writer is not None:
            writer.close()
    raw = path.read_bytes()
    assert raw[offset : offset + len(expected)] == expected
    assert raw[:offset] == b"\xee" * offset
    assert raw[offset + len(expected) :] == b"\xee" * (SIZE - offset - len(expected))


def test_two_streams_that_meet_within_a_page(tmp_path: Path) -> None:
    file, pool = OutFile(tmp_path / "file"), Stages()
    os.ftruncate(file.descriptor, 10 * PAGE)
    pool.room(2)
    one, two = (Stream(file, at, pool) for at in (0, 3 * PAGE + 100))
    two.append(np.full((1, 2 * PAGE), 2, np.uint8))
    one.append(np.full((1, 3 * PAGE + 100), 1, np.uint8))
    two.finish()
    one.finish()
    pool.drain()
    file.close()
    raw = (tmp_path / "file").read_bytes()
    assert raw == b"\1" * (3 * PAGE + 100) + b"\2" * 2 * PAGE + bytes(10 * PAGE - 5 * PAGE - 100)


@pytest.mark.parametrize("when", ["open", "write"])
def test_a_file_system_that_refuses_direct_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    real_open, real_write = os.open, os.pwrite
    direct: set[int] = set()

    def refuse_open(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT and when == "open":
            raise OSError(errno.EINVAL, "Invalid argument")
        descriptor = real_open(path, flags, *rest)
        if flags & os.O_DIRECT:
            direct.add(descriptor)
        return descriptor

    def refuse_write(descriptor: int, view: Any, offset: int) -> int:
        if descriptor in direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_write(descriptor, view, offset)

    monkeypatch.setattr(os, "open", refuse_open)
    monkeypatch.setattr(os, "pwrite", refuse_write)
    file = OutFile(tmp_path / "file")
    assert file.direct is (when == "write")
    file.write_pages(memoryview(b"x" * PAGE), PAGE)
    file.close()
    assert (tmp_path / "file").read_bytes() == bytes(PAGE) + b"x" * PAGE


def test_whole_pages_are_written_directly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else: a direct write of part of a page would be refused by the disk."""
    written: list[tuple[int, int]] = []
    monkeypatch.setattr(
        OutFile, "write_pages", lambda self, view, offset: written.append((offset, len(view)))
    )
    file, pool = OutFile(tmp_path / "file"), Stages()
    pool.room(1)
    stream = Stream(file, 10, pool)
    stream.append(np.zeros((3, outfile.STAGE_BYTES // 2), np.uint8))
    stream.finish()
    file.close()
    end = 10 + 3 * (outfile.STAGE_BYTES // 2)
    assert written[0][0] == PAGE and written[-1][0] + written[-1][1] == end // PAGE * PAGE
    assert all(a + b == c for (a, b), (c, _) in itertools.pairwise(written))
    assert all(at % PAGE == 0 and size % PAGE == 0 for at, size in written)


def test_what_goes_wrong_in_the_writer_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: OutFile, view: memoryview, offset: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(OutFile, "write_pages", full)
    writer = Writer(1)
    file, pool = OutFile(tmp_path / "file"), Stages(writer)
    pool.room(1)
    stream = Stream(file, 0, pool)
    with pytest.raises(OSError, match="No space left"):
        for _ in range(10):  # one of these, when the stages have gone round
            stream.append(np.zeros((1, outfile.STAGE_BYTES), np.uint8))
    stream.abandon()
    with pytest.raises(OSError, match="No space left"):
        pool.drain()
    writer.close()
    file.close()


def test_streams_open_at_once() -> None:
    def place(start: int, stop: int) -> Place:
        return Place("f", 0, 4, "BF16", Piece("t", (start, stop), (0, 4), (0, 0)))

    assert open_at_once([]) == 0
    assert open_at_once([place(0, 5), place(5, 9)]) == 1
    assert open_at_once([place(0, 5), place(4, 9), place(0, 9)]) == 3
