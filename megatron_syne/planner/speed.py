"""Seconds of a training step, by part, closed formulas with a few calibrated efficiencies. No torch.

``costs`` has the seconds of a layer on one rank, ``timeline`` what the pipeline adds, ``stacks`` the constants.
The busiest stage sets the pace: its work times the micro-batches, then what the pipeline, the gradients and the
optimizer add once per step.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_syne.config.arithmetic import batch_arithmetic, resolved_overlap_p2p_comm
from megatron_syne.config.schema import ModelConfig, RunConfig
from megatron_syne.fp8.choice import layers_in_bf16
from megatron_syne.models.flops import model_flops_per_token
from megatron_syne.parallel.topology import chunk_layers, data_parallel_size
from megatron_syne.planner import costs, update
from megatron_syne.planner.costs import Pass, Rank
from megatron_syne.planner.hardware import Gpu
from megatron_syne.planner.stacks import MEGATRON, Stack
from megatron_syne.planner.timeline import pipeline_seconds
from megatron_syne.preflight.size import stage_parameters

PARTS = (
    "matrices",
    "attention",
    "elementwise",
    "recompute",
    "tp communication",
    "cp communication",
    "pipeline bubble",
    "pipeline communication",
    "dp communication",
    "optimizer",
)
"""Parts of a step as one GPU of the busiest stage spends them; communication is the exposed part alone."""


@dataclass(frozen=True)
class StepTime:
    """What a step takes and what follows from it."""

    parts: dict[str, float]
    """One of :data:`PARTS` -> seconds."""
    tokens_per_step: int
    world_size: int
    model_flops_per_token: float
    peak_flops: float
    """FLOP/s of one GPU that MFU is of: FP8's peak for FP8 runs, else bf16's."""
    forward_seconds: list[float]
    """Of one micro-batch in each stage (all its chunks), without waiting."""
    backward_seconds: list[float]
    """The same, with what is computed again."""
    num_microbatches: int
    checkpoint_seconds: float
    """To write one checkpoint at ``checkpoint_bandwidth``."""

    @property
    def seconds(self) -> float:
        """Of one step."""
        return sum(self.parts.values())

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Tokens/s/GPU."""
        return self.tokens_per_step / self.seconds / self.world_size

    @property
    def model_flops_per_second_per_gpu(self) -> float:
        """Model FLOP/s/GPU: ``models.flops`` counts."""
        return self.tokens_per_second_per_gpu * self.model_flops_per_token

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, 0 to 1."""
        return self.model_flops_per_second_per_gpu / self.peak_flops

    @property
    def bubble(self) -> float:
        """Share of the step that the busiest stage waits for the pipeline to fill and drain."""
        return self.parts["pipeline bubble"] / self.seconds


def step_time(
    config: RunConfig,
    model: ModelConfig,
    world_size: int,
    gpu: Gpu,
    *,
    stack: Stack = MEGATRON,
    checkpoint_bandwidth: float = 10e9,
) -> StepTime:
    """The prediction; ``model`` is the resolved one, the configuration must have passed ``preflight.rules.check``.

    ``stack`` is ours but for the published rows of others; ``checkpoint_bandwidth`` is the file system's, bytes/s for
    the whole job.
    """
    rank = costs.rank_of(config, model, gpu, stack)
    parallel = config.parallel
    dp = data_parallel_size(parallel, world_size)
    batch = batch_arithmetic(config, dp)
    m = batch.num_microbatches
    works = _stage_works(config, model, rank)
    forward = [work.forward.seconds for work in works]
    backward = [work.backward.seconds + work.recompute.seconds for work in works]
    slowest = max(range(len(works)), key=lambda stage: forward[stage] + backward[stage])
    work = works[slowest].forward + works[slowest].backward
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    pipeline = pipeline_seconds(m, forward, backward, chunks)
    parameters = stage_parameters(model, parallel)[slowest]
    computing = forward[slowest] + backward[slowest]
    parts = {
        "matrices": m * work.matrices,
        "attention": m * work.attention,
        "elementwise": m * work.elementwise + update.weight_cast_seconds(config, rank, parameters, m),
        "recompute": m * works[slowest].recompute.seconds,
        "tp communication": m * work.tp,
        "cp communication": m * work.cp,
        "pipeline bubble": pipeline - m * computing,
        "pipeline communication": _p2p_seconds(config, rank, dp, m),
        "dp communication": update.dp_seconds(
            config, rank, dp, m, parameters, forward[slowest], backward[slowest]
        ),
        "optimizer": update.optimizer_seconds(config, rank, dp, parameters),
    }
    peak = gpu.fp8_flops if config.precision.fp8 and gpu.fp8_flops else gpu.bf16_flops
    return StepTime(
        parts=parts,
        tokens_per_step=batch.tokens_per_step,
        world_size=world_size,
        model_flops_per_token=model_flops_per_token(model, batch.seq_length),
        peak_flops=peak,
        forward_seconds=forward,
        backward_seconds=backward,
        num_microbatches=m,
        checkpoint_seconds=update.checkpoint_bytes(config, model) / checkpoint_bandwidth,
    )


@dataclass(frozen=True)
class StageWork:
    """Seconds of one micro-batch in all chunks of a stage."""

    forward: Pass
    backward: Pass
    recompute: Pass


def _stage_works(config: RunConfig, model: ModelConfig, rank: Rank) -> list[StageWork]:
    """The work of each stage."""
    assert model.num_layers, "resolve_model first"
    stages = chunk_layers(config.parallel, model.num_layers)
    kept = layers_in_bf16(config.precision, model.num_layers)
    plain = costs.layer(rank) if kept or not rank.cast_bytes else None
    cast = costs.layer(rank, True) if rank.cast_bytes else None
    # by format: forward, backward and again of one layer
    kinds = [
        (*layer, _again(config, rank, layer[0], fp8)) if layer is not None else (Pass(), Pass(), Pass())
        for fp8, layer in ((False, plain), (True, cast))
    ]
    works: dict[tuple[int, int, int], StageWork] = {}
    found = []
    for chunks in stages:
        total = sum(map(len, chunks))
        bf16 = total if cast is None else sum(n in kept for chunk in chunks for n in chunk) if kept else 0
        key = (total, bf16, _layers_again(config, chunks))
        if key not in works:
            share = key[2] / total if total else 0.0
            works[key] = StageWork(
                kinds[0][0] * bf16 + kinds[1][0] * (total - bf16),
                kinds[0][1] * bf16 + kinds[1][1] * (total - bf16),
                (kinds[0][2] * bf16 + kinds[1][2] * (total - bf16)) * share,
            )
        found.append(works[key])
    forward, backward = costs.output_layer(rank)
    last = found[-1]
    found[-1] = StageWork(last.forward + forward, last.backward + backward, last.recompute)
    return found


def _layers_again(config: RunConfig, chunks: list[list[int]]) -> int:
    """Layers of a stage of which something is computed again."""
    memory = config.memory
    if memory.recompute_granularity == "full" and memory.recompute_method == "block":
        each = memory.recompute_num_layers
        return sum(len(chunk) if each is None else min(each, len(chunk)) for chunk in chunks)
    return sum(map(len, chunks))


def _again(config: RunConfig, rank: Rank, forward: Pass, fp8: bool) -> Pass:
    """What of a layer's forward pass is computed again in the backward pass."""
    granularity = config.memory.recompute_granularity
    if granularity == "full":
        return forward
    if rank.stack.selective_ops:
        return Pass(matrices=forward.matrices / 2, elementwise=forward.elementwise)
    if granularity is None:
        return Pass()
    again = Pass()
    for module in config.memory.recompute_modules or ["core_attn"]:
        if module == "core_attn":
            again += Pass(attention=forward.attention)
        elif module == "mlp":
            again += costs.feed_forward(rank, fp8)
        elif module == "layernorm":
            again += costs.norms(rank)
    return again


def _p2p_seconds(config: RunConfig, rank: Rank, dp: int, num_microbatches: int) -> float:
    """Waiting for sends between stages, beyond the bubble, in a pipeline of equal stages.

    1F1B passes a micro-batch on and waits for its return: ``2 (p - 1) / p`` sends per micro-batch show, and
    ``2 (p - 2)`` more to fill and drain. Interleaved with overlapped sends, only filling and draining show them,
    ``2 (p v - 1)``; without overlap, each does. Neighbouring stages are TP x CP x DP ranks apart.
    """
    parallel = config.parallel
    p, v = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    if p == 1:
        return 0.0
    size = float(rank.tokens) * rank.hidden * rank.bytes_per_number
    if rank.sequence_parallel:
        size /= rank.tp
    one = costs.link_seconds(rank, size, 2 * rank.tp * rank.cp * dp)
    m = num_microbatches
    if v == 1:
        return (2 * (p - 1) * m / p + 2 * (p - 2)) * one
    if resolved_overlap_p2p_comm(parallel):
        return 2 * (p * v - 1) * one
    return 2 * m * v * one
