"""What a model is asked: every token predicted once, batches of bounded size."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_syne.curation.perplexity_windows import batches_of, padded_rows, windows_of


def test_windows_of_a_document() -> None:
    def lists(ids, bos, context, first=None):
        return [window.tolist() for window in windows_of(ids, bos, context, first)]

    assert lists([5, 6, 7], 1, 8) == [[1, 5, 6, 7]]
    assert lists([5, 6, 7, 8, 9], 1, 2) == [[1, 5, 6], [6, 7, 8], [8, 9]]
    assert lists([5, 6, 7], None, 8) == [[5, 6, 7]]
    assert lists([5, 6, 7, 8], 1, 8, 2) == [[1, 5, 6]]
    assert lists([], 1, 8) == []
    assert lists([5], 1, 8) == [[1, 5]]
    assert lists([5], None, 8) == [], "nothing stands before it"
    assert lists(np.array([5, 6], dtype=np.uint32), 1, 8) == [[1, 5, 6]]


@given(st.integers(1, 200), st.integers(1, 20), st.booleans())
@settings(deadline=None, max_examples=60)
def test_every_token_is_predicted_once(count: int, context: int, with_bos: bool) -> None:
    ids = list(range(10, 10 + count))
    windows = windows_of(ids, 1 if with_bos else None, context)
    predicted = [token for window in windows for token in window[1:].tolist()]
    assert predicted == (ids if with_bos else ids[1:])
    assert all(2 <= len(window) <= context + 1 for window in windows)


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 120), st.integers(1, 6))
@settings(deadline=None, max_examples=60)
def test_batches_hold_each_window_once(lengths: list[int], batch_tokens: int, alike: int) -> None:
    batches = batches_of(lengths, batch_tokens, alike)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(lengths)))
    for rows, length in batches:
        assert length == max(lengths[row] for row in rows)
        each = -(-len(rows) // alike)
        assert each == 1 or each * length <= batch_tokens
    longest = [batch.length for batch in batches]
    assert longest == sorted(longest, reverse=True)


def test_padding_is_on_the_right_and_has_no_label() -> None:
    both = padded_rows([np.array([1, 5, 6]), np.array([1, 7])], 3, 4)
    assert both[0].tolist() == [[1, 5, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert both[1].tolist() == [[5, 6, -1, -1], [7, -1, -1, -1], [-1, -1, -1, -1]]
