"""``order``: against ``sorted``, at a hundred thousand documents, out of every kind of input."""

from __future__ import annotations

import gzip
import json
import random
from fractions import Fraction
from pathlib import Path

import labelled
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_syne.curation import order_index, ordering
from megatron_syne.errors import ConfigError, DataError


def scored(number: int, seed: int = 0) -> list[dict]:
    """Documents with perplexities, of which many are equal."""
    chance = random.Random(seed)
    return [
        {"id": i, "perplexity": round(chance.lognormvariate(2, 1), 1), "topic": f"t{chance.randrange(3)}"}
        for i in range(number)
    ]


def ordered(path: Path, out: Path, *options: object) -> list[dict]:
    labelled.run(ordering, "--input", path, "--output", out, *options)
    return labelled.read(out)


def test_a_hundred_thousand_documents(tmp_path: Path) -> None:
    documents = scored(100_000)
    path = labelled.write(tmp_path / "in.jsonl", documents)
    found = ordered(path, tmp_path / "out.jsonl")
    assert found == sorted(documents, key=lambda one: one["perplexity"])
    report = json.loads((tmp_path / "_out.jsonl.report.json").read_text())
    assert report["counts"] == {
        "lines": 100_000,
        "written": 100_000,
        "blank": 0,
        "malformed": 0,
        "dropped": {},
    }


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(0, 5)),
    st.fractions(0, Fraction(2, 5)),
    st.fractions(0, Fraction(2, 5)),
    st.integers(1, 7),
    st.booleans(),
)
def test_place(values: list[int], low: Fraction, high: Fraction, buckets: int, as_given: bool) -> None:
    way = ordering.GIVEN if as_given else ordering.SORTED
    placed = ordering.place(np.array(values, float), low, high, buckets, way)
    ranked = sorted(range(len(values)), key=lambda i: (values[i], i))
    assert placed.dropped_lowest == int(len(values) * low) and placed.dropped_highest == int(
        len(values) * high
    )
    kept = ranked[placed.dropped_lowest : len(ranked) - placed.dropped_highest]
    bucket_of = {place: rank * buckets // len(kept) for rank, place in enumerate(kept)}
    expected = sorted(kept, key=lambda i: (bucket_of[i], i)) if as_given else kept
    assert placed.places.tolist() == expected
    assert placed.buckets.tolist() == [bucket_of[i] for i in expected]
    sizes = np.bincount(placed.buckets, minlength=buckets)
    assert sizes.max() - sizes.min() <= 1


def test_shares_are_counted_exactly() -> None:
    """0.29 of 100 is 29, though 0.29 * 100 < 29 in floating point."""
    assert ordering.place(np.arange(100.0), Fraction("0.29")).dropped_lowest == 29


def test_buckets_within_topics(tmp_path: Path) -> None:
    documents = scored(3000)
    path = labelled.write(tmp_path / "in.jsonl", documents)
    found = ordered(
        path, tmp_path / "out.jsonl", "--within", "topic", "--buckets", 4, "--drop-lowest", "0.01",
        "--drop-highest", "0.02", "--within-bucket", "given",
    )  # fmt: skip
    topics = list(dict.fromkeys(one["topic"] for one in documents))
    assert list(dict.fromkeys(one["topic"] for one in found)) == topics, (
        "one after another, as they first appear"
    )
    expected: list[dict] = []
    for topic in topics:
        ranked = sorted(
            (one for one in documents if one["topic"] == topic), key=lambda one: one["perplexity"]
        )
        kept = ranked[len(ranked) // 100 : len(ranked) - len(ranked) * 2 // 100]
        numbered = [{**one, "bucket": 4 * rank // len(kept)} for rank, one in enumerate(kept)]
        expected += sorted(numbered, key=lambda one: (one["bucket"], one["id"]))
    assert found == expected
    dropped = json.loads((tmp_path / "_out.jsonl.report.json").read_text())["counts"]["dropped"]
    assert sum(dropped.values()) == 3000 - len(found) and set(dropped) == {"lowest", "highest"}
    labelled.run(ordering, "--input", path, "--within", "topic", "--output-dir", tmp_path / "by")
    parts = {one.stem: labelled.read(one) for one in (tmp_path / "by").glob("*.jsonl")}
    assert sorted(parts) == ["t0", "t1", "t2"]
    assert parts["t1"] == sorted(
        (one for one in documents if one["topic"] == "t1"), key=lambda one: one["perplexity"]
    )


def test_every_kind_of_input_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(order_index, "_OPEN_FILES", 1)  # files are closed and opened again
    documents = scored(900)
    parts = [documents[i * 150 : (i + 1) * 150] for i in range(6)]
    raw = labelled.write(tmp_path / "0.jsonl", parts[0]).read_bytes()
    (tmp_path / "0.jsonl").write_bytes(b"\xef\xbb\xbf" + raw.replace(b"\n", b"\r\n\r\n"))
    data = labelled.write(tmp_path / "1.jsonl", parts[1]).read_bytes()
    (tmp_path / "1.jsonl").unlink()
    (tmp_path / "1.jsonl.gz").write_bytes(gzip.compress(data))
    labelled.write(tmp_path / "2.jsonl", parts[2])
    data = labelled.write(tmp_path / "3.jsonl", parts[3]).read_bytes()
    (tmp_path / "3.jsonl").unlink()
    (tmp_path / "3.jsonl.zst").write_bytes(zstandard.compress(data))
    parquet.write_table(pyarrow.Table.from_pylist(parts[4]), tmp_path / "4.parquet")
    labelled.write(tmp_path / "5.jsonl", parts[5])
    out = tmp_path / "out" / "all.jsonl"
    assert ordered(tmp_path, out) == sorted(documents, key=lambda one: one["perplexity"])
    assert sorted(one.name for one in out.parent.iterdir()) == ["_all.jsonl.report.json", "all.jsonl"]


@pytest.mark.parametrize(
    "value, said",
    [
        ('"12.5"', "must be a number"),
        ("NaN", "finite"),
        ("Infinity", "finite"),
        ("1e999", "finite"),
        ("true", "must be a number"),
        ("null", "must be a number"),
    ],
)
def test_what_is_no_number_is_refused_with_its_line(tmp_path: Path, value: str, said: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(f'{{"perplexity": 10}}\n{{"perplexity": {value}}}\n{{"perplexity": 9}}\n')
    with pytest.raises(DataError, match=rf"in\.jsonl:2:19: .*{said}"):
        ordered(path, tmp_path / "out.jsonl")
    found = ordered(path, tmp_path / "out.jsonl", "--on-error", "skip")
    assert [one["perplexity"] for one in found] == [9, 10]
    assert len(labelled.read(tmp_path / "_out.jsonl.quarantine.jsonl")) == 1


def test_no_field_no_documents_and_wrong_options(tmp_path: Path) -> None:
    path = labelled.write(tmp_path / "in.jsonl", [{"ppl": 1.0, "bucket": 3}])
    with pytest.raises(DataError, match="no field 'perplexity'; fields here: bucket, ppl"):
        ordered(path, tmp_path / "out.jsonl")
    with pytest.raises(DataError, match="no document to order"):
        ordered(path, tmp_path / "out.jsonl", "--on-error", "skip")
    with pytest.raises(DataError, match="--bucket-key"):
        ordered(path, tmp_path / "out.jsonl", "--by", "ppl", "--buckets", 2)
    for options in (
        ["--buckets", 0],
        ["--within-bucket", "given"],
        ["--drop-lowest", "0.5", "--drop-highest", "0.5"],
        ["--drop-lowest", "-1/10"],
    ):
        with pytest.raises(ConfigError, match=options[0].rpartition("-")[0]):
            ordered(
                path, tmp_path / "out.jsonl", *(["--drop-lowest=-1/10"] if "-1/10" in options else options)
            )
    assert [one.name for one in tmp_path.iterdir()] == ["in.jsonl"]


def test_an_input_that_changes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = labelled.write(tmp_path / "in.jsonl", scored(10))
    write = ordering._write

    def meanwhile(*arguments: object) -> object:
        path.write_text(path.read_text().replace("t1", "t9"))
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ordering, "_write", meanwhile)
    with pytest.raises(DataError, match="changed while it was read"):
        ordered(path, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_the_index_is_small() -> None:
    """Bytes kept for each document, whatever its text."""
    with order_index.DocumentIndex(Path(".")) as index:
        columns = (index.values, index.groups, index._offsets, index._lengths, index._homes)
    assert sum(column.itemsize for column in columns) == 24
