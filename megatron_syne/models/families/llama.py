"""Llama 1, 2, 3, 3.1, 3.2, 3.3, Code Llama, TinyLlama: transformers' ``LlamaForCausalLM``."""

from __future__ import annotations

from megatron_syne.config.schema import ModelConfig
from megatron_syne.models.family import LLAMA_CONSTANTS, Family, llama_fields, shape


def _llama(
    hidden: int,
    layers: int,
    heads: int,
    ffn: int,
    *,
    groups: int = 0,
    positions: int,
    vocab: int = 32000,
    base: float = 10000.0,
    eps: float = 1e-5,
) -> ModelConfig:
    """Llama 1, 2 and Code Llama: heads of 128, a key/value head to each unless ``groups`` are given."""
    both = (heads, groups or heads)
    return shape(hidden, layers, both, 128, ffn, vocab=vocab, positions=positions, base=base, eps=eps)


def _llama3(
    hidden: int,
    layers: int,
    heads: int,
    head: int,
    ffn: int,
    *,
    positions: int = 131072,
    factor: float | None = 8.0,
    tied: bool = False,
) -> ModelConfig:
    """Llama 3 and later: 8 key/value heads."""
    return shape(
        hidden, layers, (heads, 8), head, ffn,
        vocab=128256, positions=positions, base=500000.0, factor=factor, tied=tied,
    )  # fmt: skip


PRESETS = {
    "llama_7b": _llama(4096, 32, 32, 11008, positions=2048, eps=1e-6),
    "llama_13b": _llama(5120, 40, 40, 13824, positions=2048, eps=1e-6),
    "llama_30b": _llama(6656, 60, 52, 17920, positions=2048, eps=1e-6),
    "llama_65b": _llama(8192, 80, 64, 22016, positions=2048),
    "llama2_7b": _llama(4096, 32, 32, 11008, positions=4096),
    "llama2_13b": _llama(5120, 40, 40, 13824, positions=4096),
    "llama2_70b": _llama(8192, 80, 64, 28672, groups=8, positions=4096),
    "code_llama_7b": _llama(4096, 32, 32, 11008, positions=16384, vocab=32016, base=1e6),
    "code_llama_13b": _llama(5120, 40, 40, 13824, positions=16384, vocab=32016, base=1e6),
    "code_llama_34b": _llama(8192, 48, 64, 22016, groups=8, positions=16384, base=1e6),
    "llama3_8b": _llama3(4096, 32, 32, 128, 14336, positions=8192, factor=None),
    "llama3_70b": _llama3(8192, 80, 64, 128, 28672, positions=8192, factor=None),
    "llama3_1_8b": _llama3(4096, 32, 32, 128, 14336),
    "llama3_1_70b": _llama3(8192, 80, 64, 128, 28672),
    "llama3_1_405b": _llama3(16384, 126, 128, 128, 53248),
    "llama3_2_1b": _llama3(2048, 16, 32, 64, 8192, factor=32.0, tied=True),
    "llama3_2_3b": _llama3(3072, 28, 24, 128, 8192, factor=32.0, tied=True),
    "llama3_3_70b": _llama3(8192, 80, 64, 128, 28672),
    "tinyllama_1_1b": shape(
        2048, 22, (32, 4), 64, 5632, vocab=32000, positions=2048, base=10000.0
    ),
}  # fmt: skip

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    fields=llama_fields(),
    only={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False},
    written=("hidden_act", "attention_bias", "mlp_bias"),
    constants=LLAMA_CONSTANTS,
    harmless=frozenset(
        {"max_sequence_length"}
    ),  # beside max_position_embeddings in Llama 1's first conversions
    presets=PRESETS,
)
