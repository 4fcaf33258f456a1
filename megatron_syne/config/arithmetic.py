"""Batch and learning-rate arithmetic of a run, written once: for the trainer, the rules and the report.

megatron-core's ``OptimizerParamScheduler`` is stepped in samples (as Megatron-LM does), so lengths given in
iterations or tokens are turned into samples here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from megatron_syne.config.schema import ParallelConfig, RunConfig
from megatron_syne.errors import ConfigError


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


@dataclass(frozen=True)
class ScheduleSamples:
    """Lengths of the learning-rate schedule in samples, as ``OptimizerParamScheduler`` takes them."""

    warmup: int
    """``lr_warmup_steps``."""
    decay: int
    """``lr_decay_steps``: the sample at which the decay ends."""
    wsd_decay: int
    """``wsd_decay_steps``: length of the final decay of WSD; 0 = never decays."""


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


class RunLength(Protocol):
    """What the schedule asks of a plan of samples: batch and sequence length may change on the way."""

    @property
    def num_samples(self) -> int:
        """Samples of the run."""

    @property
    def train_iters(self) -> int:
        """Iterations of the run."""

    def sample_at(self, iteration: int) -> int:
        """First sample of an iteration."""

    def sample_at_tokens(self, tokens: int) -> int:
        """The least number of samples that hold so many tokens."""


def run_schedule(config: RunConfig, run: RunLength) -> ScheduleSamples:
    """Warm-up, decay end and WSD decay in samples; a warm-up in tokens is rounded up to whole samples."""
    schedule = config.schedule
    if schedule.lr_warmup_tokens is not None:
        warmup = run.sample_at_tokens(schedule.lr_warmup_tokens)
    else:
        warmup = run.sample_at(schedule.lr_warmup_iters or 0)
    end = schedule.lr_decay_iters or run.train_iters
    decay = run.sample_at(end)
    return ScheduleSamples(warmup, decay, decay - run.sample_at(end - (schedule.lr_wsd_decay_iters or 0)))


def learning_rate(config: RunConfig, samples: ScheduleSamples, consumed_samples: int) -> float:
    """Learning rate of the step that starts after ``consumed_samples`` samples.

    The formula of megatron-core 0.16.1's ``OptimizerParamScheduler.get_lr``, written out so that a dry run
    needs no torch; a test holds the two equal.
    """
    schedule, top, bottom = config.schedule, config.optimizer.lr, config.optimizer.min_lr
    at = consumed_samples
    if samples.warmup > 0 and at <= samples.warmup:
        return schedule.lr_warmup_init + (top - schedule.lr_warmup_init) * at / samples.warmup
    if schedule.lr_decay_style == "constant":
        return top
    if at > samples.decay:
        return bottom
    if schedule.lr_decay_style == "inverse-square-root":
        return max(bottom, top * math.sqrt(max(samples.warmup, 1)) / math.sqrt(max(at, 1)))
    if schedule.lr_decay_style == "WSD":
        start = samples.decay - samples.wsd_decay
        if at <= start:
            return top
        return bottom + (top - bottom) * _remaining(
            schedule.lr_wsd_decay_style, (at - start) / samples.wsd_decay
        )
    ratio = (at - samples.warmup) / (samples.decay - samples.warmup)
    return bottom + (top - bottom) * _remaining(schedule.lr_decay_style, ratio)


def _remaining(style: str, ratio: float) -> float:
    """Share of the way from min_lr to lr that is left after ``ratio`` of the decay."""
    if style == "linear":
        return 1.0 - ratio
    if style == "cosine":
        return 0.5 * (math.cos(math.pi * ratio) + 1.0)
    if style == "exponential":
        return 2.0 * math.pow(0.5, ratio) - 1.0
    if style == "minus_sqrt":
        return 1.0 - math.sqrt(ratio)
    raise ConfigError(f"schedule: unknown decay style {style!r}")


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
