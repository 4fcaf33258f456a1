"""Source files that are read from end to end once, for their own hash and for the tensors in them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Any

from megatron_syne.convert.feeder import Feeder
from megatron_syne.convert.files import read_exactly
from megatron_syne.convert.pieces import matrix
from megatron_syne.convert.slices import places_by_file
from megatron_syne.convert.streams import Place, StoredWeights, Weights
from megatron_syne.convert.tiles import TILE_BYTES, Buffers, Count, flat, read_tiles

Carry = Callable[[str, Buffers, Count, Feeder], None]
"""Convert a tensor, and feed its bytes as they are read."""


def whole_tensor_files(weights: Weights) -> dict[str, list[Place]]:
    """Of each source file whose tensors lie in it whole, their places in order; other files are left out."""
    if not isinstance(weights, StoredWeights):
        return {}
    found = places_by_file(p for own in (weights.places, weights.replicas) for ps in own.values() for p in ps)
    return {file: places for file, places in found.items() if all(_is_whole(weights, p) for p in places)}


def _is_whole(weights: StoredWeights, place: Place) -> bool:
    name = place.piece.source
    rows, columns = matrix(weights.shapes[name])
    return (
        weights.places[name] == [place]
        and (place.piece.rows, place.piece.cols, place.piece.at) == ((0, rows), (0, columns), (0, 0))
        and (place.columns, place.dtype, place.shift) == (columns, weights.dtypes[name], 0.0)
    )


def read_file(
    weights: StoredWeights, file: str, places: list[Place], carry: Carry, buffers: Buffers, count: Count
) -> dict[str, Any]:
    """Size and SHA-256 of a source file; each of its tensors is handed to ``carry`` on the way."""
    descriptor, where = weights.descriptors[file], str(weights.folder / file)
    size = os.fstat(descriptor).st_size
    feeder = Feeder(hashlib.sha256())

    def feed(start: int, stop: int) -> None:
        for at in range(start, stop, TILE_BYTES):
            block = feeder.get(1, min(TILE_BYTES, stop - at))
            read_exactly(descriptor, flat(block), at, where)
            feeder.put()

    try:
        at = 0
        for place in places:
            feed(at, place.offset)  # the header, and what is not of the model
            carry(place.piece.source, buffers, count, feeder)
            at = place.offset + place.piece.rows[1] * weights.row_bytes(place.piece.source)
        feed(at, size)
    finally:
        sha256 = feeder.close()
    return {"size": size, "sha256": sha256}


def feed_only(weights: Weights, name: str, buffers: Buffers, count: Count, feeder: Feeder) -> None:
    """Feed a tensor that is converted already."""
    for _ in read_tiles(weights, name, weights.dtypes[name], buffers, feeder):
        count(0)
