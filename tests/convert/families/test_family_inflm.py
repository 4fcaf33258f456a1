"""INF-34B in the engine against transformers' Llama with ``nn.LayerNorm`` for its norms, as its own code has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from family_bench import SIZES, assert_agrees, shaken
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_syne.convert.weights import open_source
from megatron_syne.errors import DataError
from megatron_syne.models.config import PRESETS
from megatron_syne.models.hf_config import hf_config_from_model, model_config_from_hf

BASE: dict[str, Any] = {
    "architectures": ["INFLMForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_inflm.INFLMConfig",
        "AutoModelForCausalLM": "modeling_inflm.INFLMForCausalLM",
    },
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 8192,
    "initializer_range": 0.02,
    "intermediate_size": 22016,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 4096,
    "mlp_bias": False,
    "model_type": "inflm",
    "num_attention_heads": 64,
    "num_hidden_layers": 48,
    "num_key_value_heads": 8,
    "rope_scaling": None,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 96512,
}


def toy(folder: Path) -> nn.Module:
    """Random weights and a ``config.json`` that names code of its own; the code is not there."""
    torch.manual_seed(4)
    model = LlamaForCausalLM(LlamaConfig(**SIZES | {"rope_theta": 500000.0}))
    for owner in [model.model, *model.model.layers]:
        for name in ("input_layernorm", "post_attention_layernorm", "norm"):
            if hasattr(owner, name):
                setattr(owner, name, nn.LayerNorm(SIZES["hidden_size"], eps=1e-5))
    shaken(model)
    folder.mkdir()
    save_file(dict(model.state_dict()), folder / "model.safetensors", {"format": "pt"})
    sizes = {key: value for key, value in SIZES.items() if key in BASE}
    (folder / "config.json").write_text(json.dumps(BASE | sizes | {"torch_dtype": "float32"}))
    return model


def test_logits_and_gradients(tmp_path: Path) -> None:
    assert_agrees(toy(tmp_path / "inf"), tmp_path / "inf")


def test_only_the_norms_weights_are_less_one(tmp_path: Path) -> None:
    hf = dict(toy(tmp_path / "inf").state_dict())
    source = open_source(tmp_path / "inf")
    for ours, theirs in (
        ("decoder.layers.1.input_layernorm", "model.layers.1.input_layernorm"),
        ("decoder.layers.1.pre_mlp_layernorm", "model.layers.1.post_attention_layernorm"),
        ("decoder.final_layernorm", "model.norm"),
    ):
        weight, bias = (source.parameter(f"{ours}.{part}", 0, 1) for part in ("weight", "bias"))
        assert torch.equal(weight, hf[f"{theirs}.weight"] - 1)
        assert torch.equal(bias, hf[f"{theirs}.bias"])
    source.close()


def test_configurations() -> None:
    assert model_config_from_hf(BASE, "x") == PRESETS["inf_34b"]
    chat = BASE | {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6}
    assert model_config_from_hf(chat, "x") == PRESETS["inf_34b_chat"]
    five = {
        key: value for key, value in BASE.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")
    }
    five |= {"dtype": "bfloat16", "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
    assert model_config_from_hf(five, "x") == PRESETS["inf_34b"]


def test_the_written_config_still_names_its_code() -> None:
    written = hf_config_from_model(PRESETS["inf_34b"], "bfloat16", base=BASE)
    assert written["auto_map"] == BASE["auto_map"]
    assert {key: value for key, value in written.items() if key in BASE} == BASE
    assert model_config_from_hf(written, "x") == PRESETS["inf_34b"]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"layer_norm_eps": None}, "layer_norm_eps"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
    ],
)
def test_refused(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(DataError, match=word):
        model_config_from_hf(BASE | changes, "x")
