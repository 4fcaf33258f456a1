"""Tensors a few megabytes at a time: read, hashed, written to their places and compared with them.

A tile is some whole rows of a Hugging Face tensor. However large the model, each thread holds one tile and
one block of what goes to a file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from megatron_syne.convert.feeder import Feeder
from megatron_syne.convert.files import open_inside, read_exactly
from megatron_syne.convert.numbers import ITEM_BYTES, convert
from megatron_syne.convert.outfile import OutFile, Stages, Stream, is_small, is_streamed, open_at_once
from megatron_syne.convert.pieces import Span, matrix
from megatron_syne.convert.streams import Bytes, Place, StoredWeights, Target, Weights
from megatron_syne.errors import DataError

TILE_BYTES = 2 * 2**20
"""Small enough to be still in the processor's cache when it is hashed and written."""
_CONVERTED_TILES = 4
"""So many times smaller are tiles that are converted, which takes many arrays of their size."""

HASH_BLOCK_BYTES = 2**20
"""Read at a time for a hash alone: small enough to be still in the processor's cache when it is hashed."""

Count = Callable[[int], None]
"""Told of bytes done; may raise to stop the work."""


@dataclass
class Buffers:
    """The memory of one thread, used again for every tile."""

    arrays: dict[str, Bytes] = field(default_factory=dict)
    stages: Stages = field(default_factory=Stages)

    def get(self, use: str, rows: int, row_bytes: int) -> Bytes:
        """A contiguous matrix of bytes for ``use``; its contents are whatever was there."""
        size = rows * row_bytes
        flat = self.arrays.get(use)
        if flat is None or len(flat) < size:
            flat = self.arrays[use] = np.empty(max(size, TILE_BYTES), np.uint8)
        return flat[:size].reshape(rows, row_bytes)


def tiles(rows: int, row_bytes: int) -> Iterator[Span]:
    """Spans of rows of about ``TILE_BYTES``, at least one row each."""
    step = max(1, TILE_BYTES // max(1, row_bytes))
    for start in range(0, rows, step):
        yield (start, min(start + step, rows))


def write_tensor(
    weights: Weights,
    target: Target,
    name: str,
    files: Mapping[str, OutFile],
    buffers: Buffers,
    count: Count,
    feeder: Feeder | None = None,
) -> tuple[str, bool]:
    """Write a tensor to all its places; BLAKE3 of its bytes as a reader of the target sees them, and whether
    they are the same as before (fp32 less 1 does not hold every bit of an fp32 number, nor of a tiny bf16 one).

    All is written after ``buffers.stages.drain()``. ``count`` gets the bytes, ``feeder`` the tensor as it was
    read. Raises DataError for values that the
    target's format cannot hold, OSError.
    """
    digest = blake3()
    dtype, places = target.dtypes[name], target.places[name]
    long = [place for place in places if is_streamed(place)]
    room = buffers.stages.room(open_at_once(long)) if long else 0
    streams: dict[int, Stream] = {}
    shifted = next((place for place in places if place.shift), None)
    exact = True
    try:
        for span, tile in read_tiles(weights, name, dtype, buffers, feeder):
            if shifted is not None:
                stored = convert(tile, dtype, shifted.dtype, shifted.shift, name)
                seen = convert(stored, shifted.dtype, dtype, -shifted.shift, name)
                exact = exact and np.array_equal(seen, tile)
                tile = seen
            digest.update(flat(tile))
            for index, place in enumerate(places):
                rows = common(span, place.piece.rows)
                if rows is None:
                    continue
                part = stored_form(place, rows, span, tile, dtype)
                if rows[0] == place.piece.rows[0] and len(streams) < room and is_streamed(place):
                    streams[index] = Stream(files[place.file], place.rows_at(rows)[0], buffers.stages)
                if index not in streams:
                    write = buffers.stages.write_later if is_small(place) else OutFile.write
                    put(files[place.file], place, rows, part, write)
                else:
                    streams[index].append(part)
                    if rows[1] == place.piece.rows[1]:
                        streams.pop(index).finish()
                count(part.size)
    finally:  # none is left where all went well
        for stream in streams.values():
            stream.abandon()
    return digest.hexdigest(), exact


def hash_tensor(
    weights: Weights, name: str, dtype: str, also: Iterable[Place], buffers: Buffers, count: Count
) -> str:
    """BLAKE3 of a tensor in ``dtype``. ``count`` gets the bytes read.

    The places in ``also`` (replicas, and those of another format) must hold the same. Raises DataError where
    they do not, or where the weights cannot be read.
    """
    digest = blake3()
    for span, tile in read_tiles(weights, name, dtype, buffers):
        digest.update(flat(tile))
        count(tile.size)
        for place in also:
            assert isinstance(weights, StoredWeights)
            rows = common(span, place.piece.rows)
            if rows is None:
                continue
            expected = stored_form(place, rows, span, tile, dtype)
            found = buffers.get("found", *expected.shape)
            take(weights.descriptors[place.file], place, rows, found, weights.folder)
            if not np.array_equal(found, expected):
                raise DataError(
                    f"{weights.folder / place.file}: {place.parameter}: rows {rows[0]} to {rows[1]} of {name} "
                    f"are not the same as in its other places"
                )
    return digest.hexdigest()


def read_tiles(
    weights: Weights, name: str, dtype: str, buffers: Buffers, feeder: Feeder | None = None
) -> Iterator[tuple[Span, Bytes]]:
    """The tensor's rows in ``dtype``, tile by tile; each is valid until the next."""
    stored, row_bytes = weights.dtypes[name], weights.row_bytes(name)
    wide = row_bytes if stored == dtype else _CONVERTED_TILES * row_bytes
    for span in tiles(matrix(weights.shapes[name])[0], wide):
        size = (span[1] - span[0], row_bytes)
        tile = buffers.get("tile", *size) if feeder is None else feeder.get(*size)
        weights.read(name, span, tile)
        yield span, tile if stored == dtype else convert(tile, stored, dtype, 0.0, name)
        if feeder is not None:
            feeder.put()


def common(a: Span, b: Span) -> Span | None:
    """What two spans share."""
    start, stop = max(a[0], b[0]), min(a[1], b[1])
    return (start, stop) if start < stop else None


def stored_form(place: Place, rows: Span, span: Span, tile: Bytes, dtype: str) -> Bytes:
    """The rows of a tile (rows ``span`` of the tensor in ``dtype``) that a place holds, in its columns and
    format; they may lie apart in memory."""
    item = ITEM_BYTES[dtype]
    left, right = place.piece.cols
    part = tile[rows[0] - span[0] : rows[1] - span[0], left * item : right * item]
    if place.dtype == dtype and not place.shift:
        return part
    return convert(part, dtype, place.dtype, place.shift, f"{place.file}: {place.parameter}")


def put(
    file: OutFile, place: Place, rows: Span, part: Bytes, write: Callable[[OutFile, memoryview, int], None]
) -> None:
    """Write rows of a tensor, in stored form, to a place that is not streamed."""
    start, stride = place.rows_at(rows)
    if part.shape[1] == stride:
        write(file, flat(np.ascontiguousarray(part)), start)
    else:
        for index in range(len(part)):
            write(file, flat(part[index]), start + index * stride)


def take(descriptor: int, place: Place, rows: Span, out: Bytes, folder: Path) -> None:
    """Read rows of a tensor, in stored form, from a place. Raises DataError where the file ends before."""
    start, stride = place.rows_at(rows)
    where = f"{folder / place.file}: {place.parameter}"
    if out.shape[1] == stride or len(out) == 1:
        read_exactly(descriptor, flat(out), start, where)
    else:
        for index in range(len(out)):
            read_exactly(descriptor, flat(out[index]), start + index * stride, where)


def flat(part: Any) -> memoryview:
    """Bytes of a contiguous array."""
    return memoryview(part.reshape(-1))


def large_first(weights: Weights) -> list[str]:
    """Names of the tensors, very large ones before all others, else in their order (which is the files')."""
    size = {name: matrix(shape)[0] * weights.row_bytes(name) for name, shape in weights.shapes.items()}
    return sorted(size, key=lambda name: -(size[name] >> 27))


def hash_spans(
    descriptor: int, spans: Iterable[Span], digest: Any, where: str, buffers: Buffers, count: Count
) -> str:
    """Feed bytes of a file to a hash; its hex digest."""
    block = buffers.get("hash", 1, HASH_BLOCK_BYTES)
    for start, stop in spans:
        for at in range(start, stop, HASH_BLOCK_BYTES):
            view = flat(block)[: min(HASH_BLOCK_BYTES, stop - at)]
            read_exactly(descriptor, view, at, where)
            digest.update(view)
            count(len(view))
    return str(digest.hexdigest())


def sha256_file(path: Path, buffers: Buffers, count: Count) -> dict[str, Any]:
    """Size and SHA-256 of a weight file."""
    descriptor = open_inside(path.parent, path.name)
    try:
        size = os.fstat(descriptor).st_size
        sha256 = hash_spans(descriptor, [(0, size)], hashlib.sha256(), str(path), buffers, count)
    finally:
        os.close(descriptor)
    return {"size": size, "sha256": sha256}
