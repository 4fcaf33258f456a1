"""What of a step is logged, and what is read off the plan for it: the same for every watcher."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_syne.training.trainer import Trainer


def tokens_read(trainer: Trainer) -> dict[str, float]:
    """``tokens/<source>``: tokens read of each source since the start of the run."""
    consumed = trainer.train_data.consumed(trainer.state.consumed_samples)
    return {f"tokens/{source}": float(tokens) for source, tokens in consumed.items()}


def mixture_shares(trainer: Trainer) -> dict[str, float]:
    """``mixture/<source>``: share of each source in the step just done."""
    plan = trainer.train_data.plan
    shares = plan.segment_at(trainer.state.consumed_samples - 1).shares
    return {f"mixture/{source}": share for source, share in zip(plan.sources, shares, strict=True)}


def stage_of(trainer: Trainer) -> str:
    """Name of the stage that the step's samples were of."""
    return str(trainer.train_data.plan.segment_at(trainer.state.consumed_samples - 1).stage)


def stage_number(trainer: Trainer) -> int:
    """Number of that stage in the order of the run, from 0."""
    return [stage.name for stage in trainer.train_data.plan.stages].index(stage_of(trainer))


def is_due(trainer: Trainer, metrics: dict[str, float]) -> bool:
    """Whether a step is logged: at the interval, and wherever FP8 or the norms were looked at."""
    looked = "fp8/bf16_layers" in metrics or "param_norm" in metrics
    return looked or trainer.state.step % trainer.config.monitor.log_interval == 0


def is_per_layer(name: str) -> bool:
    """Whether a metric is one of FP8's for one tensor of one layer: a dozen per layer, for tensorboard alone."""
    return name.startswith(("fp8/amax/", "fp8/overflow/", "fp8/underflow/"))


def fp8_events(trainer: Trainer) -> list[dict[str, Any]]:
    """What fell back from FP8 to bf16 in the step just done."""
    if trainer.fp8_record is None:
        return []
    return [event for event in trainer.fp8_record()["events"] if event["step"] == trainer.state.step]


def perplexity(loss: float) -> float:
    """exp(loss), held within what a float can be."""
    return math.exp(min(loss, 50.0))


def tell(words: str) -> None:
    """On stderr, on a line of its own."""
    lead = "\r\x1b[K" if sys.stderr.isatty() else ""
    print(f"{lead}{words}", file=sys.stderr, flush=True)
