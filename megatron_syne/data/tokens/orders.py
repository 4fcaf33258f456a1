"""Which documents of a source are read, and in which order: pure functions of lengths, numbers and a seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Documents = NDArray[np.uint32]
"""Numbers of documents; a source has fewer than 2^32 of them."""

_MOST_AT_ONCE = 1 << 23
_BLOCK = 1 << 20


def permutation(count: int, seed: int, name: str, epoch: int) -> Documents:
    """A random order of ``count`` things, from a hash of the other arguments.

    It is the stable sort of raw words of Philox, and not ``Generator.permutation``: numpy promises the former the
    same in every version, the latter not. Memory: about 40 bytes x 2^23 beside the result, whatever the count.
    """
    digest = hashlib.sha256(json.dumps([seed, name, epoch]).encode("utf-8")).digest()
    key = np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)
    bits = max(count // _MOST_AT_ONCE, 0).bit_length()
    if bits == 0:
        return _sorted_indices(np.random.Philox(key=key).random_raw(count))
    order = np.empty(count, np.uint32)
    filled = 0
    for part in range(1 << bits):  # the words are made again for each part of their range, and sorted in it
        words, numbers = [], []
        source = np.random.Philox(key=key)
        for begin in range(0, count, _BLOCK):
            block = source.random_raw(min(_BLOCK, count - begin))
            mine = np.flatnonzero(block >> np.uint64(64 - bits) == np.uint64(part))
            words.append(block[mine])
            numbers.append((mine + begin).astype(np.uint32))
        here = _sorted_indices(np.concatenate(words))
        order[filled : filled + here.size] = np.concatenate(numbers)[here]
        filled += here.size
    return order


def _sorted_indices(words: NDArray[np.uint64]) -> Documents:
    """``argsort(words, kind="stable")`` at a quarter of its time, for words that are random.

    Two passes order by the upper 32 bits, in which few words agree; those few are then put right by the whole word.
    """
    order = stable_argsort((words >> np.uint64(32)).astype(np.uint32))
    upper_half = (words >> np.uint64(32)).astype(np.uint32)[order]
    same = upper_half[1:] == upper_half[:-1]
    places = np.flatnonzero(np.append(same, False) | np.append(False, same)) if same.size else same
    if places.size:
        those = np.sort(order[places])
        order[places] = those[np.argsort(words[those], kind="stable")]
    return order


def stable_argsort(keys: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """``argsort(keys, kind="stable")`` of 32-bit numbers; numpy has a radix sort, and only of 16-bit ones."""
    order = np.argsort(keys.astype(np.uint16), kind="stable").astype(np.uint32)
    upper = (keys >> np.uint32(16)).astype(np.uint16)
    return order[np.argsort(upper[order], kind="stable")]


def ordered_by(values: NDArray[np.float64]) -> Documents:
    """Documents from the lowest number to the highest; equal ones as they stand in the file."""
    return np.argsort(values, kind="stable").astype(np.uint32)


def subset(
    lengths: NDArray[Any],
    first_tokens: int | None = None,
    top_fraction: float | None = None,
    values: NDArray[np.float64] | None = None,
    highest: bool = True,
) -> Documents | None:
    """Documents that are used, in the order of the file; None = all of them.

    ``first_tokens``: whole documents from the first on, until they hold that many tokens. ``top_fraction``: of
    these the best by ``values``, until they hold that share of their tokens; of equal ones the earlier.
    """
    count = lengths.size
    if first_tokens is not None:
        count = _documents_holding(lambda begin, end: lengths[begin:end], count, first_tokens)
    if top_fraction is None:
        return None if count == lengths.size else np.arange(count, dtype=np.uint32)
    assert values is not None
    best = ordered_by(-values[:count] if highest else values[:count])
    total = int(np.sum(lengths[:count], dtype=np.int64))
    taken = _documents_holding(lambda begin, end: lengths[best[begin:end]], count, top_fraction * total)
    return np.sort(best[:taken])


def _documents_holding(lengths_of: Callable[[int, int], NDArray[Any]], count: int, tokens: float) -> int:
    """The fewest documents from the first on that hold at least ``tokens``; all where they hold fewer."""
    held = 0
    for begin in range(0, count, _BLOCK):
        ends = held + np.cumsum(lengths_of(begin, min(begin + _BLOCK, count)), dtype=np.int64)
        if ends[-1] >= tokens:
            return begin + int(np.searchsorted(ends, tokens, side="left")) + 1
        held = int(ends[-1])
    return count
