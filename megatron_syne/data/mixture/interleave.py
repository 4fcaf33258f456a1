"""In which order the samples of several sources stand: a pure function of how many each one has. No torch.

Sainte-Lague's method (of odd numbers): with ``n`` of ``N`` samples, a source has its ``j``-th sample at the
ideal place ``(2j + 1) N / (2n)``; samples stand in the order of their ideal places. So every prefix holds
each source in its share (it is off by at most ``(1 + share x number of sources) / 2`` samples), and any
stretch can be computed by itself: nothing is stored per sample. In whole numbers and correctly rounded
divisions: the same on every machine.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

MOST_SAMPLES = 2**31 - 1
"""Of one pattern: keeps (2j + 1) N within 63 bits."""

_WINDOW = 1 << 13


def place(counts: tuple[int, ...], position: int) -> tuple[int, int]:
    """(source, index within the source) of the sample at a position; ``counts`` = samples of each source."""
    window, offset = _window_of(counts, position)
    source_of, index_of = _window(counts, window)
    return int(source_of[offset]), int(index_of[offset])


def counts_before(counts: tuple[int, ...], position: int) -> tuple[int, ...]:
    """How many of the first ``position`` samples each source has."""
    if position == sum(counts):
        return counts
    window, offset = _window_of(counts, position)
    inside = np.bincount(_window(counts, window)[0][:offset], minlength=len(counts))
    before = _places_before(counts, window * _WINDOW)[1]
    return tuple(whole + int(part) for whole, part in zip(before, inside, strict=True))


def _window_of(counts: tuple[int, ...], position: int) -> tuple[int, int]:
    window = position // _WINDOW  # off by a few samples at most: ideal places are one sample apart on average
    while position < _places_before(counts, window * _WINDOW)[0]:
        window -= 1
    while position >= _places_before(counts, (window + 1) * _WINDOW)[0]:
        window += 1
    return window, position - _places_before(counts, window * _WINDOW)[0]


@lru_cache(maxsize=1024)
def _places_before(counts: tuple[int, ...], limit: int) -> tuple[int, tuple[int, ...]]:
    """How many samples have their ideal place before ``limit``: of all sources, and of each."""
    total = sum(counts)
    # (2j + 1) total < 2 count limit, solved for the number of such j >= 0
    each = tuple(min(count, ((2 * count * limit - 1) // total + 1) // 2) for count in counts)
    return sum(each), each


@lru_cache(maxsize=8)
def _window(counts: tuple[int, ...], window: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Samples whose ideal place lies in one window of ``_WINDOW`` places, in order."""
    total = sum(counts)
    begins = _places_before(counts, window * _WINDOW)[1]
    ends = _places_before(counts, (window + 1) * _WINDOW)[1]
    sources, indices, wholes, fractions = [], [], [], []
    for source, (count, begin, end) in enumerate(zip(counts, begins, ends, strict=True)):
        if begin == end:
            continue
        index = np.arange(begin, end, dtype=np.int64)
        whole, rest = np.divmod((2 * index + 1) * total, 2 * count)
        sources.append(np.full(end - begin, source, dtype=np.int32))
        indices.append(index)
        wholes.append(whole)
        fractions.append(rest / (2 * count))
    source_of, index_of = np.concatenate(sources), np.concatenate(indices)
    order = np.lexsort((source_of, np.concatenate(fractions), np.concatenate(wholes)))
    return source_of[order], index_of[order]
