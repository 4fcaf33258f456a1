"""Our frequencies of the rotary embedding are transformers' to the last bit, with any constants."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_syne.config.schema import ModelConfig
from megatron_syne.models.config import PRESETS
from megatron_syne.models.hf_config import hf_config_from_model
from megatron_syne.models.rope import rotary_frequencies


def transformers_frequencies(model: ModelConfig) -> torch.Tensor:
    frequencies: torch.Tensor = LlamaRotaryEmbedding(
        LlamaConfig(**hf_config_from_model(model, "float32"))
    ).inv_freq
    return frequencies


@pytest.mark.parametrize("name", ["llama_7b", "llama3_8b", "llama3_1_8b", "llama3_2_1b"])
def test_presets(name: str) -> None:
    assert torch.equal(rotary_frequencies(PRESETS[name]), transformers_frequencies(PRESETS[name]))


@settings(deadline=None)
@given(
    head=st.integers(1, 128),
    base=st.floats(1000, 1e7),
    factor=st.floats(1, 64),
    low=st.floats(0.5, 4),
    more=st.floats(0.5, 8),
    original=st.integers(16, 131072),
)
def test_any_constants(head: int, base: float, factor: float, low: float, more: float, original: int) -> None:
    model = dataclasses.replace(
        PRESETS["llama3_1_8b"],
        kv_channels=2 * head,
        rotary_base=base,
        rope_scaling_factor=factor,
        rope_low_freq_factor=low,
        rope_high_freq_factor=low + more,
        rope_original_max_position_embeddings=original,
    )
    assert torch.equal(rotary_frequencies(model), transformers_frequencies(model))
