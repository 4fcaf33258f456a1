from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_syne.data.tokens.packing import best_fit


def plain_best_fit_decreasing(lengths: list[int], capacity: int) -> Counter[int]:
    """Room left in each bin, by the textbook: one piece after another."""
    pieces = [capacity for length in lengths for _ in range(length // capacity)]
    pieces += [length % capacity for length in lengths if length % capacity]
    rooms: list[int] = []
    for piece in sorted(pieces, reverse=True):
        fitting = [room for room in rooms if room >= piece]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - piece)
    return Counter(rooms)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 60), max_size=80), st.integers(1, 40))
def test_it_is_best_fit_decreasing_and_holds_every_token_once(lengths: list[int], capacity: int) -> None:
    bins = best_fit(np.array(lengths, np.int32), capacity)
    rooms: Counter[int] = Counter()
    tokens: Counter[tuple[int, int]] = Counter()
    firsts = []
    for begin, end in zip(bins.starts[:-1].tolist(), bins.starts[1:].tolist(), strict=True):
        inside = list(zip(bins.documents[begin:end].tolist(), bins.pieces[begin:end].tolist(), strict=True))
        assert inside == sorted(inside) and inside
        firsts.append(inside[0])
        room = capacity
        for document, piece in inside:
            stop = min(lengths[document], (piece + 1) * capacity)
            tokens.update((document, token) for token in range(piece * capacity, stop))
            room -= stop - piece * capacity
        assert room >= 0
        rooms[room] += 1
    assert firsts == sorted(firsts)
    assert rooms == plain_best_fit_decreasing(lengths, capacity)
    assert tokens == Counter(
        (number, token) for number, length in enumerate(lengths) for token in range(length)
    )


@pytest.mark.parametrize("capacity", [512, 200_000])
def test_many_documents_at_once(capacity: int) -> None:
    lengths = np.maximum(1, np.random.default_rng(0).lognormal(5, 1, 200_000)).astype(np.int32)
    bins = best_fit(lengths, capacity)
    assert int(lengths.sum()) / ((bins.starts.size - 1) * capacity) > 0.995
    whole = np.minimum(lengths[bins.documents] - bins.pieces.astype(np.int64) * capacity, capacity)
    assert whole.min() > 0 and whole.sum() == lengths.sum()
    assert np.add.reduceat(whole, bins.starts[:-1]).max() <= capacity
