"""Meta's tokenizer.model of Llama-3: what is in the file, what is not, and files that are damaged."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import pytest

from megatron_syne.data.tokenizer import load_tokenizer
from megatron_syne.errors import DataError


@pytest.fixture
def model_dir(shared_data: Path, tmp_path: Path) -> Path:
    """Folder with Meta's file alone."""
    shutil.copy(shared_data / "llama3-tokenizer" / "tokenizer.model", tmp_path)
    return tmp_path


def test_special_tokens_are_those_of_tokenizer_json(shared_data: Path, model_dir: Path) -> None:
    tokenizer = load_tokenizer(model_dir)
    tree = json.loads((shared_data / "llama3-tokenizer" / "tokenizer.json").read_text("utf-8"))
    assert len(tree["added_tokens"]) == 256
    for one in tree["added_tokens"]:
        assert tokenizer.token_id(one["content"]) == one["id"]
        assert one["id"] not in tokenizer.encode(f"a {one['content']} b")
        assert tokenizer.decode([one["id"]]) == one["content"]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (128256, 128000, 128001)


def test_files_beside_it_name_the_end_and_the_special_tokens(model_dir: Path) -> None:
    (model_dir / "generation_config.json").write_text(json.dumps({"eos_token_id": [128008, 128009]}))
    assert load_tokenizer(model_dir).eos_id == 128008
    assert load_tokenizer(model_dir).bos_id == 128000
    decoder = {"128004": {"content": "<|finetune_right_pad_id|>"}, "5": {"content": "<five>"}}
    config = {"eos_token": "<|eot_id|>", "added_tokens_decoder": decoder}
    (model_dir / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(model_dir)
    assert tokenizer.eos_id == 128009
    assert tokenizer.token_id("<|finetune_right_pad_id|>") == 128004
    assert tokenizer.token_id("<|reserved_special_token_2|>") is tokenizer.token_id("<five>") is None
    assert tokenizer.token_id("<|reserved_special_token_3|>") == 128005


LINES = [base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256)]


@pytest.mark.parametrize(
    ("lines", "part"),
    [
        (LINES, "with 256 tokens; only Llama-3's is known, with 128000"),
        ([*LINES[:3], b"AAEC", *LINES[3:]], ":4: expected a base64 token and its rank, found b'AAEC'"),
        ([*LINES[:3], b"", *LINES[3:]], ":4: expected a base64 token and its rank, found b''"),
        ([*LINES[:3], b"AAEC 7", *LINES[3:]], ":4: expected a new token with rank 3, found b'AAEC 7'"),
        ([*LINES[:3], b"AQ== 3", *LINES[3:]], ":4: expected a new token with rank 3, found b'AQ== 3'"),
        ([*LINES[:3], b"AAECA 3", *LINES[3:]], ":4: not base64"),
    ],
)
def test_damaged_file(tmp_path: Path, lines: list[bytes], part: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(DataError) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path / "tokenizer.model") in str(caught.value) and part in str(caught.value)


def test_truncated_file(model_dir: Path) -> None:
    file = model_dir / "tokenizer.model"
    whole = file.read_bytes()
    for keep in (len(whole) - 3, len(whole) // 2):
        file.write_bytes(whole[:keep])
        with pytest.raises(DataError, match=r"tokenizer\.model"):
            load_tokenizer(model_dir)
