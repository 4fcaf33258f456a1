"""Qwen2 and Qwen2.5, dense: Llama with a bias on query, key and value; transformers' ``Qwen2ForCausalLM``."""

from __future__ import annotations

from megatron_syne.config.schema import ModelConfig
from megatron_syne.models.family import LLAMA_CONSTANTS, Family, llama_fields, shape


def _qwen(
    hidden: int,
    layers: int,
    heads: tuple[int, int],
    head: int,
    ffn: int,
    *,
    positions: int = 131072,
    eps: float = 1e-6,
    tied: bool = False,
) -> ModelConfig:
    """The tied ones, and only those, have the smaller table of 151936 rows."""
    vocab = 151936 if tied else 152064
    return shape(
        hidden, layers, heads, head, ffn, vocab=vocab, positions=positions, base=1e6, eps=eps, tied=tied
    )


PRESETS = {
    "qwen2_0_5b": _qwen(896, 24, (14, 2), 64, 4864, tied=True),
    "qwen2_1_5b": _qwen(1536, 28, (12, 2), 128, 8960, tied=True),
    "qwen2_7b": _qwen(3584, 28, (28, 4), 128, 18944),
    "qwen2_72b": _qwen(8192, 80, (64, 8), 128, 29568, eps=1e-5),
    "qwen2_5_0_5b": _qwen(896, 24, (14, 2), 64, 4864, positions=32768, tied=True),
    "qwen2_5_1_5b": _qwen(1536, 28, (12, 2), 128, 8960, tied=True),
    "qwen2_5_3b": _qwen(2048, 36, (16, 2), 128, 11008, positions=32768, tied=True),
    "qwen2_5_7b": _qwen(3584, 28, (28, 4), 128, 18944),
    "qwen2_5_14b": _qwen(5120, 48, (40, 8), 128, 13824, eps=1e-5),
    "qwen2_5_32b": _qwen(5120, 64, (40, 8), 128, 27648, eps=1e-5),
    "qwen2_5_72b": _qwen(8192, 80, (64, 8), 128, 29568, eps=1e-5),
}

FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    fields=llama_fields(positions=32768, groups=32),
    # Only with use_sliding_window do the other two window keys mean anything.
    only={"hidden_act": "silu", "use_sliding_window": False, "use_mrope": False},
    written=("hidden_act", "use_sliding_window"),
    constants={**LLAMA_CONSTANTS, "add_qkv_bias": True},
    harmless=frozenset({"sliding_window", "max_window_layers"}),
    presets=PRESETS,
)
