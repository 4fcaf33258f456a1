"""Texts to rows of n-gram counts in a fixed number of columns, found by hashing: nothing is learnt, no vocabulary.

Where words are parted by spaces: words and pairs of words, by scikit-learn. Chinese: runs of one, two and three
characters, hashed here for a whole batch at once (scikit-learn's own character n-grams are made one Python string
at a time, ten times slower: benchmarks/topics.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_syne.curation.records import require

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

WORDS, CHARACTERS = "words", "characters"
COLUMNS = 1 << 18
_LONGEST_RUN = 3
# Odd 64-bit multipliers (2^64 / golden ratio, and the finaliser of MurmurHash3): any good mixing does.
_STEP, _MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xFF51AFD7ED558CCD)


def count_ngrams(texts: Sequence[str], units: str) -> csr_matrix:
    """Counts [texts, COLUMNS] (float32) of the n-grams of each text; empty texts give empty rows."""
    return _words(texts) if units == WORDS else _characters(texts)


def _words(texts: Sequence[str]) -> Any:
    require("sklearn", "data")
    from sklearn.feature_extraction.text import HashingVectorizer

    vectorizer = HashingVectorizer(
        n_features=COLUMNS, ngram_range=(1, 2), alternate_sign=False, norm=None, dtype=np.float32
    )
    return vectorizer.transform(texts)


def _characters(texts: Sequence[str]) -> Any:
    from scipy.sparse import csr_matrix

    lowered = [text.lower() for text in texts]
    codes = np.frombuffer("".join(lowered).encode("utf-32-le"), np.uint32).astype(np.uint64)
    ends = np.cumsum([len(text) for text in lowered], dtype=np.int64)
    rows = np.repeat(np.arange(len(lowered), dtype=np.int64), np.diff(ends, prepend=0))
    places: list[NDArray[np.int64]] = []
    hashed = np.zeros(len(codes), np.uint64)
    for length in range(1, _LONGEST_RUN + 1):
        last = length - 1  # the run that ends `last` places after its first character
        starts = len(codes) - last
        if starts <= 0:
            break
        hashed = (hashed[:starts] + codes[last:] + np.uint64(length)) * _STEP
        mixed = (hashed ^ (hashed >> np.uint64(29))) * _MIX
        columns = (mixed >> np.uint64(64 - 18)).astype(np.int64)
        row = rows[:starts]
        places.append((row * COLUMNS + columns)[row == rows[last:]])
    together = np.concatenate(places) if places else np.zeros(0, np.int64)
    found, counts = np.unique(together, return_counts=True)
    begins = np.searchsorted(found, np.arange(len(lowered) + 1, dtype=np.int64) * COLUMNS)
    matrix = csr_matrix(
        (counts.astype(np.float32), (found % COLUMNS).astype(np.int32), begins.astype(np.int32)),
        shape=(len(lowered), COLUMNS),
    )
    matrix.has_sorted_indices = True
    return matrix
