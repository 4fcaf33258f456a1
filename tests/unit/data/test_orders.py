from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_syne.data.tokens import orders
from megatron_syne.data.tokens.orders import ordered_by, permutation, stable_argsort, subset


def test_the_shuffle_is_the_same_on_every_machine() -> None:
    order = permutation(1000, 1234, "zh_web", 2)
    assert order[:8].tolist() == [764, 310, 68, 786, 342, 492, 733, 530]
    assert hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()[:16] == "cea6f606b48f09a5"


def test_epochs_seeds_and_names_shuffle_differently() -> None:
    found = [permutation(80, *key) for key in ((1, "x", 0), (1, "x", 1), (2, "x", 0), (1, "y", 0))]
    assert len({order.tobytes() for order in found}) == 4
    assert all(sorted(order.tolist()) == list(range(80)) for order in found)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 500])
def test_a_shuffle_in_parts_is_the_same_shuffle(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = permutation(count, 5, "x", 0)
    monkeypatch.setattr(orders, "_MOST_AT_ONCE", 16)
    monkeypatch.setattr(orders, "_BLOCK", 7)
    assert np.array_equal(permutation(count, 5, "x", 0), whole)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from([0, 1, 2, 65535, 65536, 65537, 2**31, 2**32 - 1])), st.integers(0, 2**32 - 1))
def test_sorting_by_radix_is_numpys_stable_sort(keys: list[int], low: int) -> None:
    values = np.array(keys, np.uint32)
    assert np.array_equal(stable_argsort(values), np.argsort(values, kind="stable"))
    # words that agree in their upper half are told apart by the lower one
    words = (values.astype(np.uint64) << np.uint64(32)) | (np.arange(len(keys), dtype=np.uint64) * low % 11)
    assert np.array_equal(orders._sorted_indices(words), np.argsort(words, kind="stable"))


def test_numbers_are_sorted_as_numbers_and_equal_ones_stay_in_the_order_of_the_file() -> None:
    assert ordered_by(np.array([10.0, 9.5, 100.0, 9.5, -1.0])).tolist() == [4, 1, 3, 0, 2]


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(-3, 3)), min_size=1, max_size=30),
    st.one_of(st.none(), st.integers(1, 100)),
    st.one_of(st.none(), st.sampled_from([0.1, 0.25, 0.5, 1.0])),
    st.booleans(),
)
def test_subsets_are_the_fewest_whole_documents(
    documents: list[tuple[int, int]], first: int | None, share: float | None, highest: bool
) -> None:
    lengths = np.array([length for length, _ in documents], np.int32)
    values = np.array([value for _, value in documents], np.float64)
    expected = list(range(len(documents)))
    if first is not None:
        expected = next((expected[: n + 1] for n in expected if lengths[: n + 1].sum() >= first), expected)
    if share is not None:
        best = sorted(expected, key=lambda n: -values[n] if highest else values[n])
        target = share * lengths[expected].sum()
        taken = next(n for n in range(1, len(best) + 1) if lengths[best[:n]].sum() >= target)
        expected = sorted(best[:taken])
    found = subset(lengths, first, share, values, highest)
    assert (list(range(len(documents))) if found is None else found.tolist()) == expected
