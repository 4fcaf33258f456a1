"""Batch arithmetic of a run and what its pipeline options come to: for the trainer, the rules and the report."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_syne.config.schema import ParallelConfig, RunConfig


@dataclass(frozen=True)
class BatchArithmetic:
    """How one optimizer step is put together."""

    micro_batch_size: int
    data_parallel_size: int
    num_microbatches: int
    """Forward passes of one replica in one step."""
    global_batch_size: int
    seq_length: int
    tokens_per_step: int


def tokens_per_step(config: RunConfig) -> int:
    """Tokens predicted in one optimizer step: global batch x sequence length."""
    return config.train.global_batch_size * config.data.seq_length


def batch_arithmetic(config: RunConfig, data_parallel_size: int) -> BatchArithmetic:
    """Micro-batches and tokens of one step; the sizes must have passed ``rules.check``."""
    train = config.train
    return BatchArithmetic(
        micro_batch_size=train.micro_batch_size,
        data_parallel_size=data_parallel_size,
        num_microbatches=train.global_batch_size // (train.micro_batch_size * data_parallel_size),
        global_batch_size=train.global_batch_size,
        seq_length=config.data.seq_length,
        tokens_per_step=tokens_per_step(config),
    )


def resolved_overlap_p2p_comm(parallel: ParallelConfig) -> bool:
    """Whether pipeline messages overlap with computation; not given = exactly with VPP.

    The 1F1B schedule of megatron-core refuses it, the interleaved one needs it at PP 2.
    """
    if parallel.overlap_p2p_comm is not None:
        return parallel.overlap_p2p_comm
    return parallel.virtual_pipeline_model_parallel_size is not None


def resolved_deallocate_pipeline_outputs(parallel: ParallelConfig, platform: str) -> bool:
    """Whether a stage's output is freed once it is sent; not given = yes, but for VPP on the CPU platform.

    With VPP the output is freed while the send is under way: safe in the stream order of NCCL, not with
    gloo, which then sends freed memory.
    """
    if parallel.deallocate_pipeline_outputs is not None:
        return parallel.deallocate_pipeline_outputs
    return parallel.virtual_pipeline_model_parallel_size is None or platform == "cuda"
