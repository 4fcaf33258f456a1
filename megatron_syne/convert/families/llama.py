"""The Llama family: which Hugging Face tensors make which Megatron parameter. Data only.

Names as in transformers' ``LlamaForCausalLM`` and in megatron-core's ``gpt_layer_specs`` (local and
Transformer Engine spec); ``{layer}`` is the number of the layer in the whole model, from 0.
"""

from __future__ import annotations

from megatron_syne.convert.pieces import Entry, Kind
from megatron_syne.convert.table import Table

EMBEDDING = Entry(Kind.VOCABULARY, {"model.embed_tokens.weight": "v h"}, "embedding.word_embeddings.weight")

LAYER = (
    Entry(
        Kind.DIRECT,
        {"model.layers.{layer}.input_layernorm.weight": "h"},
        "decoder.layers.{layer}.input_layernorm.weight",
        te="decoder.layers.{layer}.self_attention.linear_qkv.layer_norm_weight",
    ),
    Entry(
        Kind.FUSED_QKV,
        {
            "model.layers.{layer}.self_attn.q_proj.weight": "n*d h",
            "model.layers.{layer}.self_attn.k_proj.weight": "g*d h",
            "model.layers.{layer}.self_attn.v_proj.weight": "g*d h",
        },
        "decoder.layers.{layer}.self_attention.linear_qkv.weight",
    ),
    Entry(
        Kind.COLUMNS,
        {"model.layers.{layer}.self_attn.o_proj.weight": "h n*d"},
        "decoder.layers.{layer}.self_attention.linear_proj.weight",
    ),
    Entry(
        Kind.DIRECT,
        {"model.layers.{layer}.post_attention_layernorm.weight": "h"},
        "decoder.layers.{layer}.pre_mlp_layernorm.weight",
        te="decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight",
    ),
    Entry(
        Kind.GATED_MLP,
        {
            "model.layers.{layer}.mlp.gate_proj.weight": "f h",
            "model.layers.{layer}.mlp.up_proj.weight": "f h",
        },
        "decoder.layers.{layer}.mlp.linear_fc1.weight",
    ),
    Entry(
        Kind.COLUMNS,
        {"model.layers.{layer}.mlp.down_proj.weight": "h f"},
        "decoder.layers.{layer}.mlp.linear_fc2.weight",
    ),
)

FINAL_NORM = Entry(Kind.DIRECT, {"model.norm.weight": "h"}, "decoder.final_layernorm.weight")

OUTPUT = Entry(Kind.VOCABULARY, {"lm_head.weight": "v h"}, "output_layer.weight")

# Buffers in files of old transformers versions; they follow from the configuration.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)

TABLE = Table(
    embedding=EMBEDDING,
    layer=LAYER,
    final_norm=(FINAL_NORM,),
    output=OUTPUT,
    ignored_suffixes=IGNORED_SUFFIXES,
)
