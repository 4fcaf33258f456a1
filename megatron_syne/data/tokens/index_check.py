"""The checks of an index that read the whole of it, in blocks: 16 MB of memory whatever its size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_syne.errors import DataError

_BLOCK = 1 << 20
_LONGEST_DOCUMENT = 2**31 - 1
_MOST_DOCUMENTS = 2**32 - 1


@dataclass(frozen=True)
class IndexArrays:
    """The three arrays of an ``.idx`` file, and the size of a token in bytes."""

    lengths: NDArray[Any]
    pointers: NDArray[Any]
    bounds: NDArray[Any]
    itemsize: int


def check_index(arrays: IndexArrays, idx: Path, bin_: Path, bin_bytes: int) -> dict[str, Any]:
    """Tokens and documents of an index, and whether each document is one sequence; DataError where damaged.

    Lengths and pointers say the same thing twice: any single damage shows as a contradiction.
    """
    lengths, pointers, bounds, item = arrays.lengths, arrays.pointers, arrays.bounds, arrays.itemsize
    at = 0
    for begin in range(0, lengths.size, _BLOCK):
        block = lengths[begin : begin + _BLOCK].astype(np.int64)
        if int(block.min()) < 0:
            raise DataError(f"{idx}: sequence {begin + int(block.argmin())} has a negative length; damaged")
        starts = at + np.cumsum(block) * item - block * item
        wrong = np.flatnonzero(pointers[begin : begin + _BLOCK] != starts)
        if wrong.size:
            first = int(wrong[0])
            raise DataError(
                f"{idx}: sequence {begin + first} points to byte {int(pointers[begin + first])}, but the "
                f"sequences before it end at {int(starts[first])}; damaged, prepare it again"
            )
        at = int(starts[-1]) + int(block[-1]) * item
    if at != bin_bytes:
        raise DataError(
            f"{bin_}: {bin_bytes} bytes, but its index describes {at}: truncated, or the two files are not a "
            f"pair; prepare them again"
        )
    if at == 0:
        raise DataError(f"{bin_}: holds no token")
    plain = _check_bounds(bounds, lengths.size, idx)
    if bounds.size - 1 > _MOST_DOCUMENTS:
        raise DataError(f"{idx}: {bounds.size - 1} documents; cut the source into parts of {_MOST_DOCUMENTS}")
    return {"documents": int(bounds.size) - 1, "tokens": at // item, "plain": plain}


def _check_bounds(bounds: NDArray[Any], sequences: int, idx: Path) -> bool:
    """Whether the boundaries are 0, 1, 2, ...: each sequence a document."""
    wrong = DataError(f"{idx}: document boundaries must rise from 0 to {sequences}; damaged")
    if bounds.size < 2 or bounds[0] != 0 or bounds[-1] != sequences:
        raise wrong
    plain = bounds.size == sequences + 1
    for begin in range(0, bounds.size, _BLOCK):
        block = bounds[begin : begin + _BLOCK + 1]  # one more: steps between blocks count too
        if np.any(block[1:] < block[:-1]):
            raise wrong
        plain = plain and bool(np.array_equal(block, np.arange(begin, begin + block.size)))
    return plain


def document_extents(arrays: IndexArrays) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First token and length of each document where one has several sequences (other tools' sentences)."""
    ends = np.append(arrays.pointers, arrays.pointers[-1] + arrays.lengths[-1] * arrays.itemsize)
    starts = ends[arrays.bounds] // arrays.itemsize
    lengths = np.diff(starts)
    if lengths.size and int(lengths.max()) > _LONGEST_DOCUMENT:
        raise DataError(f"document {int(lengths.argmax())} has more than {_LONGEST_DOCUMENT} tokens")
    return starts[:-1], lengths
