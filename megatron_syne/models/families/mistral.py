"""Mistral 7B: Llama with a sliding window (v0.1) or without (v0.3); transformers' ``MistralForCausalLM``."""

from __future__ import annotations

from megatron_syne.models.family import LLAMA_CONSTANTS, Family, Field, llama_fields, shape

FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    # An absent window is MistralConfig's 4096; "none" is null.
    fields=(
        *llama_fields(positions=131072, groups=8),
        Field("sliding_window", "window_size", int, 4096, null=True),
    ),
    only={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    written=("hidden_act",),
    constants=LLAMA_CONSTANTS,
    presets={
        "mistral_7b_v0_1": shape(
            4096, 32, (32, 8), 128, 14336, vocab=32000, positions=32768, base=10000.0, window=4096
        ),
        "mistral_7b_v0_3": shape(4096, 32, (32, 8), 128, 14336, vocab=32768, positions=32768, base=1e6),
    },
)
