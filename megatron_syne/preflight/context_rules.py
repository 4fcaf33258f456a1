"""The rules of context parallelism: what the cut of the sequences and Transformer Engine's attention need.

Transformer Engine's limits are those of its ``context_parallel.py`` and of its own tests (2.11).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import lcm

from megatron_syne.preflight.facts import Facts, nearest, nearest_multiples

Problems = Iterator[str]

_CP = "parallel.context_parallel_size"
_TYPE = "parallel.cp_comm_type"


def sequences_are_cut_evenly(facts: Facts) -> Problems:
    """Every length is 2 x CP equal parts; with SP what a rank holds is cut over TP too."""
    parallel = facts.config.parallel
    cp = parallel.context_parallel_size
    if cp == 1:
        return
    unit, rule = 2 * cp, f"2 x {facts.at(_CP)}"
    if parallel.sequence_parallel:
        tp = parallel.tensor_model_parallel_size
        unit = cp * lcm(2, tp)
        rule += f", each rank's part one of {facts.at('parallel.tensor_model_parallel_size')} for sequence_parallel"
    for key, length in facts.seq_lengths():
        if length % unit:
            yield (
                f"{facts.named(key, length)} is not a multiple of {unit} ({rule}); "
                f"nearest legal: {nearest_multiples(length, unit)}"
            )


def exchange_needs_context_parallel(facts: Facts) -> Problems:
    """How keys and values are exchanged is asked only where they are."""
    if facts.config.parallel.cp_comm_type is not None and facts.config.parallel.context_parallel_size == 1:
        yield f"{facts.at(_TYPE)} needs {_CP} > 1; it is 1: set cp_comm_type to null"


def all_to_all_divides_heads(facts: Facts) -> Problems:
    """``a2a`` trades parts of the sequence for heads: CP divides a TP rank's query heads and KV heads."""
    parallel = facts.config.parallel
    if parallel.cp_comm_type != "a2a" or parallel.context_parallel_size == 1:
        return
    cp, tp = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    keys = ("model.num_attention_heads", "model.num_query_groups")
    counts = [max(1, facts.number(key) // tp) for key in keys]  # above the KV heads TP ranks have one each
    legal = [size for size in range(1, max(counts) + 1) if all(count % size == 0 for count in counts)]
    for key, count in zip(keys, counts, strict=True):
        if count % cp:
            yield (
                f"{facts.at(_CP)} does not divide {facts.at(key)} / TP {tp} = {count}, which cp_comm_type a2a "
                f"needs; nearest legal: {nearest(cp, legal)}, or cp_comm_type p2p or all_gather"
            )


def engine_attends_over_context(facts: Facts) -> Problems:
    """Transformer Engine: 16-bit attention alone; a window not with p2p; no packed samples, whose documents
    the engine would have to cut one by one."""
    config, model = facts.config, facts.model
    if facts.platform != "cuda" or config.parallel.context_parallel_size == 1:
        return
    if config.precision.params_dtype == "fp32":
        yield (
            f"{facts.at(_CP)} with {facts.at('precision.params_dtype')} on CUDA: Transformer Engine's attention over "
            f"CP is 16-bit; set params_dtype to bf16 or {_CP} to 1"
        )
    if model.window_size is not None and config.parallel.cp_comm_type in (None, "p2p"):
        yield (
            f"{facts.at(_TYPE)} (p2p) with {facts.at('model.window_size')} on CUDA: Transformer Engine has no sliding "
            f"window over it; set cp_comm_type to all_gather or a2a"
        )
    if config.data.reset_attention_mask:
        yield (
            f"{facts.at('data.reset_attention_mask')} with {facts.at(_CP)} on CUDA: packed sequences (THD) are "
            f"not cut over CP; set {_CP} to 1 or reset_attention_mask to false"
        )


CONTEXT_RULES: tuple[Callable[[Facts], Problems], ...] = (
    sequences_are_cut_evenly,
    exchange_needs_context_parallel,
    all_to_all_divides_heads,
    engine_attends_over_context,
)
