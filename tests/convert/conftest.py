"""Toy Hugging Face checkpoints, made by transformers itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

TOY: dict[str, Any] = {
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,  # not hidden / heads: the projections are not square
    "vocab_size": 131,  # prime: the vocabulary is padded in every layout
    "max_position_embeddings": 128,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def save_toy(folder: Path, dtype: torch.dtype = torch.float32, shard: str = "5GB", **changes: Any) -> Path:
    """Save a random Llama as a Hugging Face folder."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**TOY | changes)).to(dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # all ones from the start: they could be exchanged without being noticed
            parameter.data = 1 + 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    (folder / "LICENSE").write_text("the licence\n")
    return folder


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """An untied toy in one file."""
    return save_toy(tmp_path / "toy")


@pytest.fixture
def sharded_toy(tmp_path: Path) -> Path:
    """The toy in several files with an index."""
    return save_toy(tmp_path / "toy", shard="50KB")


@pytest.fixture(scope="session")
def toy_maker() -> Any:
    """:func:`save_toy`, for tests that need other toys."""
    return save_toy
