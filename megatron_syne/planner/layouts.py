"""The layouts that a search compares: TP x PP x VPP x CP x DP x micro-batch x recompute, legal by the trainer's own
rules, within the limits that :func:`layouts` states. No torch."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import gcd
from typing import Any

from megatron_syne.config.schema import MemoryConfig, ModelConfig, ParallelConfig, RunConfig
from megatron_syne.parallel.topology import chunk_layers
from megatron_syne.planner.shapes import Shape
from megatron_syne.preflight.context_rules import CONTEXT_RULES
from megatron_syne.preflight.data_rules import documents_are_told_apart, sequences_fit
from megatron_syne.preflight.facts import Facts, PlatformName
from megatron_syne.preflight.fp8_rules import (
    fp8_dimensions_fit,
    fp8_layers_in_bf16_exist,
    fp8_tiles_are_whole,
)
from megatron_syne.preflight.memory_rules import (
    MEMORY_RULES,
    activations_can_be_offloaded,
    recompute_layers_fit_chunks,
    recompute_modules_exist,
)
from megatron_syne.preflight.rules import Rule, batch_divides, tensor_parallel_divides

Overrides = dict[str, Any]
"""Dotted option -> value."""
Layout = tuple[RunConfig, Overrides]
"""A configuration, and what was set in it."""

LARGEST_MICRO_BATCH = 8
FEWEST_TOKENS = 1024
"""Of a sequence on one CP rank: below that the exchange of keys and values has nothing to hide behind."""

RECOMPUTE: dict[str, Overrides] = {
    "none": {},
    "core_attn": {"granularity": "selective", "modules": ["core_attn"]},
    "layernorm": {"granularity": "selective", "modules": ["layernorm"]},
    "mlp": {"granularity": "selective", "modules": ["mlp"]},
    "layernorm and mlp": {"granularity": "selective", "modules": ["layernorm", "mlp"]},
    "half of the layers": {"granularity": "full", "method": "block"},
    "all layers": {"granularity": "full", "method": "uniform"},
}
"""The choices of recompute that are compared, from the least to the most."""

SEARCHED = ("none", "mlp", "half of the layers", "all layers")
"""Those that a search tries. Fused attention keeps next to nothing, and Transformer Engine's norms are part of the
products behind them, which the engine does not compute again: ``core_attn`` and ``layernorm`` only cost time."""

RECOMPUTE_RULES: tuple[Rule, ...] = (
    recompute_modules_exist,
    recompute_layers_fit_chunks,
    activations_can_be_offloaded,
)
LAYOUT_RULES: tuple[Rule, ...] = (
    batch_divides,
    documents_are_told_apart,
    sequences_fit,
    fp8_dimensions_fit,
    fp8_layers_in_bf16_exist,
    fp8_tiles_are_whole,
    *CONTEXT_RULES,
    *(rule for rule in MEMORY_RULES if rule not in RECOMPUTE_RULES),
)
"""The trainer's rules that look at what a search changes and are not met by how the candidates are made."""


def recompute_options(name: str, layers_of_chunk: int) -> Overrides:
    """All recompute options of ``memory`` for one of :data:`RECOMPUTE`, the largest chunk having that many layers."""
    given = RECOMPUTE[name]
    return {
        "memory.recompute_granularity": given.get("granularity"),
        "memory.recompute_method": given.get("method"),
        "memory.recompute_num_layers": max(1, layers_of_chunk // 2)
        if given.get("method") == "block"
        else None,
        "memory.recompute_modules": list(given.get("modules", [])),
    }


def recompute_name(memory: MemoryConfig) -> str:
    """What is recomputed, in the words of :data:`RECOMPUTE` where it is one of them."""
    if memory.recompute_granularity is None:
        return "none"
    if memory.recompute_granularity == "selective":
        modules = sorted(memory.recompute_modules) or ["core_attn"]
        return " and ".join(modules)
    if memory.recompute_method == "uniform":
        size = memory.recompute_num_layers or 1
        return "all layers" if size == 1 else f"all layers, {size} at a time"
    if memory.recompute_num_layers is None:
        return "all layers, block"
    count = memory.recompute_num_layers
    return f"{count} layer{'' if count == 1 else 's'} of a chunk"


def largest_chunk(parallel: ParallelConfig, num_layers: int) -> int:
    """Layers of the largest model chunk."""
    return max(len(chunk) for stage in chunk_layers(parallel, num_layers) for chunk in stage)


def changed(config: RunConfig, overrides: Mapping[str, Any]) -> RunConfig:
    """The configuration with dotted options (``section.option``) put in."""
    result = copy.copy(config)
    sections: dict[str, Overrides] = {}
    for key, value in overrides.items():
        section, option = key.split(".")
        sections.setdefault(section, {})[option] = value
    for section, values in sections.items():
        setattr(result, section, replace(getattr(result, section), **values))
    return result


def layouts(
    config: RunConfig,
    model: ModelConfig,
    stages: Sequence[Shape],
    world_size: int,
    gpus_per_node: int,
    platform: PlatformName,
    recompute: Sequence[str] = SEARCHED,
    largest_micro_batch: int = LARGEST_MICRO_BATCH,
) -> Iterator[Layout]:
    """Every legal layout within limits; what it does not set stays as in ``config``. Micro-batches, then recompute,
    rise last.

    The limits: TP stays within a node, micro-batches are at most 8, a CP rank has at least 1,024 tokens of the longest
    sequence, recompute is one of :data:`SEARCHED`. SP goes with TP. Layers that PP does not divide are dealt out with
    one less on the first and on the last stage, where that makes it even.
    """
    assert model.num_layers
    longest = max(config.data.seq_length, *(stage.seq_length for stage in stages))
    for tp in _divisors(world_size, gpus_per_node):
        if not _keeps((tensor_parallel_divides,), Facts(_with_tp(config, tp), model, world_size, platform)):
            continue
        for pp in _divisors(world_size // tp, model.num_layers):
            for cp in _divisors(world_size // (tp * pp), max(1, longest // FEWEST_TOKENS)):
                dp = world_size // (tp * pp * cp)
                for cut in _cuts(model.num_layers, pp):
                    overrides = {
                        "parallel.tensor_model_parallel_size": tp,
                        "parallel.pipeline_model_parallel_size": pp,
                        "parallel.virtual_pipeline_model_parallel_size": None,
                        "parallel.context_parallel_size": cp,
                        "parallel.data_parallel_size": dp,
                        "parallel.sequence_parallel": tp > 1,
                        "parallel.num_layers_in_first_pipeline_stage": None,
                        "parallel.num_layers_in_last_pipeline_stage": None,
                        "parallel.pipeline_model_parallel_layout": None,
                        **_without_object(config, tp, cp, cut),
                        **cut,
                    }
                    cut_up = changed(config, overrides)
                    choices = list(recompute_choices(cut_up, model, world_size, platform, recompute))
                    for micro in _micro_batches(config, stages, overrides, largest_micro_batch):
                        if gcd(micro, cp) > 1:
                            continue  # half of both has the same tokens on a rank, and less to exchange
                        own = overrides | {"train.micro_batch_size": micro}
                        if _legal(
                            changed(cut_up, {"train.micro_batch_size": micro}),
                            model,
                            stages,
                            world_size,
                            platform,
                        ):
                            yield from ((changed(config, own | choice), own | choice) for choice in choices)


def _micro_batches(
    config: RunConfig, stages: Sequence[Shape], overrides: Overrides, most: int
) -> Iterator[int]:
    """Those that every batch of the run is a multiple of, with DP and, interleaved, PP."""
    unit = overrides["parallel.data_parallel_size"]
    if overrides["parallel.virtual_pipeline_model_parallel_size"]:
        unit *= overrides["parallel.pipeline_model_parallel_size"]
    batches = {size for stage in stages for size, _ in stage.batches} | {config.train.global_batch_size}
    for micro in _divisors(min(batches), most):
        if all(batch % (micro * unit) == 0 for batch in batches):
            yield micro


def recompute_choices(
    config: RunConfig, model: ModelConfig, world_size: int, platform: PlatformName, names: Sequence[str]
) -> Iterator[Overrides]:
    """The options of each of the names (of :data:`RECOMPUTE`) that is legal for a cut of the model."""
    assert model.num_layers
    layers = largest_chunk(config.parallel, model.num_layers)
    for name in names:
        options = recompute_options(name, layers)
        if name == "half of the layers" and layers == 1:
            continue  # half of one is all
        if _keeps(RECOMPUTE_RULES, Facts(changed(config, options), model, world_size, platform)):
            yield options


def _legal(
    config: RunConfig, model: ModelConfig, stages: Sequence[Shape], world_size: int, platform: PlatformName
) -> bool:
    """Whether a layout passes the trainer's rules of layouts: of the run, and of each stage with its own batch."""
    return _keeps(LAYOUT_RULES, Facts(config, model, world_size, platform)) and all(
        _keeps((batch_divides,), Facts(stage.view(config, size), model, world_size, platform))
        for stage in stages
        if stage.micro_batch_size
        for size, _ in stage.batches
    )


def _with_tp(config: RunConfig, tp: int) -> RunConfig:
    return changed(config, {"parallel.tensor_model_parallel_size": tp})


def _keeps(rules: Sequence[Rule], facts: Facts) -> bool:
    return all(next(rule(facts), None) is None for rule in rules)


def _cuts(num_layers: int, pp: int) -> Iterator[Overrides]:
    """The ways of dealing layers to ``pp`` stages: plain and interleaved."""
    first, last, vpp = (
        "parallel.num_layers_in_first_pipeline_stage",
        "parallel.num_layers_in_last_pipeline_stage",
        "parallel.virtual_pipeline_model_parallel_size",
    )
    if num_layers % pp == 0:
        yield {}
        for chunks in range(2, num_layers // pp + 1) if pp > 1 else ():
            if num_layers // pp % chunks == 0:
                yield {vpp: chunks}
    elif (num_layers + 2) % pp == 0 and (num_layers + 2) // pp > 1:
        ends = (num_layers + 2) // pp - 1
        yield {first: ends, last: ends}


def _without_object(config: RunConfig, tp: int, cp: int, cut: Overrides) -> Overrides:
    """Options of the configuration that a layout leaves without an object, set to their defaults."""
    parallel = config.parallel
    found: Overrides = {}
    if tp == 1 and parallel.tp_comm_overlap:
        found["parallel.tp_comm_overlap"] = False
    if cp == 1 and parallel.cp_comm_type is not None:
        found["parallel.cp_comm_type"] = None
    if parallel.overlap_p2p_comm is not None:
        found["parallel.overlap_p2p_comm"] = None
    if config.memory.distribute_saved_activations:  # SP, which goes with TP, has cut them already
        found["memory.distribute_saved_activations"] = False
    return found


def _divisors(number: int, most: int) -> list[int]:
    return [size for size in range(1, min(number, most) + 1) if number % size == 0]
