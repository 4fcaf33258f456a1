"""INF-34B: Llama's tensors, and a bias to each norm; the norms' weights are kept less 1 in training."""

from __future__ import annotations

from dataclasses import replace

from megatron_syne.convert.families import llama
from megatron_syne.convert.pieces import Entry, Kind


def _norm(hf: str, megatron: str, te: str | None = None) -> tuple[Entry, Entry]:
    """Weight, zero-centred in training, and bias; the names without ``weight`` and ``bias``."""
    weight, bias = (
        Entry(
            Kind.DIRECT,
            {f"{hf}.{part}": "h"},
            f"{megatron}.{part}",
            te=None if te is None else f"{te}layer_norm_{part}",
        )
        for part in ("weight", "bias")
    )
    return replace(weight, shift=-1.0), bias


_HF, _MEGATRON = "model.layers.{layer}", "decoder.layers.{layer}"

TABLE = replace(
    llama.TABLE,
    layer=(
        *_norm(
            f"{_HF}.input_layernorm",
            f"{_MEGATRON}.input_layernorm",
            f"{_MEGATRON}.self_attention.linear_qkv.",
        ),
        *_norm(
            f"{_HF}.post_attention_layernorm",
            f"{_MEGATRON}.pre_mlp_layernorm",
            f"{_MEGATRON}.mlp.linear_fc1.",
        ),
        *(entry for entry in llama.LAYER if entry.kind is not Kind.DIRECT),
    ),
    final_norm=_norm("model.norm", "decoder.final_layernorm"),
)
