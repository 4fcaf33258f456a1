"""Llama in the engine against transformers: every constant of the rope scaling, more TP than KV heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from family_bench import SIZES, assert_agrees, difference, judged, shaken, tokens_of
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

SCALING = {
    "rope_type": "llama3",
    "factor": 5.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 6.0,
    "original_max_position_embeddings": 64,
}


def toy(folder: Path, **changes: Any) -> nn.Module:
    torch.manual_seed(1)
    model = shaken(LlamaForCausalLM(LlamaConfig(**SIZES | changes)))
    model.save_pretrained(folder)
    return model


def test_logits_and_gradients(tmp_path: Path) -> None:
    assert_agrees(toy(tmp_path / "llama", head_dim=8), tmp_path / "llama")


def test_scaling_with_other_constants_far_out(tmp_path: Path) -> None:
    """Ten times the original length; each constant alone must show, or the comparison proves nothing."""
    folder = tmp_path / "scaled"
    model = toy(folder, rope_scaling=SCALING, rope_theta=300.0, head_dim=32)  # waves of every length
    assert_agrees(model, folder, length=640, layouts={"whole": {}}, world_size=1)
    logits, _ = judged(model, tokens_of(640))
    for key, value in (
        ("factor", 8.0),
        ("low_freq_factor", 1.0),
        ("high_freq_factor", 4.0),
        ("original_max_position_embeddings", 8192),
    ):
        config = json.loads((folder / "config.json").read_text())
        (folder / "other").mkdir(exist_ok=True)
        config["rope_scaling"][key] = value
        other = LlamaForCausalLM(LlamaConfig(**config | {"attn_implementation": "eager"})).eval()
        other.load_state_dict(model.state_dict())
        assert difference(judged(other, tokens_of(640))[0], logits) > 1e-2, key


def test_more_ranks_than_key_value_heads(tmp_path: Path) -> None:
    layouts = {
        "tp4": {"tensor_model_parallel_size": 4},
        "tp4_sp": {"tensor_model_parallel_size": 4, "sequence_parallel": True},
    }
    model = toy(tmp_path / "few", num_key_value_heads=2)
    assert_agrees(model, tmp_path / "few", world_size=4, layouts=layouts)
