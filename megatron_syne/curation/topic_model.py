"""The topic classifier of one language: logistic regression over hashed n-grams, weighted by tf-idf.

Stored as plain arrays (``.npy``, never pickled), so that labelling needs no more of scikit-learn than its hashing
of words, and a model made by one version of it serves another.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_syne.curation.records import require
from megatron_syne.curation.topic_features import CHARACTERS, COLUMNS, WORDS, count_ngrams
from megatron_syne.errors import DataError

ARRAYS = ("weights", "bias", "idf")
_REGULARISATION = 10.0  # C: rows have length 1, so that 1 is too strong for them
_BATCH = 64  # texts whose n-grams are counted at once: their sort stays in the cache


@dataclass(frozen=True)
class LinearModel:
    """Weights [COLUMNS, topics] (float32), bias [topics] and idf [COLUMNS], for texts cut to ``max_chars``."""

    topics: tuple[str, ...]
    units: str
    max_chars: int
    weights: NDArray[np.float32]
    bias: NDArray[np.float32]
    idf: NDArray[np.float32]

    def probabilities(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """[texts, topics], each row summing to 1; a row depends on its own text alone."""
        rows = [np.zeros((0, len(self.topics)), np.float32)]
        for first in range(0, len(texts), _BATCH):
            cut = [text[: self.max_chars] for text in texts[first : first + _BATCH]]
            features = _weighted(count_ngrams(cut, self.units), self.idf)
            rows.append(_softmax(np.asarray(features @ self.weights) + self.bias))
        return np.concatenate(rows)

    def files(self) -> dict[str, bytes]:
        """Each array as the bytes of a ``.npy`` file."""
        found = {}
        for name in ARRAYS:
            stream = io.BytesIO()
            np.save(stream, getattr(self, name), allow_pickle=False)
            found[name] = stream.getvalue()
        return found


def train_linear(texts: Sequence[str], labels: Sequence[str], units: str, max_chars: int) -> LinearModel:
    """Fit on labelled texts (two topics or more); the same texts in the same order give the same model."""
    require("sklearn", "data")
    from scipy.sparse import vstack
    from sklearn.linear_model import LogisticRegression

    topics = tuple(sorted(set(labels)))
    counts = vstack(
        [
            count_ngrams([text[:max_chars] for text in texts[first : first + _BATCH]], units)
            for first in range(0, len(texts), _BATCH)
        ],
        format="csr",
    )
    # smoothed, as scikit-learn has it: as if one more document held every n-gram
    documents = np.bincount(counts.indices, minlength=COLUMNS)
    idf = (np.log((1 + len(texts)) / (1 + documents)) + 1).astype(np.float32)
    fitted = LogisticRegression(C=_REGULARISATION, max_iter=200).fit(
        _weighted(counts, idf), [topics.index(label) for label in labels]
    )
    weights, bias = fitted.coef_.T, fitted.intercept_
    if len(topics) == 2:  # one column then, of the second topic against the first
        weights, bias = np.hstack([0 * weights, weights]), np.array([0.0, bias[0]])
    return LinearModel(
        topics, units, max_chars, np.ascontiguousarray(weights, np.float32), bias.astype(np.float32), idf
    )


def load_linear(folder: Path, prefix: str, described: Mapping[str, Any], max_chars: int) -> LinearModel:
    """The model of one language out of a folder; DataError where a file is not the one described."""
    topics = described.get("topics")
    if not isinstance(topics, list) or len(topics) < 2 or not all(isinstance(topic, str) for topic in topics):
        raise DataError(f"{folder}/model.json: {prefix}: topics must be a list of at least two names")
    if described.get("units") not in (WORDS, CHARACTERS):
        raise DataError(f"{folder}/model.json: {prefix}: units must be {WORDS} or {CHARACTERS}")
    shapes = {"weights": (COLUMNS, len(topics)), "bias": (len(topics),), "idf": (COLUMNS,)}
    arrays = {}
    for name, shape in shapes.items():
        path = folder / f"{prefix}.{name}.npy"
        data = read_checked(path, described)
        try:
            array = np.load(io.BytesIO(data), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise DataError(f"{path}: no .npy file of numbers: {error}") from None
        if array.shape != shape or array.dtype != np.float32 or not np.isfinite(array).all():
            raise DataError(
                f"{path}: expected finite float32 {list(shape)}, found {array.dtype} {list(array.shape)}"
            )
        arrays[name] = array
    return LinearModel(tuple(topics), described["units"], max_chars, **arrays)


def read_checked(path: Path, described: Mapping[str, Any]) -> bytes:
    """A file's bytes, compared with the hash that ``model.json`` has of it."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: named in model.json, but cannot be read: {error.strerror}") from None
    expected = described.get("sha256", {}).get(path.name)
    if hashlib.sha256(data).hexdigest() != expected:
        raise DataError(f"{path}: is not the file that model.json describes (SHA-256 differs); train it anew")
    return data


def _weighted(counts: Any, idf: NDArray[np.float32]) -> Any:
    """(1 + ln count) * idf, rows scaled to length 1."""
    rows = counts.copy()
    rows.data = (1 + np.log(counts.data)) * idf[counts.indices]
    norms = np.sqrt(np.add.reduceat(np.append(rows.data**2, 0), rows.indptr[:-1].clip(max=rows.nnz)))
    lengths = np.diff(rows.indptr)
    norms[lengths == 0] = 1
    rows.data /= np.repeat(norms, lengths).astype(np.float32)
    return rows


def _softmax(scores: NDArray[Any]) -> NDArray[np.float32]:
    shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
    probabilities: NDArray[np.float32] = (shifted / shifted.sum(axis=1, keepdims=True)).astype(np.float32)
    return probabilities
