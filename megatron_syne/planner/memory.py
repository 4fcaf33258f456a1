"""Bytes on each rank, by component, closed formulas. No torch.

What lies there all the time is in ``model_state``, what a micro-batch keeps in ``activations`` and ``recompute``, how
many of them there are at once in ``in_flight``. Peaks that are not at the same time share their room: ``logits`` is the
peak of the output layer and the loss, ``activations`` what all saved tensors at their peak take beyond it, so that
their sum is the peak. ``tests/distributed/test_planned_memory.py`` holds each component to what small layouts allocate
on a CPU. What it takes on a GPU beyond tensors (``margin``) is assumed, not measured: each number says where it is
from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_syne.config.arithmetic import batch_arithmetic, resolved_deallocate_pipeline_outputs
from megatron_syne.config.schema import ModelConfig, RunConfig
from megatron_syne.config.stages import leg_config, stage_batch
from megatron_syne.fp8.choice import emulates_fp8, layers_in_bf16
from megatron_syne.models.family import completed
from megatron_syne.parallel.topology import chunk_layers, data_parallel_size
from megatron_syne.planner import model_state as state
from megatron_syne.planner.activations import Sizes, logits_bytes, rotary_bytes, sizes_of
from megatron_syne.planner.hardware import Gpu
from megatron_syne.planner.in_flight import Chunk, peak_bytes
from megatron_syne.planner.recompute import chunk_units

COMPONENTS = (
    "parameters",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "fp8",
    "communication",
    "margin",
)
"""Weights as computed with; gradient buffer; master weights and moments; what the backward pass waits for; logits and
loss; FP8 copies of weights; buffers of collectives; allocator fragmentation, CUDA context and NCCL."""

MIB = 2**20
CONTEXT_BYTES = 1024 * MIB
"""CUDA context, kernels and the workspaces of cuBLAS and cuDNN. Assumed: a context alone is 300 to 500 MiB with lazily
loaded kernels (PyTorch issue 107667)."""
NCCL_BYTES = {2: 544 * MIB, 3: 688 * MIB}
"""Buffers of one NCCL communicator of two, and of more ranks: measured on A100s with NVLink in NCCL issue 964."""
FRAGMENTATION = 0.05
"""Share of what comes and goes that the caching allocator cannot use again. An assumption."""
USER_BUFFERS = 8
"""Buffers of the residual stream's size that ``tp_comm_overlap`` sets up: gathers and scatters of four linear layers,
forward and backward. An assumption, not measured."""


@dataclass(frozen=True)
class RankMemory:
    """Peak bytes of one rank of a pipeline stage (all its TP, CP and DP ranks are alike)."""

    stage: int
    components: dict[str, int]
    """One of :data:`COMPONENTS` -> bytes."""

    @property
    def total(self) -> int:
        """Sum of all components."""
        return sum(self.components.values())


def memory_by_stage(
    config: RunConfig, model: ModelConfig, world_size: int, gpu: Gpu | None = None
) -> list[RankMemory]:
    """One entry per pipeline stage. ``gpu`` None = the CPU platform: local layers, no margin.

    ``model`` is the resolved one; the configuration must have passed ``preflight.rules.check``. A run of several stages
    of data takes what the one that takes most does.
    """
    model = completed(model)
    if config.data.mock or not config.data.stages:
        return _plan(config, model, world_size, gpu)
    plans = []
    for number, stage in enumerate(config.data.stages):
        own = leg_config(config, stage.name)
        batch = stage_batch(config, number)
        own = replace(
            own,
            data=replace(own.data, seq_length=stage.seq_length or config.data.seq_length),
            train=replace(own.train, global_batch_size=batch.global_batch_size),
        )
        plans.append(_plan(own, model, world_size, gpu))
    return [max(ranks, key=lambda rank: rank.total) for ranks in zip(*plans, strict=True)]


def _plan(config: RunConfig, model: ModelConfig, world_size: int, gpu: Gpu | None) -> list[RankMemory]:
    parallel = config.parallel
    dp = data_parallel_size(parallel, world_size)
    sizes = sizes_of(config, model, config.data.seq_length, config.train.micro_batch_size, gpu is not None)
    stages = chunk_layers(parallel, model.num_layers or 0)
    result = []
    for number, chunks in enumerate(state.rank_parameters(config, model)):
        replicas = dp * parallel.context_parallel_size
        buffers = state.buffer_numbers(chunks, config, number, replicas)
        fp8_numbers = _fp8_numbers(config, model, chunks)
        gathered = fp8_numbers if gpu is not None and config.precision.fp8_param_gather else 0
        stepped = state.shard(buffers, config, replicas)
        activations, logits = _activations(config, model, sizes, stages, number, dp)
        # the step of the optimizer begins when all activations are gone
        largest = max((p.size for chunk in chunks for p in chunk if p.trains), default=0)
        beyond = state.step_bytes(stepped, config, gpu is not None, largest) - activations - logits
        parts = {
            "parameters": state.weight_bytes(chunks, buffers, config, gathered),
            "gradients": buffers.padded * state.gradient_width(config),
            "optimizer": state.optimizer_bytes(stepped, config) + max(0, beyond),
            "activations": activations,
            "logits": logits,
            "fp8": _fp8_bytes(fp8_numbers, config, gpu),
            "communication": _communication(config, sizes, number, len(stages), gpu is not None),
        }
        parts["margin"] = 0 if gpu is None else _margin(config, dp, parts)
        result.append(RankMemory(number, parts))
    return result


def _activations(
    config: RunConfig,
    model: ModelConfig,
    sizes: Sizes,
    stages: Sequence[Sequence[list[int]]],
    number: int,
    dp: int,
) -> tuple[int, int]:
    """Bytes at the peak of one stage: (activations, logits)."""
    own, end = stages[number], number == len(stages) - 1
    logits = logits_bytes(config, sizes) if end else 0
    chunks = []
    for index, layers in enumerate(own):
        last = end and index == len(own) - 1
        units = chunk_units(config, model, sizes, layers, number == 0 and index == 0, last)
        chunks.append(Chunk(units, logits if last else 0, 0 if last else sizes.residual, rotary_bytes(sizes)))
    frees = resolved_deallocate_pipeline_outputs(config.parallel, "cuda" if sizes.engine else "cpu")
    count = batch_arithmetic(config, dp).num_microbatches
    peak = peak_bytes(chunks, number, len(stages), count, frees, sizes.residual)
    return peak - logits, logits


def _fp8_numbers(config: RunConfig, model: ModelConfig, chunks: Sequence[Sequence[state.Parameter]]) -> int:
    """Weights of a rank that are computed with in FP8."""
    if config.precision.fp8 is None:
        return 0
    in_bf16 = layers_in_bf16(config.precision, model.num_layers or 0)
    return sum(p.size for chunk in chunks for p in chunk if p.is_linear and p.layer not in in_bf16)


def _fp8_bytes(numbers: int, config: RunConfig, gpu: Gpu | None) -> int:
    """Copies of so many weights that are kept over a step.

    Transformer Engine: FP8, one for the forward pass and, where the GPU or the recipe wants it, one transposed
    (blockwise scaling always: Transformer Engine pull request 2168); with ``fp8_param_gather`` the first is the weight
    itself. Emulated: one, rounded, in bf16.
    """
    if gpu is None or emulates_fp8(config.precision, "cuda"):
        return numbers * state.WIDTH[config.precision.params_dtype]
    transposed = gpu.fp8_transposed or config.precision.fp8 == "blockwise"
    return numbers * (int(transposed) + (0 if config.precision.fp8_param_gather else 1))


def _communication(config: RunConfig, sizes: Sizes, stage: int, stages: int, engine: bool) -> int:
    """Buffers of collectives: SP's gathered stream (megatron-core's global memory buffer), keys and values under way
    over CP, what a pipeline stage receives while it computes."""
    parallel = config.parallel
    stream = sizes.tokens * sizes.hidden * sizes.width
    result = 0
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1:
        result += stream
        if parallel.tp_comm_overlap:
            result += USER_BUFFERS * stream
    if engine and parallel.context_parallel_size > 1:
        both = 2 * sizes.key * sizes.tokens * sizes.width
        gathers = parallel.cp_comm_type == "all_gather"
        # a ring sends one part while it receives the next, forward and backward
        result += both * (parallel.context_parallel_size if gathers else 2)
    if stages > 1:
        last = stage == stages - 1 and (parallel.virtual_pipeline_model_parallel_size or 1) == 1
        result += 0 if last else sizes.residual  # the gradient of its output
        result += sizes.residual if parallel.virtual_pipeline_model_parallel_size else 0  # the next input
    return result


def _margin(config: RunConfig, dp: int, parts: dict[str, int]) -> int:
    """What a GPU needs beside tensors: see the constants."""
    parallel = config.parallel
    tp, cp, pp = (
        parallel.tensor_model_parallel_size,
        parallel.context_parallel_size,
        parallel.pipeline_model_parallel_size,
    )
    groups = [size for size in (tp, cp, pp, dp * cp) if size > 1]
    nccl = sum(NCCL_BYTES[min(size, 3)] for size in groups)
    comes_and_goes = parts["activations"] + parts["logits"] + parts["communication"]
    return CONTEXT_BYTES + nccl + int(FRAGMENTATION * comes_and_goes)
