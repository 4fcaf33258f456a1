"""``label-topics``: trained, applied and split through the command, every line accounted for."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from pathlib import Path

import labelled
import pytest
import zstandard

from megatron_syne.curation import records, topics
from megatron_syne.curation.records import file_stem
from megatron_syne.errors import CannotCreate, ConfigError, DataError

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("topics")
    data = labelled.write(folder / "labelled.jsonl", labelled.make(360))
    assert labelled.run(topics, "train", "--input", data, "--model", folder / "model") == 0
    return folder / "model"


@pytest.fixture
def unseen(tmp_path: Path) -> tuple[Path, list[dict]]:
    """Documents without their topics, and with them."""
    known = labelled.make(60, seed=7)
    bare = [{"id": one["id"], "text": one["text"], "n": 1.50, "deep": {"a": [1, None]}} for one in known]
    return labelled.write(tmp_path / "unseen.jsonl", bare), known


def counts(path: Path) -> dict:
    """The report's counts; they add up."""
    found = json.loads(path.read_text())["counts"]
    gone = found["blank"] + found["malformed"] + sum(found["dropped"].values())
    assert found["lines"] == found["written"] + gone
    return found


def test_train_reports_what_was_held_out(model: Path, capsys: pytest.CaptureFixture) -> None:
    described = json.loads((model / "model.json").read_text())
    for language in ("en", "zh"):
        one = described["languages"][language]
        assert one["trained_on"] + one["held_out"]["documents"] == 180
        assert one["held_out"]["documents"] == 18, "a tenth of each topic"
        assert one["held_out"]["accuracy"] > 0.9
        assert sum(map(sum, one["held_out"]["confusion"])) == 18
        assert f"{language}: accuracy" in (model / "report.txt").read_text()
    assert described["counts"]["written"] == 360
    assert described["languages"]["zh"]["units"] == "characters"
    assert not [path for path in model.iterdir() if path.suffix not in (".npy", ".json", ".txt")]


def test_the_same_labels_in_any_order_give_the_same_model(model: Path, tmp_path: Path) -> None:
    documents = labelled.make(360)
    random.Random(1).shuffle(documents)
    first = labelled.write(tmp_path / "a.jsonl", documents[:100])
    second = labelled.write(tmp_path / "b.jsonl", documents[100:] + documents[100:110])
    labelled.run(topics, "train", "--input", first, second, "--model", tmp_path / "again")
    for path in model.glob("*.npy"):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name
    assert counts(tmp_path / "again" / "model.json")["dropped"] == {"repeated": 10}


def test_apply_keeps_each_document_and_adds_to_it(
    model: Path, unseen: tuple[Path, list[dict]], tmp_path: Path
) -> None:
    path, known = unseen
    labelled.run(topics, "apply", "--model", model, "--input", path, "--output", tmp_path / "out.jsonl")
    before, after = path.read_bytes().splitlines(), (tmp_path / "out.jsonl").read_bytes().splitlines()
    right = 0
    for old, new, truth in zip(before, after, known, strict=True):
        assert new.startswith(old[:-1]), "the bytes that were there are as they were"
        record = json.loads(new)
        assert list(record)[4:] == ["topic", "topic_probability", "topic_language"]
        assert record["topic_language"] == truth["language"]
        right += record["topic"] == truth["topic"]
    assert right > 54
    report = json.loads((tmp_path / "_out.jsonl.report.json").read_text())
    assert report["model"]["sha256"] == hashlib.sha256((model / "model.json").read_bytes()).hexdigest()
    assert sum(one["documents"] for one in report["topics"]) == 60
    assert counts(tmp_path / "_out.jsonl.report.json")["written"] == 60


def test_workers_and_compression_give_the_same_documents(
    model: Path, unseen: tuple[Path, list[dict]], tmp_path: Path
) -> None:
    path, _ = unseen
    common = ["apply", "--model", model, "--input", path, "--output"]
    labelled.run(topics, *common, tmp_path / "one.jsonl")
    labelled.run(topics, *common, tmp_path / "two.jsonl.zst", "--workers", 2)
    labelled.run(topics, *common, tmp_path / "three.jsonl.gz")
    plain = (tmp_path / "one.jsonl").read_bytes()
    with zstandard.open(tmp_path / "two.jsonl.zst") as stream:
        assert stream.read() == plain
    assert gzip.decompress((tmp_path / "three.jsonl.gz").read_bytes()) == plain


def test_low_confidence_and_unknown_languages_are_other(
    model: Path, unseen: tuple[Path, list[dict]], tmp_path: Path
) -> None:
    path, _ = unseen
    with path.open("a") as stream:
        stream.write('{"text": "Это русский текст о сетях"}\n')
    labelled.run(
        topics, "apply", "--model", model, "--input", path, "--output", tmp_path / "out.jsonl",
        "--min-confidence", 0.9,
    )  # fmt: skip
    found = labelled.read(tmp_path / "out.jsonl")
    assert found[-1]["topic"] == "other" and found[-1]["topic_probability"] == 0
    for one in found:
        assert (one["topic"] == "other") == (one["topic_probability"] < 0.9)
    assert 1 < sum(one["topic"] == "other" for one in found) < 60


def test_one_file_for_each_topic(model: Path, unseen: tuple[Path, list[dict]], tmp_path: Path) -> None:
    path, _ = unseen
    out = tmp_path / "by_topic"
    labelled.run(
        topics, "apply", "--model", model, "--input", path, "--output-dir", out,
        "--split-by", "topic_language", "topic",
    )  # fmt: skip
    found = {one.name: labelled.read(one) for one in out.glob("*.jsonl")}
    assert sorted(found) == [
        "en-computer_science_and_engineering.jsonl",
        "en-history_and_geography.jsonl",
        "en-psychology_and_sociology.jsonl",
        "zh-心理與社會.jsonl",
        "zh-歷史與地理.jsonl",
        "zh-計算機科學.jsonl",
    ]
    assert sum(map(len, found.values())) == counts(out / "_report.json")["written"] == 60
    # the same split of a file that is labelled already, and the folder as an input
    labelled.run(topics, "split", "--input", out, "--split-by", "topic", "--output-dir", tmp_path / "again")
    again = labelled.read(tmp_path / "again" / "計算機科學.jsonl")
    assert again == found["zh-計算機科學.jsonl"]


def test_bad_lines_stop_or_are_set_aside(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    good = b'{"text": "the river and the empire"}\n'
    path.write_bytes(good + b"\n" + b'{"text": 3}\n' + b'{"text": "x\xff"}\n' + b'{"text": "cut')
    common = ["apply", "--model", model, "--input", path, "--output", tmp_path / "out.jsonl"]
    with pytest.raises(DataError, match=r"bad\.jsonl:3:\d+: field 'text' must be a string.*--on-error skip"):
        labelled.run(topics, *common)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["bad.jsonl"]
    labelled.run(topics, *common, "--on-error", "skip")
    found = counts(tmp_path / "_out.jsonl.report.json")
    assert found == {"lines": 5, "written": 1, "blank": 1, "malformed": 3, "dropped": {}}
    aside = labelled.read(tmp_path / "_out.jsonl.quarantine.jsonl")
    assert [one["line"] for one in aside] == [3, 4, 5]
    assert aside[1]["raw"].encode("utf-8", "surrogateescape") == b'{"text": "x\xff"}'


def test_a_field_that_is_there_is_not_written_over(model: Path, tmp_path: Path) -> None:
    path = labelled.write(tmp_path / "in.jsonl", [{"text": "the river", "topic": "mine"}])
    common = ["apply", "--model", model, "--input", path, "--output", tmp_path / "out.jsonl"]
    with pytest.raises(DataError, match=r"in\.jsonl:1:0: has a field 'topic' already.*--topic-key"):
        labelled.run(topics, *common, "--on-error", "skip")
    labelled.run(topics, *common, "--topic-key", "guess")
    assert list(labelled.read(tmp_path / "out.jsonl")[0]) == [
        "text", "topic", "guess", "guess_probability", "guess_language",
    ]  # fmt: skip
    with pytest.raises(CannotCreate, match="exists already"):
        labelled.run(topics, *common, "--topic-key", "guess")


def test_labels_that_cannot_be_learnt_from(tmp_path: Path) -> None:
    def attempt(documents: list[dict]) -> None:
        path = labelled.write(tmp_path / "labels.jsonl", documents)
        labelled.run(topics, "train", "--input", path, "--model", tmp_path / "model")

    few = [{"text": "the river", "topic": "a"}, {"text": "the sea", "topic": "a"}]
    with pytest.raises(DataError, match="en: only the topic 'a'"):
        attempt(few)
    with pytest.raises(DataError, match="en: 'b' has 1"):
        attempt([*few, {"text": "the sky", "topic": "b"}])
    with pytest.raises(
        DataError, match=r"jsonl:3:\d+: the same text has the topic 'a' at .*jsonl:1, and 'b'"
    ):
        attempt([*few, {"text": "the river", "topic": "b"}])
    with pytest.raises(DataError, match="no labelled text"):
        attempt([])
    assert not (tmp_path / "model" / "model.json").exists()


def test_languages_may_stand_in_a_field(tmp_path: Path) -> None:
    documents = labelled.make(120)
    for one in documents:
        one["lang"] = {"en": "English", "zh": "cn"}[one["language"]]
    path = labelled.write(tmp_path / "labels.jsonl", documents)
    labelled.run(topics, "train", "--input", path, "--model", tmp_path / "model", "--language-key", "lang")
    described = json.loads((tmp_path / "model" / "model.json").read_text())
    assert {name: one["units"] for name, one in described["languages"].items()} == {
        "English": "words",
        "cn": "characters",
    }
    # the field is remembered
    labelled.run(
        topics, "apply", "--model", tmp_path / "model", "--input", path, "--topic-key", "found",
        "--output", tmp_path / "out.jsonl",
    )  # fmt: skip
    found = labelled.read(tmp_path / "out.jsonl")
    assert sum(one["found"] == one["topic"] for one in found) > 115
    with pytest.raises(DataError, match="must name a language"):
        bad = labelled.write(tmp_path / "bad.jsonl", [{"text": "x", "topic": "a", "lang": "../zh"}])
        labelled.run(topics, "train", "--input", bad, "--model", tmp_path / "m2", "--language-key", "lang")


@pytest.mark.parametrize(
    "line, whole",
    [
        (b"{}", {"k": "字"}),
        (b' {"a": {"b": 1e400}, "c": "}" } \r\n', {"a": {"b": float("inf")}, "c": "}", "k": "字"}),
    ],
)
def test_fields_are_added_at_the_end(line: bytes, whole: dict) -> None:
    longer = records.with_fields(line, {"k": "字"})
    assert json.loads(longer) == whole and longer.endswith(b"\n")
    assert longer.startswith(line.strip()[:-1].rstrip())
    assert records.with_fields(line, {}) == line.strip() + b"\n"


@pytest.mark.parametrize(
    "name, stem",
    [
        ("Computer Science & Engineering", "computer_science_engineering"),
        ("../../etc/passwd", "etc_passwd"),
        ("計算機科學", "計算機科學"),
        ("a_b", "a_b"),
    ],
)
def test_file_names_of_topics(name: str, stem: str) -> None:
    assert file_stem(name) == stem


def test_names_that_make_no_file_or_the_same_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_FILES", 20)
    for name in ("..", "///", "字" * 41):
        with pytest.raises(DataError, match="no file can be named after it"):
            file_stem(name)
    path = labelled.write(tmp_path / "in.jsonl", [{"topic": "A b"}, {"topic": "a-b"}])
    with pytest.raises(DataError, match="would both be written"):
        labelled.run(topics, "split", "--input", path, "--split-by", "topic", "--output-dir", tmp_path / "o")
    with pytest.raises(DataError, match="more than 20 groups"):
        path = labelled.write(tmp_path / "in.jsonl", [{"topic": f"t{i}"} for i in range(21)])
        labelled.run(topics, "split", "--input", path, "--split-by", "topic", "--output-dir", tmp_path / "o")
    assert not list((tmp_path / "o").iterdir())


def test_wrong_options(tmp_path: Path, model: Path) -> None:
    path = labelled.write(tmp_path / "in.jsonl", [{"text": "x"}])
    for options, said in [
        (["train", "--input", path, "--model", tmp_path / "m", "--held-out", 0.9], "--held-out"),
        (
            ["apply", "--model", model, "--input", path, "--output", tmp_path / "o.parquet"],
            "written as .jsonl",
        ),
        (["apply", "--model", model, "--input", path], "either --output"),
        (["split", "--input", path, "--output", tmp_path / "o.jsonl"], "--split-by FIELD"),
    ]:
        with pytest.raises(ConfigError, match=said):
            labelled.run(topics, *options)


def test_real_texts(shared_data: Path, tmp_path: Path) -> None:
    """Verse, and sums in words: told apart on documents that were held out."""
    documents = []
    for name in ("book-en", "math-en"):
        lines = (shared_data / "corpus" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        documents += [json.loads(line) for line in lines[:300]]
    path = labelled.write(tmp_path / "real.jsonl", documents)
    labelled.run(
        topics, "train", "--input", path, "--label-key", "source", "--model", tmp_path / "model",
        "--held-out", 0.3,
    )  # fmt: skip
    described = json.loads((tmp_path / "model" / "model.json").read_text())
    assert described["languages"]["en"]["held_out"]["accuracy"] > 0.97
