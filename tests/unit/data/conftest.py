"""A small real tokenizer, made here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from prepared import TEXTS


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a byte-level BPE tokenizer of 320 tokens; EOS is id 0."""
    from tokenizers import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(TEXTS, vocab_size=320, min_frequency=2, special_tokens=["<eos>", "<bos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "bos_token": "<bos>"}))
    return folder
