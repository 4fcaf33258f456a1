"""What a step pays once, whatever its micro-batches: gradients over DP, optimizer, casts of weights, checkpoint; and
what the host adds where activations or the optimizer lie there.

No torch. DP here is megatron-core's group of gradients: all ranks with the same weights, DP x CP of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from megatron_syne.config.schema import MemoryConfig, ModelConfig, OptimizerConfig, RunConfig
from megatron_syne.models import parameter_names as names
from megatron_syne.models.family import completed
from megatron_syne.planner.activations import sizes_of
from megatron_syne.planner.costs import Rank, link_seconds, memory_seconds, showing, widths
from megatron_syne.planner.model_state import WIDTH, adam_reads_gradients, gradient_width
from megatron_syne.planner.recompute import chunk_units
from megatron_syne.preflight.size import model_parameters

HOST_LINK = 25e9
"""Bytes/s between GPU and host, one direction, as all GPUs of a node see it at once (PCIe 5 x16: 63e9); assumed."""
HOST_MEMORY = 200e9
"""Bytes/s that a node's processors stream through their memory in an optimizer's step, shared by its GPUs; assumed, a
third of what two sockets of eight channels of DDR5-4800 have (614e9)."""


@dataclass(frozen=True)
class Trained:
    """What of a model trains, where something is frozen."""

    layers: tuple[frozenset[str], ...]
    """Of each layer, names within it."""
    around: frozenset[str]
    """Names outside of layers: embedding, final norm, output layer."""
    tied: bool

    @property
    def embedding(self) -> bool:
        """Whether the embedding trains."""
        return names.EMBEDDING in self.around

    @property
    def output(self) -> bool:
        """Whether the output layer's weight trains: the embedding where they are tied."""
        return (names.EMBEDDING if self.tied else names.OUTPUT) in self.around

    def numbers(self, rank: Rank, stages: Sequence[Sequence[Sequence[int]]]) -> list[int]:
        """Parameters that train on a rank of each stage; ``stages``: layers by stage and chunk."""
        sizes, bias = widths(rank), (rank.query + 2 * rank.keys) // rank.tp

        def size(name: str) -> int:
            if name in sizes:
                inputs, outputs = sizes[name]
                return inputs * outputs
            return bias if name.endswith("linear_qkv.bias") else rank.hidden

        by_kind = {kind: sum(map(size, kind)) for kind in set(self.layers)}
        counts = [sum(by_kind[self.layers[n]] for chunk in chunks for n in chunk) for chunks in stages]
        table = rank.vocab // rank.tp * rank.hidden
        counts[0] += table if self.embedding else 0
        if not (self.tied and len(stages) == 1):
            counts[-1] += table if self.output else 0
        counts[-1] += rank.hidden * len(self.around - {names.EMBEDDING, names.OUTPUT})
        return counts


def what_trains(config: RunConfig, model: ModelConfig) -> Trained | None:
    """By ``optimizer.freeze`` and ``train_only``; None = all. Raises what ``parameter_names.new_layers_of`` does."""
    freeze, only = tuple(config.optimizer.freeze), tuple(config.optimizer.train_only)
    if not freeze and not only:
        return None
    new = tuple(names.new_layers_of(config)) if names.ask_for_new_layers([*freeze, *only]) else None
    model = completed(model)
    tied, bias = bool(model.share_embeddings_and_output_weights), bool(model.add_qkv_bias)
    layers, family = model.num_layers or 0, model.model_type
    return _what_trains(freeze, only, new, layers, family, model.normalization, bias, tied)


@lru_cache(maxsize=64)
def _what_trains(
    freeze: tuple[str, ...],
    only: tuple[str, ...],
    new_layers: tuple[int, ...] | None,
    num_layers: int,
    family: Any,
    normalization: Any,
    bias: bool,
    tied: bool,
) -> Trained:
    """Asked once for a model: a search asks for hundreds of its layouts."""
    model = ModelConfig(
        num_layers=num_layers,
        model_type=family,
        normalization=normalization,
        add_qkv_bias=bias,
        share_embeddings_and_output_weights=tied,
    )
    layers: list[set[str]] = [set() for _ in range(num_layers)]
    around = set()
    for name in names.parameter_names(model):
        if names.trains(name, freeze, only, new_layers):
            parts = name.split(".", 3)
            if parts[1] == "layers":
                layers[int(parts[2])].add(parts[3])
            else:
                around.add(name)
    same: dict[frozenset[str], frozenset[str]] = {}  # one object for all layers alike, quick to compare
    alike = tuple(same.setdefault(layer, layer) for layer in map(frozenset, layers))
    return Trained(alike, frozenset(around), tied)


def weight_cast_seconds(config: RunConfig, rank: Rank, parameters: int, num_microbatches: int) -> float:
    """Casting the weights to FP8, once per step (Transformer Engine keeps them over micro-batches); FSDP: each time."""
    times = num_microbatches if rank.stack.fsdp else 1
    return times * memory_seconds(rank, float(rank.cast_bytes) * parameters)


def dp_seconds(
    config: RunConfig,
    rank: Rank,
    dp: int,
    num_microbatches: int,
    parameters: int,
    forward_seconds: float,
    backward_seconds: float,
) -> float:
    """Exchange of gradients and weights over DP that shows; ``parameters``: those that train.

    Gradients: a reduce-scatter (all-reduce: twice that) of fp32, or bf16 without
    ``accumulate_allreduce_grads_in_fp32``; weights: an all-gather with the distributed optimizer. Overlapped, they
    hide behind the backward pass of the last micro-batch and the forward pass of the next step's first, but for what
    does not fit and a small share. FSDP gathers for both passes and reduces in each micro-batch.
    """
    parallel = config.parallel
    ranks = dp * rank.cp
    if ranks == 1:
        return 0.0
    span = rank.tp * ranks
    weights = link_seconds(rank, float(rank.bytes_per_number) * parameters * (ranks - 1) / ranks, span)
    fp32 = config.precision.accumulate_allreduce_grads_in_fp32 or rank.bytes_per_number == 4
    gradients = weights * (4 if fp32 else 2) / rank.bytes_per_number
    if rank.stack.fsdp:
        each = _showing(rank, weights, forward_seconds) + _showing(
            rank, weights + gradients, backward_seconds
        )
        return num_microbatches * each
    if not parallel.use_distributed_optimizer:
        weights, gradients = 0.0, 2 * gradients
    if parallel.overlap_grad_reduce:
        gradients = _showing(rank, gradients, backward_seconds)
    if parallel.overlap_param_gather:
        weights = _showing(rank, weights, forward_seconds)
    return gradients + weights


def _showing(rank: Rank, seconds: float, behind: float) -> float:
    return showing(seconds, behind, rank.stack.overlapped_exposed)


def optimizer_seconds(config: RunConfig, rank: Rank, dp: int, parameters: int) -> float:
    """Gradients over the number of tokens, their norm, Adam on this rank's share of the state, and emptying the
    gradient buffer, by bytes moved; clipping, one more pass over the share where the norm is too large, is not counted.

    ``parameters``: those that train. What is offloaded goes to the host, is stepped at the rate of its memory, and
    comes back; with ``overlap_cpu_optimizer_d2h_h2d`` the copies hide behind the host's step, as far as it lasts.
    """
    optimizer, gradient = config.optimizer, rank.gradient_bytes
    shard = parameters / (dp * rank.cp) if config.parallel.use_distributed_optimizer else parameters
    # DDP's buffers: read and written by ``finalize_model_grads``, set to zero for the next step
    once = (3 if rank.stack.main_grads else 1) * gradient * parameters
    stepped = adam_bytes(config)
    if not optimizer.optimizer_cpu_offload:
        return memory_seconds(rank, stepped * shard + once)
    away = optimizer.optimizer_offload_fraction * shard
    copies = away * (gradient + rank.bytes_per_number) / HOST_LINK
    there = gradient + 2 * state_bytes(optimizer) + rank.bytes_per_number
    host = away * there * rank.gpu.gpus_per_node / HOST_MEMORY
    if optimizer.overlap_cpu_optimizer_d2h_h2d:
        copies = _showing(rank, copies, host)
    return memory_seconds(rank, once + gradient * away + stepped * (shard - away)) + copies + host


STEPPED = {"fp32": 8, "bf16": 24, "fp16": 40, "fp8": 22}
"""Bytes that a step moves for one number of the optimizer's state. fp32: read and written. Others go through an fp32
copy (``model_state.step_bytes``): read and copied, read and written by the kernel, rounded and copied back (bf16);
scaled by two more passes and searched for the largest by a third (fp16); the like in FP8."""


def adam_bytes(config: RunConfig) -> int:
    """Bytes moved on the GPU for one parameter by the gradient's norm and by Adam, weights written.

    Where megatron-core keeps the masters (:func:`model_state.adam_reads_gradients`) bf16 gradients are copied to fp32
    before, and the masters are read again to write the weights.
    """
    options, gradient = config.optimizer, gradient_width(config)
    width = WIDTH[config.precision.params_dtype]
    aware = options.use_precision_aware_optimizer
    kinds = [options.exp_avg_dtype, options.exp_avg_sq_dtype] if aware else ["fp32", "fp32"]
    moments = sum(STEPPED[kind] for kind in kinds)
    if adam_reads_gradients(config, True):
        return 2 * gradient + moments + STEPPED[options.main_params_dtype] + width
    copied = 0 if gradient == 4 else 2 + 4
    written = 0 if width == 4 else 4 + width
    return copied + 4 + 4 + moments + STEPPED["fp32"] + written


def offload_seconds(config: RunConfig, model: ModelConfig, layer: int) -> float:
    """To copy what one micro-batch leaves behind in a layer to host memory, or back: ``memory.cpu_offloading``."""
    plain = replace(config, memory=MemoryConfig())
    sizes = sizes_of(config, model, config.data.seq_length, config.train.micro_batch_size, True)
    parts = chunk_units(plain, model, sizes, [layer], False, False)[1:]  # without what comes into the chunk
    return sum(part.kept for part in parts) / HOST_LINK


def state_bytes(optimizer: OptimizerConfig) -> int:
    """Bytes per parameter of master weight and two moments: 12, less with the precision-aware optimizer."""
    if not optimizer.use_precision_aware_optimizer:
        return 12
    kinds = (optimizer.main_params_dtype, optimizer.exp_avg_dtype, optimizer.exp_avg_sq_dtype)
    return sum(WIDTH[kind] for kind in kinds)


def checkpoint_bytes(config: RunConfig, model: ModelConfig, trained: int | None = None) -> int:
    """Bytes of one checkpoint: weights as computed with, master weights and moments (fp32 weights are their own).

    Master weights and moments are written in fp32 whatever their format (``training.optimizer.changed_formats``).
    ``trained``: how many of the parameters train, None = all; of the others there are weights alone.
    """
    parameters = model_parameters(model)
    trained = parameters if trained is None else trained
    bf16 = config.precision.params_dtype == "bf16"
    frozen = (parameters - trained) * (2 if bf16 else 4)
    return trained * ((2 if bf16 else 0) + 12) + frozen
