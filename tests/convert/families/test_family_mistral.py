"""Mistral in the engine against transformers: the sliding window, to the token; both forms of config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from family_bench import SIZES, TOLERANCE, assert_agrees, difference, judged, shaken, tokens_of
from torch import nn
from transformers import MistralConfig, MistralForCausalLM

from megatron_syne.errors import DataError
from megatron_syne.models.config import PRESETS
from megatron_syne.models.hf_config import hf_config_from_model, model_config_from_hf

WINDOW = 24
V0_1: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}


def toy(folder: Path, **changes: Any) -> nn.Module:
    torch.manual_seed(2)
    model = shaken(MistralForCausalLM(MistralConfig(**SIZES | changes)))
    model.save_pretrained(folder)
    return model


def test_logits_and_gradients_past_the_window(tmp_path: Path) -> None:
    folder = tmp_path / "mistral"
    model = toy(folder, sliding_window=WINDOW)
    assert_agrees(model, folder, length=4 * WINDOW)
    logits, _ = judged(model, tokens_of(4 * WINDOW))
    for other in (WINDOW - 1, WINDOW + 1, None):  # one token more or less would be seen
        config = json.loads((folder / "config.json").read_text()) | {"sliding_window": other}
        changed = MistralForCausalLM(MistralConfig(**config | {"attn_implementation": "eager"})).eval()
        changed.load_state_dict(model.state_dict())
        assert difference(judged(changed, tokens_of(4 * WINDOW))[0], logits) > 100 * TOLERANCE


def test_without_a_window(tmp_path: Path) -> None:
    model = toy(tmp_path / "v0.3", sliding_window=None)
    assert_agrees(model, tmp_path / "v0.3", world_size=1, layouts={"whole": {}})


def test_configurations() -> None:
    assert model_config_from_hf(V0_1, "x") == PRESETS["mistral_7b_v0_1"]
    newer = V0_1 | {"sliding_window": None, "vocab_size": 32768, "rope_theta": 1e6}
    assert model_config_from_hf(newer, "x") == PRESETS["mistral_7b_v0_3"]
    five = {key: value for key, value in V0_1.items() if key not in ("rope_theta", "torch_dtype")}
    five |= {"head_dim": 128, "dtype": "bfloat16", "pad_token_id": None}
    five["rope_parameters"] = {"rope_theta": 10000.0, "rope_type": "default"}
    assert model_config_from_hf(five, "x") == PRESETS["mistral_7b_v0_1"]


def test_absent_fields_take_transformers_defaults() -> None:
    """An absent window is 4096, an absent number of KV heads 8."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 16}
    default = MistralConfig(**sizes)
    model = model_config_from_hf(sizes | {"model_type": "mistral", "vocab_size": 32000}, "x")
    assert (model.window_size, model.num_query_groups) == (
        default.sliding_window,
        default.num_key_value_heads,
    )
    assert model.max_position_embeddings == default.max_position_embeddings
    assert (model.layernorm_epsilon, model.rotary_base) == (default.rms_norm_eps, default.rope_theta)


@pytest.mark.parametrize("name", ["mistral_7b_v0_1", "mistral_7b_v0_3"])
def test_the_written_config_reads_back(name: str) -> None:
    written = hf_config_from_model(PRESETS[name], "bfloat16", base=V0_1)
    assert model_config_from_hf(written, "x") == PRESETS[name]
    assert MistralConfig(**written).sliding_window == PRESETS[name].window_size


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"sliding_window": 0}, "sliding_window"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": False}, "use_sliding_window"),
        ({"layer_types": ["full_attention"] * 32}, "layer_types"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),
    ],
)
def test_refused(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(DataError, match=word):
        model_config_from_hf(V0_1 | changes, "x")
