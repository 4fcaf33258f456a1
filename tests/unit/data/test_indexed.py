from __future__ import annotations

import hashlib
import io
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from prepared import many_texts, random_documents, write_jsonl, write_tokens
from token_sources import write_source

from megatron_syne.data.preparation.prepare import Job, prepare
from megatron_syne.data.tokens.indexed import IndexedWriter, token_dtype
from megatron_syne.data.tokens.reader import IndexedReader
from megatron_syne.errors import DataError, MissingInput


@pytest.fixture
def prefix(tmp_path: Path, tokenizer_dir: Path) -> Path:
    prepare(Job([write_jsonl(tmp_path / "a.jsonl", many_texts(40))], tokenizer_dir, tmp_path / "x"))
    return tmp_path / "x"


def rewrite(path: Path, at: int, value: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + len(value)] = value
    path.write_bytes(data)


@pytest.mark.parametrize("vocab_size", [300, 65_499, 65_500, 128_256])
def test_type_of_a_token_is_megatron_cores(vocab_size: int) -> None:
    from megatron.core.datasets.indexed_dataset import DType

    assert token_dtype(vocab_size) == np.dtype(DType.optimal_dtype(vocab_size))


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_bytes_are_those_of_megatron_cores_builder(
    tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    monkeypatch.setattr(
        "megatron_syne.data.tokens.indexed._BLOCK", 7
    )  # several blocks, the last one not full
    documents = random_documents(100)
    write_tokens(tmp_path / "ours", documents, np.dtype(dtype).newbyteorder("<").str)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=getattr(np, dtype))
    for document in documents:
        builder.add_item(torch.from_numpy(document))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()


def test_megatron_core_reads_what_was_prepared(prefix: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    ours, theirs = IndexedReader(prefix), IndexedDataset(str(prefix))
    assert len(theirs) == ours.num_documents == 40
    assert all(np.array_equal(theirs[n], ours.document(n)) for n in range(40))
    assert theirs.document_indices.tolist() == list(range(41))


def test_documents_of_several_sequences_made_by_megatron_core(tmp_path: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.int32)
    builder.add_document(torch.arange(10), [4, 6])
    builder.add_document(torch.arange(10, 13), [3])
    builder.finalize(str(tmp_path / "x.idx"))
    reader = IndexedReader(tmp_path / "x", require_manifest=False)
    assert [reader.document(n).tolist() for n in (0, 1)] == [list(range(10)), [10, 11, 12]]
    reader.check_vocab(13)
    with pytest.raises(DataError, match=r"vocabulary of 13 \(highest token id 12\).*12 rows"):
        reader.check_vocab(12)
    with pytest.raises(MissingInput, match=r"x\.json.*prepare them again"):
        IndexedReader(tmp_path / "x")


def test_an_index_cut_anywhere_is_refused(prefix: Path) -> None:
    idx = Path(f"{prefix}.idx")
    data = idx.read_bytes()
    for keep in [0, 1, 8, 33, 34, 35, *range(40, len(data), 37), len(data) - 1]:
        idx.write_bytes(data[:keep])
        with pytest.raises(DataError, match=r"x\.idx"):
            IndexedReader(prefix)
    idx.write_bytes(data + b"\0")
    with pytest.raises(DataError, match=r"x\.idx: \d+ bytes, expected"):
        IndexedReader(prefix)


def test_any_flipped_byte_of_the_index_is_noticed(prefix: Path) -> None:
    idx = Path(f"{prefix}.idx")
    data = idx.read_bytes()
    for at in range(len(data)):
        rewrite(idx, at, bytes([data[at] ^ (1 << at % 8)]))
        with pytest.raises(DataError):
            IndexedReader(prefix)
        idx.write_bytes(data)
    IndexedReader(prefix)


@pytest.mark.parametrize(
    ("suffix", "at", "value", "part"),
    [
        ("idx", 0, b"X", "not an index: starts with"),
        ("idx", 9, struct.pack("<Q", 2), "version 2"),
        ("idx", 17, b"\x07", "token type 7"),
        ("idx", 18, struct.pack("<Q", 2**60), "expected"),
        ("idx", 34, struct.pack("<i", -5), "sequence 0 has a negative length"),
        ("idx", 34 + 4 * 40 + 8 * 3, struct.pack("<q", 2**40), "sequence 3 points to byte 1099511627776"),
        ("idx", 34 + 12 * 40 + 8 * 2, struct.pack("<q", 99), "document boundaries must rise"),
    ],
)
def test_what_a_damaged_index_says(prefix: Path, suffix: str, at: int, value: bytes, part: str) -> None:
    rewrite(Path(f"{prefix}.{suffix}"), at, value)
    with pytest.raises(DataError, match=part):
        IndexedReader(prefix)


def test_truncated_bin_swapped_pair_and_absent_files(
    prefix: Path, tmp_path: Path, tokenizer_dir: Path
) -> None:
    whole = Path(f"{prefix}.bin").read_bytes()
    Path(f"{prefix}.bin").write_bytes(whole[:-2])
    with pytest.raises(DataError, match=r"x\.bin: \d+ bytes, but its index describes"):
        IndexedReader(prefix)
    Path(f"{prefix}.bin").write_bytes(whole)
    prepare(Job([write_jsonl(tmp_path / "b.jsonl", many_texts(30))], tokenizer_dir, tmp_path / "y"))
    for suffix in ("idx", "json"):
        mine = Path(f"{prefix}.{suffix}")
        kept = mine.read_bytes()
        mine.write_bytes((tmp_path / f"y.{suffix}").read_bytes())
        with pytest.raises(DataError, match=r"belong together|not a pair"):
            IndexedReader(prefix)
        mine.unlink()
        with pytest.raises(MissingInput, match=rf"x\.{suffix}.*prepare"):
            IndexedReader(prefix)
        mine.write_bytes(kept)
    IndexedReader(prefix).verify()


def test_damage_within_the_bin_is_found_by_verify_and_at_the_latest_when_read(prefix: Path) -> None:
    rewrite(Path(f"{prefix}.bin"), 8, struct.pack("<H", 60_000))
    reader = IndexedReader(prefix)
    with pytest.raises(DataError, match=r"x\.bin: SHA-256"):
        reader.verify()
    reader.check_vocab(320)
    with pytest.raises(DataError, match=r"token id 60000 near token 0 is outside the vocabulary of 320"):
        reader.document(0)
    assert reader.document(1).max() < 320


def test_vocabulary_larger_than_the_embedding_names_both(prefix: Path) -> None:
    reader = IndexedReader(prefix)
    vocabulary = reader.manifest["tokenizer"]["vocab_size"]
    reader.check_vocab(vocabulary)
    reader.check_vocab(vocabulary + 64)  # a padded embedding
    with pytest.raises(DataError, match=rf"vocabulary of {vocabulary} .*embedding has {vocabulary - 1} rows"):
        reader.check_vocab(vocabulary - 1)
    # a manifest that says too little of its tokenizer is held to its highest token
    reader.manifest["tokenizer"]["vocab_size"] = 1
    highest = reader.manifest["max_token_id"]
    reader.check_vocab(highest + 1)
    with pytest.raises(DataError, match=rf"highest token id {highest}\).*embedding has {highest} rows"):
        reader.check_vocab(highest)


@pytest.mark.parametrize(
    ("field", "value", "part"),
    [
        ("format", "other", "not a manifest"),
        ("version", 2, "version 2"),
        ("max_token_id", "5", "field max_token_id must be a int"),
        ("counts", [], r"field counts\.documents"),
        ("files", {"bin": None}, r"field files\.bin\.bytes"),
        ("dtype", "int32", "dtype says int32"),
    ],
)
def test_bad_manifests(prefix: Path, field: str, value: object, part: str) -> None:
    file = Path(f"{prefix}.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(DataError, match=part):
        IndexedReader(prefix)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\xff"])
def test_a_manifest_that_is_no_json(prefix: Path, text: str) -> None:
    Path(f"{prefix}.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"x\.json"):
        IndexedReader(prefix)


def test_a_bin_cut_short_after_it_was_opened_is_an_error_and_no_signal(prefix: Path) -> None:
    reader = IndexedReader(prefix)
    last = reader.num_documents - 1
    assert reader.document(last).size
    os.truncate(f"{prefix}.bin", 100)
    with pytest.raises(DataError, match=r"x\.bin: ends at byte \d+; cut short since it was opened"):
        reader.document(last)


def test_more_tokens_than_32_bits_count(tmp_path: Path) -> None:
    lengths = np.full(4, 2**30 + 5, dtype=np.int32)
    total = int(lengths.sum(dtype=np.int64))
    with open(tmp_path / "x.idx", "w+b") as stream:
        writer = IndexedWriter(io.BytesIO(), stream, np.dtype("<u2"))
        writer.add_lengths(lengths)
        writer.tokens = total
        writer.finish()
    with open(tmp_path / "x.bin", "wb") as stream:
        stream.truncate(2 * total)  # sparse: takes no space
        stream.seek(2 * (total - 3))
        stream.write(np.array([7, 8, 9], "<u2").tobytes())
    reader = IndexedReader(tmp_path / "x", require_manifest=False)
    assert reader.num_tokens == total > 2**32 and reader.document_start(3) == 3 * (2**30 + 5)
    assert reader.read(total - 5, 5).tolist() == [0, 0, 7, 8, 9]


def test_numbers_kept_with_the_documents(tmp_path: Path) -> None:
    prefix = write_source(tmp_path / "x", [np.arange(3), np.arange(3)], {"score": [2.5, -1.0]})
    assert IndexedReader(prefix).field("score").tolist() == [2.5, -1.0]
    for name in ("other", "../score", ""):
        with pytest.raises(DataError, match=r"no number .* \(kept: score\); prepare it again with --keep"):
            IndexedReader(prefix).field(name)
    for values in ([2.5], [2.5, float("nan")]):
        with pytest.raises(DataError, match=r"one number .* for each of 2 documents"):
            IndexedReader(write_source(tmp_path / "y", [np.arange(3)] * 2, {"score": values})).field("score")
    rewrite(Path(f"{prefix}.score.npy"), 130, b"X")
    with pytest.raises(DataError, match=r"x\.score\.npy: SHA-256"):
        IndexedReader(prefix).field("score")
    Path(f"{prefix}.score.npy").unlink()
    with pytest.raises(MissingInput, match=r"x\.score\.npy"):
        IndexedReader(prefix).field("score")


def test_a_field_that_would_run_code_is_not_loaded(tmp_path: Path) -> None:
    prefix = write_source(tmp_path / "x", [np.arange(3)], {"score": [1.0]})
    np.save(f"{prefix}.score.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    data = Path(f"{prefix}.score.npy").read_bytes()
    manifest = json.loads(Path(f"{prefix}.json").read_text())
    manifest["fields"]["score"]["sha256"] = hashlib.sha256(data).hexdigest()
    Path(f"{prefix}.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"x\.score\.npy"):
        IndexedReader(prefix).field("score")


def test_negative_tokens_of_another_tool(tmp_path: Path) -> None:
    reader = write_tokens(tmp_path / "x", [np.array([1, 2]), np.array([3, -4])])
    with pytest.raises(DataError, match="negative token id"):
        reader.check_vocab(100)
