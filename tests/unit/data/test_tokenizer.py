from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from prepared import TEXTS

from megatron_syne.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from megatron_syne.errors import DataError, MissingInput


def corpus_texts(shared_data: Path, count: int) -> list[str]:
    texts = []
    for name in ("book-cn", "book-en", "math-en"):
        with open(shared_data / "corpus" / f"{name}.jsonl", encoding="utf-8") as lines:
            texts += [json.loads(line)["text"] for line, _ in zip(lines, range(count), strict=False)]
    return texts


def test_round_trip_and_no_special_tokens(tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    assert (tokenizer.eos_id, tokenizer.bos_id) == (0, 1)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {0, 1} & set(ids) and max(ids) < tokenizer.vocab_size
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


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
    assert load_tokenizer(tmp_path).encode_batch(TEXTS) == load_tokenizer(tokenizer_dir).encode_batch(TEXTS)


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
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(DataError, match=r"tiktoken.*tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_sentencepiece_equals_transformers(shared_data: Path) -> None:
    from transformers import LlamaTokenizer

    folder = shared_data / "stories260k"
    ours = load_tokenizer(folder)
    assert (ours.kind, ours.vocab_size, ours.bos_id, ours.eos_id) == ("sentencepiece", 512, 1, 2)
    theirs = LlamaTokenizer.from_pretrained(str(folder))
    for text in [*TEXTS, *corpus_texts(shared_data, 20), "one </s> two"]:
        expected = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ours.encode(text) == expected


def test_llama3_equals_transformers_and_refuses_tiktoken(shared_data: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = shared_data / "llama3-tokenizer"
    ours = load_tokenizer(folder)
    assert (ours.kind, ours.vocab_size, ours.bos_id, ours.eos_id) == ("tokenizers", 128256, 128000, 128001)
    theirs = PreTrainedTokenizerFast.from_pretrained(str(folder))
    texts = [*TEXTS, *corpus_texts(shared_data, 60)]
    assert ours.encode_batch(texts) == theirs(texts, add_special_tokens=False)["input_ids"]
    with pytest.raises(DataError, match="tiktoken"):
        load_tokenizer(folder / "tokenizer.model")
