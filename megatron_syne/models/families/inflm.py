"""INF-34B: Llama with LayerNorm (weight and bias), trained with weights kept less 1; ``INFLMForCausalLM``.

The class comes with the checkpoint (``auto_map``) and is never run: it is transformers' Llama whose norms are
``nn.LayerNorm``. Its configuration adds ``layer_norm_eps`` to ``LlamaConfig``.
"""

from __future__ import annotations

from megatron_syne.models.family import Family, Field, llama_fields, shape

FAMILY = Family(
    model_type="inflm",
    architecture="INFLMForCausalLM",
    fields=llama_fields(epsilon=Field("layer_norm_eps", "layernorm_epsilon", float)),
    only={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    written=("hidden_act", "attention_bias", "mlp_bias"),
    constants={
        "normalization": "LayerNorm",
        "layernorm_zero_centered_gamma": True,
        "add_qkv_bias": False,
    },
    harmless=frozenset({"rms_norm_eps"}),  # LlamaConfig's, read by nobody
    brings_code=True,
    presets={
        "inf_34b": shape(8192, 48, (64, 8), 128, 22016, vocab=96512, positions=4096, base=500000.0),
        "inf_34b_chat": shape(8192, 48, (64, 8), 128, 22016, vocab=96512, positions=32768, base=500000.0),
    },
)
