"""Qwen2 in the engine against transformers: bias on query, key and value, tied tables; its window keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from family_bench import SIZES, assert_agrees, shaken
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_syne.errors import DataError
from megatron_syne.models.config import PRESETS
from megatron_syne.models.hf_config import hf_config_from_model, model_config_from_hf

QWEN2_5_7B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}


def toy(folder: Path, **changes: Any) -> nn.Module:
    torch.manual_seed(3)
    model = shaken(Qwen2ForCausalLM(Qwen2Config(**SIZES | changes)))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_logits_and_gradients(tmp_path: Path, tied: bool) -> None:
    folder = tmp_path / "qwen2"
    model = toy(folder, tie_word_embeddings=tied, rope_theta=1e6)
    assert_agrees(model, folder)


def test_bias_with_more_ranks_than_key_value_heads(tmp_path: Path) -> None:
    model = toy(tmp_path / "few", num_key_value_heads=2)
    layouts = {"tp4_sp": {"tensor_model_parallel_size": 4, "sequence_parallel": True}}
    assert_agrees(model, tmp_path / "few", world_size=4, layouts=layouts)


def test_configurations() -> None:
    assert model_config_from_hf(QWEN2_5_7B, "x") == PRESETS["qwen2_5_7b"]
    five = {key: value for key, value in QWEN2_5_7B.items() if key not in ("rope_theta", "torch_dtype")}
    five |= {"layer_types": ["full_attention"] * 28, "sliding_window": None, "dtype": "bfloat16"}
    five["rope_parameters"] = {"rope_theta": 1e6, "rope_type": "default"}
    assert model_config_from_hf(five, "x") == PRESETS["qwen2_5_7b"]
    seventy = {
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    }
    seventy |= {"intermediate_size": 29568, "rms_norm_eps": 1e-5}
    assert model_config_from_hf(QWEN2_5_7B | seventy, "x") == PRESETS["qwen2_72b"]


def test_absent_fields_take_transformers_defaults() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    default = Qwen2Config(**sizes)
    required = {"num_attention_heads": 32, "vocab_size": 100, "model_type": "qwen2"}
    model = model_config_from_hf(sizes | required, "x")
    assert model.num_query_groups == default.num_key_value_heads
    assert model.max_position_embeddings == default.max_position_embeddings
    assert (model.layernorm_epsilon, model.rotary_base) == (default.rms_norm_eps, default.rope_theta)
    assert model.window_size is None and not default.use_sliding_window


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("qwen2")])
def test_the_written_config_reads_back(name: str) -> None:
    written = hf_config_from_model(PRESETS[name], "bfloat16", 151643, 151643)
    assert model_config_from_hf(written, "x") == PRESETS[name]
    read = Qwen2Config(**written)
    assert (
        set(read.layer_types) == {"full_attention"} and read.rms_norm_eps == PRESETS[name].layernorm_epsilon
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_sliding_window": True, "max_window_layers": 14}, ["use_sliding_window", "False"]),
        ({"layer_types": ["full_attention"] * 27 + ["sliding_attention"]}, ["layer_types", "28"]),
        ({"dual_chunk_attention_config": {"chunk_size": 262144}}, ["dual_chunk_attention_config"]),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, ["yarn"]),
        ({"use_mrope": True, "attention_bias": False}, ["use_mrope", "attention_bias"]),
    ],
)
def test_refused(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        model_config_from_hf(QWEN2_5_7B | changes, "x")
    assert all(word in str(caught.value) for word in words)
