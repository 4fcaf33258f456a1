"""Best-fit packing: whole documents into samples of one length, with as little padding as can be.

Best-fit decreasing (Johnson 1973): the longest piece first, each into the fullest bin that still holds it.
Pieces of one length are alike, so whole multisets are placed at a time: the work grows with the sequence
length, and numpy does the rest.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_syne.data.tokens.orders import stable_argsort


class Bins(NamedTuple):
    """Bin ``b`` holds the pieces ``starts[b]`` to ``starts[b + 1]``, which stand in the order of documents."""

    starts: NDArray[np.int64]
    documents: NDArray[np.uint32]
    """Document of each piece, as a place in the lengths that were packed."""
    pieces: NDArray[np.uint32]
    """Which piece of it: piece ``k`` begins at token ``k x capacity`` and ends there or where the document does."""


def best_fit(lengths: NDArray[Any], capacity: int) -> Bins:
    """Pack documents of these lengths into bins of ``capacity`` tokens; bins are in the order of their first one.

    A longer document is cut into pieces of ``capacity``; empty ones are left out. A pure function.
    """
    full = (lengths // capacity).astype(np.int64)
    rests = (lengths - full * capacity).astype(np.int64)
    whole_of = np.repeat(np.arange(lengths.size, dtype=np.uint32), full)
    numbers = np.arange(whole_of.size) - np.repeat(np.cumsum(full) - full, full)

    document = np.flatnonzero(rests).astype(np.uint32)
    falling = stable_argsort((capacity - rests[document]).astype(np.uint32))  # longest first
    bin_of = np.empty(document.size, np.uint32)
    bin_of[falling] = _assign(np.bincount(rests[document], minlength=capacity), capacity)
    by_bin = stable_argsort(bin_of)
    document, counts = document[by_bin], np.bincount(bin_of)
    starts = np.cumsum(counts) - counts

    # both kinds of bins in the order of their first documents; of one document, the whole pieces first
    firsts = np.concatenate((whole_of, document[starts]))
    sizes = np.concatenate((np.ones(whole_of.size, np.int64), counts))
    begins = np.concatenate((np.arange(whole_of.size), starts + whole_of.size))
    order = stable_argsort(firsts)
    sizes = sizes[order]
    ends = np.cumsum(sizes)
    source = np.repeat(begins[order] - (ends - sizes), sizes)
    source += np.arange(source.size)
    documents = np.concatenate((whole_of, document))[source]
    pieces = np.concatenate((numbers.astype(np.uint32), full[document].astype(np.uint32)))[source]
    return Bins(np.append(0, ends), documents, pieces)


def _assign(counts: NDArray[np.int64], capacity: int) -> NDArray[np.uint32]:
    """Bin of each piece, pieces sorted from the longest to the shortest; ``counts[s]`` of them have length ``s``."""
    rooms: list[int] = []  # of bins that are not full, ascending
    groups: dict[int, list[tuple[int, int]]] = {}  # room -> (first bin, number of bins)
    placed: list[
        tuple[int, int, int]
    ] = []  # first bin, number of bins, pieces in each: in the order of pieces
    bins = 0

    def leave(first: int, number: int, room: int) -> None:
        if number and room:
            if room not in groups:
                groups[room] = []
                insort(rooms, room)
            groups[room].append((first, number))

    def fill(first: int, number: int, each: int, room: int, size: int) -> None:
        if number and each:
            placed.append((first, number, each))
        leave(first, number, room - each * size)

    for size in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[size])
        while left:
            at = bisect_left(rooms, size)
            # a bin that has just got a piece is now the fullest that holds another, so it gets all it can
            if at == len(rooms):
                room = capacity
                first, number = bins, -(-left // (room // size))
                bins += number
            else:
                room = rooms[at]
                first, number = groups[room].pop()
                if not groups[room]:
                    del groups[room], rooms[at]
            most = room // size
            filled = min(number, left // most)
            fill(first, filled, most, room, size)
            left -= filled * most
            if filled < number:
                last = min(left, most)
                fill(first + filled, 1, last, room, size)
                left -= last
                leave(first + filled + 1, number - filled - 1, room)
    firsts, numbers, each = np.array(placed, np.int64).reshape(-1, 3).T
    totals = numbers * each
    within = np.arange(totals.sum()) - np.repeat(np.cumsum(totals) - totals, totals)
    bin_of: NDArray[np.int64] = np.repeat(firsts, totals) + within // np.repeat(each, totals)
    return bin_of.astype(np.uint32)
