"""Seconds of a training step, by part, closed formulas with a few calibrated efficiencies. No torch.

``costs`` has the seconds of a layer on one rank, ``timeline`` what the pipeline adds, ``stacks`` the constants.
The busiest stage sets the pace: its work times the micro-batches, then what the pipeline, the gradients and the
optimizer add once per step.

Frozen parameters have no weight gradients, reduction or optimizer; model FLOPs (and so MFU) count them as if they
trained, as the trainer's log does. A backward pass is spared only where the engine spares it: see
:func:`_without_backward`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from megatron_syne.config.arithmetic import batch_arithmetic, resolved_overlap_p2p_comm
from megatron_syne.config.schema import ModelConfig, RunConfig
from megatron_syne.fp8.choice import layers_in_bf16
from megatron_syne.models.flops import model_flops_per_token
from megatron_syne.parallel.topology import chunk_layers, data_parallel_size
from megatron_syne.planner import costs, update
from megatron_syne.planner.costs import Pass, Rank
from megatron_syne.planner.hardware import Gpu
from megatron_syne.planner.stacks import CUDA_PLATFORM, Stack
from megatron_syne.planner.timeline import pipeline_seconds
from megatron_syne.planner.update import Trained
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
    "activation offload",
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
    """FLOP/s of one GPU that MFU is of: FP8's peak for FP8 runs, else (also where FP8 is emulated) bf16's."""
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
    stack: Stack = CUDA_PLATFORM,
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
    assert model.num_layers, "resolve_model first"
    stages = chunk_layers(parallel, model.num_layers)
    trained = update.what_trains(config, model)
    works = _stage_works(config, model, rank, stages, trained)
    forward = [work.forward.seconds for work in works]
    backward = [work.backward.seconds + work.recompute.seconds for work in works]
    slowest = max(range(len(works)), key=lambda stage: forward[stage] + backward[stage])
    work = works[slowest].forward + works[slowest].backward
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    pipeline = pipeline_seconds(m, forward, backward, chunks)
    parameters = stage_parameters(model, parallel)[slowest]
    # all stages wait for the norm of all gradients: what is frozen may leave most to update to another stage
    updated = parameters if trained is None else max(trained.numbers(rank, stages))
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
        "activation offload": m * work.host,
        "dp communication": update.dp_seconds(
            config, rank, dp, m, updated, forward[slowest], backward[slowest]
        ),
        "optimizer": update.optimizer_seconds(config, rank, dp, updated),
    }
    in_fp8 = config.precision.fp8 is not None and not config.precision.fp8_emulation
    saved = None if trained is None else _trained_of_model(model, rank, trained)
    return StepTime(
        parts=parts,
        tokens_per_step=batch.tokens_per_step,
        world_size=world_size,
        model_flops_per_token=model_flops_per_token(model, batch.seq_length),
        peak_flops=gpu.peak_flops(in_fp8),
        forward_seconds=forward,
        backward_seconds=backward,
        num_microbatches=m,
        checkpoint_seconds=update.checkpoint_bytes(config, model, saved) / checkpoint_bandwidth,
    )


@dataclass(frozen=True)
class StageWork:
    """Seconds of one micro-batch in all chunks of a stage."""

    forward: Pass
    backward: Pass
    recompute: Pass


Kind = tuple[bool, frozenset[str] | None, bool, bool]
"""What tells layers apart: whether in FP8, names of what trains in it (None = all), whether it has a backward pass,
whether its activations go to the host."""


def _stage_works(
    config: RunConfig,
    model: ModelConfig,
    rank: Rank,
    stages: list[list[list[int]]],
    trained: Trained | None,
) -> list[StageWork]:
    """The work of each stage; ``stages``: layers by stage and chunk."""
    kept = layers_in_bf16(config.precision, model.num_layers or 0)
    idle = frozenset() if trained is None else _without_backward(config, trained, stages[0][0])
    away = _offloaded_layers(config, model)

    def kind(n: int) -> Kind:
        fp8 = rank.cast_bytes > 0 and n not in kept
        return fp8, trained.layers[n] if trained is not None else None, n not in idle, n < away

    passes: dict[Kind, tuple[Pass, Pass, Pass]] = {}
    works: dict[tuple[object, int], StageWork] = {}
    found = []
    for chunks in stages:
        kinds: dict[Kind, int] = {}
        for n in (n for chunk in chunks for n in chunk):
            one = kind(n)
            kinds[one] = kinds.get(one, 0) + 1
            if one not in passes:
                passes[one] = _layer_passes(config, model, rank, n, one)
        total, again = sum(kinds.values()), _layers_again(config, chunks)
        key = tuple(kinds.items()), again
        if key not in works:
            forward, backward, recompute = (
                sum((passes[one][i] * count for one, count in kinds.items()), Pass()) for i in range(3)
            )
            works[key] = StageWork(forward, backward, recompute * (again / total if total else 0.0))
        found.append(works[key])
    forward, backward = costs.output_layer(rank, trained is None or trained.output)
    last = found[-1]
    found[-1] = StageWork(last.forward + forward, last.backward + backward, last.recompute)
    return found


def _layer_passes(
    config: RunConfig, model: ModelConfig, rank: Rank, number: int, kind: Kind
) -> tuple[Pass, Pass, Pass]:
    """Forward, backward and computed again of one layer.

    Copies to the host and back show where they take longer than the layers that they may hide behind: Transformer
    Engine spreads them evenly over all layers (``cpu_offload.py: layer_window_map``).
    """
    fp8, trained, has_backward, offloaded = kind
    forward, backward = costs.layer(rank, fp8, trained)
    if not has_backward:
        return forward, Pass(), Pass()  # and nothing is kept that could be offloaded
    again = _again(config, rank, forward, fp8)
    if offloaded:
        copy, share = update.offload_seconds(config, model, number), rank.stack.overlapped_exposed
        window = (model.num_layers or 0) / _offloaded_layers(config, model)
        forward += Pass(host=costs.showing(copy, window * forward.seconds, share))
        backward += Pass(host=costs.showing(copy, window * backward.seconds, share))
    return forward, backward, again


def _offloaded_layers(config: RunConfig, model: ModelConfig) -> int:
    """Layers, from the first, whose activations go to the host."""
    memory = config.memory
    return (memory.cpu_offloading_num_layers or (model.num_layers or 0) - 1) if memory.cpu_offloading else 0


def _without_backward(config: RunConfig, trained: Trained, first_chunk: list[int]) -> frozenset[int]:
    """Layers that no gradient passes: those of the model's first chunk below the first that trains.

    Only with a frozen embedding and nothing computed again (recomputation begins the graph at the embedding:
    ``training.param_groups``). Every later chunk computes its inputs' gradients, whatever trains below it: the
    engine's received tensors ask for them (megatron-core's ``p2p_communication``).
    """
    if trained.embedding or config.memory.recompute_granularity is not None:
        return frozenset()
    below = itertools.takewhile(lambda n: not trained.layers[n], first_chunk)
    return frozenset(below)


def _trained_of_model(model: ModelConfig, rank: Rank, trained: Trained) -> int:
    """Parameters of the Hugging Face model that train."""
    assert model.vocab_size, "resolve_model first"
    whole = replace(rank, tp=1, vocab=model.vocab_size)
    return trained.numbers(whole, [[range(model.num_layers or 0)]])[0]


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
