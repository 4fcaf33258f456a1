from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from prepared import TEXTS

from megatron_syne.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_fingerprint
from megatron_syne.errors import DataError, MissingInput


def batch(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [ids.tolist() for ids in tokenizer.encode_batch(texts)]


def test_round_trip_and_no_special_tokens(tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    assert (tokenizer.eos_id, tokenizer.bos_id) == (0, 1)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {0, 1} & set(ids) and max(ids) < tokenizer.vocab_size
    assert batch(tokenizer, TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_a_document_cannot_forge_an_end_of_text(tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    ids = tokenizer.encode("before <eos> after")
    assert 0 not in ids
    assert tokenizer.decode(ids) == "before <eos> after"


def test_truncation_and_padding_in_the_file_are_ignored(tokenizer_dir: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert batch(load_tokenizer(tmp_path), TEXTS) == batch(load_tokenizer(tokenizer_dir), TEXTS)


def test_folder_or_file_and_fingerprint(tokenizer_dir: Path) -> None:
    file = tokenizer_dir / "tokenizer.json"
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    for path in (tokenizer_dir, file, str(file)):
        assert load_tokenizer(path).fingerprint == tokenizer_fingerprint(path) == expected
    assert load_tokenizer(file).eos_id == 0


@pytest.mark.parametrize(
    ("name", "content", "eos"),
    [
        ("generation_config.json", {"eos_token_id": [7, 8]}, 7),
        ("generation_config.json", {"eos_token_id": 5}, 5),
        ("config.json", {"eos_token_id": 6}, 6),
        ("tokenizer_config.json", {"eos_token": {"content": "<bos>"}}, 1),
        ("tokenizer_config.json", {"eos_token": None}, None),
    ],
)
def test_where_eos_is_looked_up(
    tokenizer_dir: Path, tmp_path: Path, name: str, content: dict, eos: int | None
) -> None:
    shutil.copy(tokenizer_dir / "tokenizer.json", tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    assert load_tokenizer(tmp_path).eos_id == eos


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("tokenizer_config.json", '{"eos_token": "<nope>"}', "'<nope>' is not in the vocabulary"),
        ("config.json", '{"eos_token_id": 99999}', "99999 is not in a vocabulary"),
        ("config.json", '{"eos_token_id": "2"}', "'2' is not in a vocabulary"),
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("tokenizer_config.json", "[]", "expected a JSON object"),
        ("tokenizer.json", '{"version": 3}', "not a tokenizer"),
        ("tokenizer.json", "\xff", "not a tokenizer"),
    ],
)
def test_bad_folder(tokenizer_dir: Path, tmp_path: Path, name: str, content: str, part: str) -> None:
    shutil.copy(tokenizer_dir / "tokenizer.json", tmp_path)
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=part) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path / name) in str(caught.value)


def test_missing_and_damaged_models(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match=r"expected tokenizer\.json or tokenizer\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(MissingInput):
        load_tokenizer(tmp_path / "absent" / "tokenizer.json")
    (tmp_path / "tokenizer.model").write_bytes(b"\x00\x01 rubbish")
    with pytest.raises(DataError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path)


def every_kind(tokenizer_dir: Path, shared_data: Path) -> list[Tokenizer]:
    tree = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    tree["normalizer"] = {"type": "NFC"}
    other = tokenizer_dir / "normalised"
    other.mkdir(exist_ok=True)
    (other / "tokenizer.json").write_text(json.dumps(tree))
    (other / "config.json").write_text(json.dumps({"eos_token_id": 0, "bos_token_id": 1}))
    folders = (tokenizer_dir, other, shared_data / "llama3-tokenizer" / "tokenizer.model")
    return [load_tokenizer(path) for path in (*folders, shared_data / "stories260k")]


def test_every_kind_keeps_to_the_interface(tokenizer_dir: Path, shared_data: Path) -> None:
    kinds = every_kind(tokenizer_dir, shared_data)
    assert [(one.kind, one.library) for one in kinds] == [
        ("tokenizers", "tiktoken"),
        ("tokenizers", "tokenizers"),
        ("tiktoken", "tiktoken"),
        ("sentencepiece", "sentencepiece"),
    ]
    names = ["<eos>", "<eos>", "<|end_of_text|>", "</s>"]
    for one, name in zip(kinds, names, strict=True):
        arrays = one.encode_batch([*TEXTS, ""])
        assert [ids.tolist() for ids in arrays] == [one.encode(text) for text in [*TEXTS, ""]]
        assert arrays[-1].size == 0
        assert {ids.dtype for ids in arrays} == {np.dtype(np.uint16 if one.vocab_size < 65500 else np.int32)}
        assert one.token_id(name) == one.eos_id and one.token_id("no such token") is None
        assert one.decode(arrays[0]) == one.decode(arrays[0].tolist()) == TEXTS[0]


def test_a_worker_gets_the_same_tokenizer(tokenizer_dir: Path, shared_data: Path) -> None:
    for one in every_kind(tokenizer_dir, shared_data):
        again = pickle.loads(pickle.dumps(one))
        for name in ("kind", "library", "fingerprint", "vocab_size", "eos_id", "bos_id"):
            assert getattr(again, name) == getattr(one, name)
        texts = [*TEXTS, "<eos> <|end_of_text|> </s>", "e\u0301"]
        assert batch(again, texts) == batch(one, texts)


def test_an_id_beyond_the_vocabulary_is_refused(tokenizer_dir: Path) -> None:
    with pytest.raises(DataError, match=r"vocabulary of 302 .*: 320\)"):
        load_tokenizer(tokenizer_dir).decode([5, 320])
