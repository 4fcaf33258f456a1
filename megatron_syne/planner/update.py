"""What a step pays once, whatever its micro-batches: gradients over DP, optimizer, casts of weights, checkpoint.

No torch. DP here is megatron-core's group of gradients: all ranks with the same weights, DP x CP of them.
"""

from __future__ import annotations

from megatron_syne.config.schema import ModelConfig, OptimizerConfig, RunConfig
from megatron_syne.planner.costs import Rank, link_seconds, memory_seconds, showing
from megatron_syne.preflight.size import model_parameters

HOST_LINK = 25e9
"""Bytes/s between GPU and host, one direction, as all GPUs of a node see it at once (PCIe 5 x16: 63e9); assumed."""

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}


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
    """Exchange of gradients and weights over DP that shows.

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
    """Gradient norm, Adam on this rank's share of the state, and emptying the gradient buffer, by bytes moved; what
    is offloaded also goes to the host and back."""
    optimizer = config.optimizer
    shard = parameters / (dp * rank.cp) if config.parallel.use_distributed_optimizer else parameters
    gradient = 4 if config.precision.accumulate_allreduce_grads_in_fp32 else 2
    moved = 2 * gradient + 2 * state_bytes(optimizer) + rank.bytes_per_number
    seconds = memory_seconds(rank, moved * shard + gradient * parameters)
    if optimizer.optimizer_cpu_offload:
        copied = optimizer.optimizer_offload_fraction * shard * (gradient + rank.bytes_per_number)
        seconds += copied / HOST_LINK * (0.5 if optimizer.overlap_cpu_optimizer_d2h_h2d else 1.0)
    return seconds


def state_bytes(optimizer: OptimizerConfig) -> int:
    """Bytes per parameter of master weight and two moments: 12, less with the precision-aware optimizer."""
    if not optimizer.use_precision_aware_optimizer:
        return 12
    kinds = (optimizer.main_params_dtype, optimizer.exp_avg_dtype, optimizer.exp_avg_sq_dtype)
    return sum(_BYTES[kind] for kind in kinds)


def checkpoint_bytes(config: RunConfig, model: ModelConfig) -> int:
    """Bytes of one checkpoint: weights as computed with, master weights and moments (fp32 weights are their own)."""
    weights = 2 if config.precision.params_dtype == "bf16" else 0
    return model_parameters(model) * (weights + state_bytes(config.optimizer))
