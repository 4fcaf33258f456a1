"""Qwen2: Llama's tensors and a bias on query, key and value, interleaved by query group like their weights."""

from __future__ import annotations

from dataclasses import replace

from megatron_syne.convert.families import llama
from megatron_syne.convert.pieces import Entry, Kind

QKV_BIAS = Entry(
    Kind.FUSED_QKV,
    {
        "model.layers.{layer}.self_attn.q_proj.bias": "n*d",
        "model.layers.{layer}.self_attn.k_proj.bias": "g*d",
        "model.layers.{layer}.self_attn.v_proj.bias": "g*d",
    },
    "decoder.layers.{layer}.self_attention.linear_qkv.bias",
)

TABLE = replace(llama.TABLE, layer=(*llama.LAYER, QKV_BIAS))
