"""What a measurement on a GPU is: its shape, options, time limit and prediction. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One measurement."""

    name: str
    kind: str = "ours"
    """One of :data:`MODULES`: ``ours``, ``transformers``, ``compiled``, ``machine``, ``profile``, ``loader``,
    ``host``, ``stall``."""
    num_layers: int = 8
    seq_length: int = 8192
    precision: str = "bf16"
    micro_batch_size: int = 1
    global_batch_size: int = 1
    steps: int = 25
    """Measured, after ``warm`` others."""
    warm: int = 5
    overrides: tuple[str, ...] = ()
    """Options of the run, ``section.field=value``; of ours alone."""
    engine: tuple[tuple[str, object], ...] = ()
    """megatron-core's ``TransformerConfig`` fields put over those of the CUDA platform: what is tried out, and has no
    option of ours until it is found to pay. Of a peer: its own options."""
    environment: tuple[tuple[str, str], ...] = ()
    """Variables of the process."""
    baseline: str | None = None
    """The case that this one is a change of."""
    prediction: str = ""
    """What the change was expected to do, written down before it was measured."""
    minutes: float = 2.0
    """It is ended after so long; most take a third of that."""
    real_text: bool = False
    """On the text that ``--text`` names, where it is given; else random tokens."""
    needs_gib: int = 0
    """GPU memory below which it is not tried."""


HIDDEN, FFN, HEADS, GROUPS, VOCABULARY = 4096, 14336, 32, 8, 128256
"""Llama-3-8B's layer."""

TINY = {
    "hidden_size": 64,
    "ffn_hidden_size": 192,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "vocab_size": 2048,
}
"""In place of Llama-3-8B's, in a rehearsal."""

MODULES = {
    "ours": "ours",
    "machine": "machine",
    "transformers": "peer_transformers",
    "compiled": "peer_compiled",
    "profile": "profile_step",
    "loader": "loader_step",
    "host": "host_step",
    "stall": "stall",
}
"""The module of this folder that measures a kind (never named as a package: its folder comes first in the path)."""

FP8 = ("tensorwise", "delayed", "blockwise")

FULL_RECOMPUTE = (
    "memory.recompute_granularity=full",
    "memory.recompute_method=uniform",
    "memory.recompute_num_layers=1",
)
HALF_RECOMPUTE = (
    "memory.recompute_granularity=full",
    "memory.recompute_method=block",
    "memory.recompute_num_layers=16",
)
CHUNKED_LOSS = ("memory.loss_chunk_tokens=2048",)
BF16_GRADIENTS = (
    "precision.accumulate_allreduce_grads_in_fp32=false",
    "optimizer.use_precision_aware_optimizer=true",
    "optimizer.main_grads_dtype=bf16",
)
BF16_MOMENTS = ("optimizer.exp_avg_dtype=bf16", "optimizer.exp_avg_sq_dtype=bf16")
GROWING_SEGMENTS = (("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"),)
