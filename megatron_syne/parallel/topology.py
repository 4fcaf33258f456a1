"""The rank grid and the layers of each pipeline stage, as pure functions of the configuration.

megatron-core computes the same things for itself; here they are known before a process is started (for
conversion, validation and ``--dry-run``). ``tests/distributed`` holds the two to the same answer.
No torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_syne.config.schema import ParallelConfig
from megatron_syne.errors import ConfigError

_LONGEST_LAYOUT = 100_000


@dataclass(frozen=True)
class Coordinates:
    """Place of one rank: its index along each axis."""

    tp: int
    cp: int
    dp: int
    pp: int


def model_parallel_size(parallel: ParallelConfig) -> int:
    """Ranks that hold one copy of the model (and of a sequence): TP x PP x CP."""
    return (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """DP for a world size; raises ConfigError where TP x PP x CP (x DP) does not give that world size."""
    block = model_parallel_size(parallel)
    wanted = parallel.data_parallel_size
    factors = (
        f"tensor {parallel.tensor_model_parallel_size} x pipeline {parallel.pipeline_model_parallel_size}"
        f" x context {parallel.context_parallel_size}"
    )
    if wanted is not None and block * wanted != world_size:
        raise ConfigError(
            f"world size {world_size} is not {factors} x data {wanted} = {block * wanted}; "
            f"start {block * wanted} processes or change the parallel sizes"
        )
    if world_size % block:
        lower, upper = world_size // block * block, (world_size // block + 1) * block
        near = f"{lower} or {upper}" if lower else f"{upper}"
        raise ConfigError(
            f"world size {world_size} is not a multiple of {factors} = {block}; "
            f"start {near} processes or change the parallel sizes"
        )
    return world_size // block


def world_size_of(parallel: ParallelConfig) -> int:
    """World size that the configuration asks for (DP = 1 where it is not given)."""
    return model_parallel_size(parallel) * (parallel.data_parallel_size or 1)


def coordinates(rank: int, parallel: ParallelConfig, world_size: int) -> Coordinates:
    """Coordinates of a rank, in megatron-core's default order tp-cp-dp-pp (tp varies fastest)."""
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    dp = data_parallel_size(parallel, world_size)
    return Coordinates(tp=rank % tp, cp=rank // tp % cp, dp=rank // (tp * cp) % dp, pp=rank // (tp * cp * dp))


def chunk_layers(parallel: ParallelConfig, num_layers: int) -> list[list[list[int]]]:
    """Global layer numbers (from 0) of each model chunk: ``result[pp_rank][vp_stage] -> [layer, ...]``.

    Chunk (0, 0) also holds the embedding, the last chunk of the last stage the final norm and the output
    layer. Raises ConfigError where the layers cannot be laid out so.
    """
    pp = parallel.pipeline_model_parallel_size
    vpp = parallel.virtual_pipeline_model_parallel_size or 1
    if parallel.pipeline_model_parallel_layout is not None:
        return _explicit_layout(parallel.pipeline_model_parallel_layout, pp, parallel, num_layers)
    if pp > num_layers:
        raise ConfigError(
            f"parallel.pipeline_model_parallel_size: {pp} stages for {num_layers} layers; "
            f"use at most {num_layers}"
        )
    counts = _stage_counts(parallel, pp, num_layers)
    for stage, count in enumerate(counts):
        if count % vpp or count == 0:
            raise ConfigError(
                f"parallel.virtual_pipeline_model_parallel_size: stage {stage} has {count} layers, which "
                f"{vpp} chunks do not divide; use a size that divides {sorted(set(counts))} or give "
                f"parallel.pipeline_model_parallel_layout"
            )
    chunks: list[list[list[int]]] = [[[] for _ in range(vpp)] for _ in range(pp)]
    layer = 0
    for vp in range(vpp):  # interleaved: the model passes all stages once per chunk
        for stage in range(pp):
            size = counts[stage] // vpp
            chunks[stage][vp] = list(range(layer, layer + size))
            layer += size
    return chunks


def _stage_counts(parallel: ParallelConfig, pp: int, num_layers: int) -> list[int]:
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    if pp == 1:
        return [num_layers]
    rest = num_layers - (first or 0) - (last or 0)
    middle = pp - (first is not None) - (last is not None)
    if rest < 0 or (middle == 0 and rest) or (middle and rest % middle):
        what = "" if first is None and last is None else f" (first stage {first}, last stage {last})"
        raise ConfigError(
            f"parallel.pipeline_model_parallel_size: {num_layers} layers do not divide evenly over {pp} "
            f"stages{what}: {rest} left for {middle}; choose a size that divides, or set "
            f"num_layers_in_first_pipeline_stage / num_layers_in_last_pipeline_stage / "
            f"pipeline_model_parallel_layout"
        )
    counts = [rest // middle if middle else 0] * pp
    if first is not None:
        counts[0] = first
    if last is not None:
        counts[-1] = last
    return counts


def expand_layout(text: str) -> list[str]:
    """Chunks of a layout string as strings of ``E``, ``t``, ``L``; understands ``t*3`` and ``(t|)*2``.

    Raises ConfigError past 100,000 characters: no model has so many layers, but a hostile file might say so.
    """

    def repeat(match: re.Match[str]) -> str:
        if len(match[2]) > 6 or len(match[1]) * int(match[2]) > _LONGEST_LAYOUT:
            raise ConfigError(f"parallel.pipeline_model_parallel_layout: {match[0][:40]!r} repeats too often")
        return match[1] * int(match[2])

    previous = None
    while previous != text:  # innermost first, so that nested groups come apart
        previous = text
        text = re.sub(r"\(([^()]*)\)\*(\d+)", repeat, text)
        text = re.sub(r"([A-Za-z])\*(\d+)", repeat, text)
        if len(text) > _LONGEST_LAYOUT:
            raise ConfigError("parallel.pipeline_model_parallel_layout: expands to over 100,000 characters")
    return text.replace(",", "").replace(" ", "").split("|")


def _explicit_layout(text: str, pp: int, parallel: ParallelConfig, num_layers: int) -> list[list[list[int]]]:
    name = "parallel.pipeline_model_parallel_layout"
    parts = expand_layout(text)
    flat = "".join(parts)
    if len(parts) % pp:
        raise ConfigError(f"{name}: {text!r} has {len(parts)} parts, not a multiple of {pp} pipeline stages")
    vpp = len(parts) // pp
    given = parallel.virtual_pipeline_model_parallel_size or 1
    if given != vpp:
        raise ConfigError(
            f"{name}: {text!r} has {len(parts)} parts = {pp} stages x {vpp} chunks, but "
            f"virtual_pipeline_model_parallel_size is {given}; set it to {vpp}"
        )
    shape_ok = flat[:1] == "E" and flat[-1:] == "L" and set(flat) <= set("EtL")
    if not shape_ok or flat.count("t") != num_layers:
        raise ConfigError(
            f"{name}: {text!r} must start with E (embedding), end with L (loss) and hold {num_layers} "
            f"layers t; found {flat.count('t')}"
        )
    chunks: list[list[list[int]]] = [[[] for _ in range(vpp)] for _ in range(pp)]
    layer = 0
    for index, part in enumerate(parts):
        count = part.count("t")
        chunks[index % pp][index // pp] = list(range(layer, layer + count))
        layer += count
    return chunks


def rank_grid(parallel: ParallelConfig, num_layers: int, world_size: int) -> str:
    """A table for people: each rank with its coordinates and the layers that it holds."""
    chunks = chunk_layers(parallel, num_layers)
    lines = [f"{'rank':>5} {'tp':>3} {'cp':>3} {'dp':>3} {'pp':>3}  holds"]
    last = parallel.pipeline_model_parallel_size - 1
    for rank in range(world_size):
        at = coordinates(rank, parallel, world_size)
        parts = []
        for vp, layers in enumerate(chunks[at.pp]):
            text = f"layers {layers[0]}-{layers[-1]}" if layers else "no layer"
            if at.pp == 0 and vp == 0:
                text = "embedding, " + text
            if at.pp == last and vp == len(chunks[at.pp]) - 1:
                text += ", output"
            parts.append(text)
        lines.append(f"{rank:>5} {at.tp:>3} {at.cp:>3} {at.dp:>3} {at.pp:>3}  {' | '.join(parts)}")
    return "\n".join(lines)
