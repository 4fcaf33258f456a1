"""The linear classifier against scikit-learn's own pipeline, and what its stored form refuses."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from pathlib import Path

import labelled
import numpy as np
import pytest

from megatron_syne.curation import topic_scores
from megatron_syne.curation.labelling import load_labeller
from megatron_syne.curation.languages import language_of
from megatron_syne.curation.topic_features import CHARACTERS, COLUMNS, WORDS, count_ngrams
from megatron_syne.curation.topic_model import train_linear
from megatron_syne.errors import DataError, MissingInput

pytest.importorskip("sklearn")

TEXTS = {
    language: [(one["text"], one["topic"]) for one in labelled.make(240) if one["language"] == language]
    for language in ("en", "zh")
}


def test_probabilities_are_scikit_learns() -> None:
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    texts, topics = zip(*TEXTS["en"], strict=True)
    judge = make_pipeline(
        HashingVectorizer(n_features=COLUMNS, ngram_range=(1, 2), alternate_sign=False, norm=None),
        TfidfTransformer(sublinear_tf=True),
        LogisticRegression(C=10, max_iter=200, tol=1e-6),
    ).fit(texts[:90], topics[:90])
    model = train_linear(texts[:90], topics[:90], WORDS, 1000)
    assert list(model.topics) == list(judge.classes_)
    unseen = [*texts[90:], "nothing that was ever seen here xyzzy", ""]
    np.testing.assert_allclose(model.probabilities(unseen), judge.predict_proba(unseen), atol=2e-3)


def test_two_topics() -> None:
    chosen = [(text, topic) for text, topic in TEXTS["zh"] if topic != "歷史與地理"]
    texts, topics = zip(*chosen, strict=True)
    model = train_linear(texts[:60], topics[:60], CHARACTERS, 1000)
    found = model.probabilities(texts[60:])
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)
    assert [model.topics[i] for i in found.argmax(axis=1)] == list(topics[60:])


def test_character_ngrams_are_counted_and_end_with_their_text() -> None:
    texts = ["北京大学北京", "", "A京", "京", "𠀀𠀀𠀀"]
    rows = count_ngrams(texts, CHARACTERS)
    for text, row in zip(texts, rows, strict=True):
        lowered = text.lower()
        grams = Counter(lowered[i : i + n] for n in (1, 2, 3) for i in range(len(lowered) - n + 1))
        assert sorted(row.data) == sorted(grams.values()), text
    alone = count_ngrams(["京"], CHARACTERS)
    assert (rows[3] != alone).nnz == 0, "a row depends on its own text alone"
    assert rows[2].indices.tolist() != rows[3].indices.tolist()
    assert count_ngrams([""], CHARACTERS).nnz == 0


@pytest.mark.parametrize("units, language", [(WORDS, "en"), (CHARACTERS, "zh")])
def test_a_row_does_not_depend_on_its_batch(units: str, language: str) -> None:
    texts, topics = zip(*TEXTS[language], strict=True)
    model = train_linear(texts[:60], topics[:60], units, 1000)
    together = model.probabilities(texts)
    np.testing.assert_array_equal(together[70:71], model.probabilities(texts[70:71]))


def test_only_the_first_characters_count() -> None:
    texts, topics = zip(*TEXTS["en"], strict=True)
    model = train_linear(texts, topics, WORDS, 40)
    long = texts[0][:40] + " therapy emotion" * 50
    np.testing.assert_array_equal(model.probabilities([long]), model.probabilities([texts[0][:40]]))


def test_scores_are_scikit_learns() -> None:
    from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support

    topics = ["a", "b", "c", "never"]
    rng = np.random.default_rng(0)
    truth = [topics[i] for i in rng.integers(0, 3, 200)]
    found = [t if rng.random() < 0.7 else topics[rng.integers(0, 3)] for t in truth]
    scores = topic_scores.score(topics, truth, found)
    assert scores["confusion"] == confusion_matrix(truth, found, labels=topics).tolist()
    assert scores["macro_f1"] == round(f1_score(truth, found, average="macro"), 4)
    precision, recall, _, support = precision_recall_fscore_support(truth, found, labels=topics[:3])
    for i, topic in enumerate(topics[:3]):
        one = scores["topics"][topic]
        assert (one["precision"], one["recall"]) == (round(precision[i], 4), round(recall[i], 4))
        assert one["documents"] == support[i]
    assert scores["topics"]["never"] == {"documents": 0, "precision": None, "recall": None}
    assert "never" in topic_scores.describe("en", scores)


@pytest.mark.parametrize(
    "text, language",
    [
        ("The quick brown fox", "en"),
        ("Où est la bibliothèque?", "en"),
        ("今天天氣很好", "zh"),
        ("使用 Python 和 TensorFlow 訓練一個深度學習模型，並部署到 Kubernetes 集群", "zh"),
        ("He said 你好 and left the room", "en"),
        ("これは日本語の文章です。漢字もあります。", "unknown"),
        ("Это русский текст", "unknown"),
        ("12345 !!!", "unknown"),
        ("", "unknown"),
    ],
)
def test_language_by_script(text: str, language: str) -> None:
    assert language_of(text) == language


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from megatron_syne.curation import topics

    folder = tmp_path_factory.mktemp("topics")
    data = labelled.write(folder / "labelled.jsonl", labelled.make(120))
    assert labelled.run(topics, "train", "--input", data, "--model", folder / "model") == 0
    return folder / "model"


def damaged(model_dir: Path, tmp_path: Path, name: str, data: bytes, *, hashed: bool) -> Path:
    """A copy of the model with one file replaced; ``hashed``: ``model.json`` agrees with it."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in model_dir.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / name).write_bytes(data)
    if hashed:
        described = json.loads((copy / "model.json").read_text())
        described["languages"][name[:2]]["sha256"][name] = hashlib.sha256(data).hexdigest()
        (copy / "model.json").write_text(json.dumps(described))
    return copy


def as_npy(array: np.ndarray, pickled: bool = False) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=pickled)
    return stream.getvalue()


@pytest.mark.parametrize(
    "name, data, hashed, said",
    [
        ("en.bias.npy", as_npy(np.zeros(3, np.float32)), False, "SHA-256"),
        (
            "en.bias.npy",
            as_npy(np.array([print, 1, 2], object), pickled=True),
            True,
            "no .npy file of numbers",
        ),
        ("en.bias.npy", as_npy(np.zeros(2, np.float32)), True, "expected finite float32"),
        ("en.bias.npy", as_npy(np.array([0, np.nan, 0], np.float32)), True, "expected finite float32"),
        ("zh.idf.npy", b"", True, "no .npy file of numbers"),
        ("model.json", b"{}", False, "is no topic model"),
        ("model.json", b"[1", False, "cannot be read"),
    ],
)
def test_a_damaged_model_is_refused(
    model_dir: Path, tmp_path: Path, name: str, data: bytes, hashed: bool, said: str
) -> None:
    load_labeller(model_dir)
    with pytest.raises(DataError, match=said):
        load_labeller(damaged(model_dir, tmp_path, name, data, hashed=hashed))


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match=r"model\.json"):
        load_labeller(tmp_path)


def test_a_language_with_slashes_in_it_is_refused(model_dir: Path, tmp_path: Path) -> None:
    described = json.loads((model_dir / "model.json").read_text())
    described["languages"] = {"../../en": described["languages"]["en"]}
    data = json.dumps(described).encode()
    with pytest.raises(DataError, match="no name of a language"):
        load_labeller(damaged(model_dir, tmp_path, "model.json", data, hashed=False))
