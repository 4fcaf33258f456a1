"""A progress line on rank 0: step, loss, rate, time left. One line that is redrawn on a terminal; in a log
file a new line now and then."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from megatron_syne.monitor.step import perplexity, stage_of
from megatron_syne.monitor.time_left import TimeLeft, due_between
from megatron_syne.training.callback import Callback

if TYPE_CHECKING:
    from megatron_syne.training.trainer import Trainer


class ConsoleProgress(Callback):
    """Writes to stderr; give ``every_seconds=0`` to see each step in a log file."""

    def __init__(self, stream: TextIO | None = None, every_seconds: float = 5.0) -> None:
        self.stream = stream or sys.stderr
        self.every_seconds = every_seconds
        self.last_shown = 0.0
        self.time_left = TimeLeft()
        self.first_step = self.first_sample = 0

    def on_train_start(self, trainer: Trainer) -> None:
        """Say where the run begins."""
        self.first_step = trainer.state.step
        self._line(
            f"training: steps {trainer.state.step} -> {trainer.train_iters}, {trainer.platform.describe()}"
        )
        self.time_left.begin()

    def on_step_start(self, trainer: Trainer) -> None:
        """The step's time counts from here."""
        self.first_sample = trainer.state.consumed_samples
        self.time_left.begin()

    def on_step_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Redraw; a look at FP8 leaves a line of its own."""
        if "fp8/bf16_layers" in metrics:
            self._line(f"step {trainer.state.step}: {_fp8(metrics)}")
        step, last = trainer.state.step, trainer.train_iters
        now = time.monotonic()
        terminal = self.stream.isatty()
        due = 0.2 if terminal else self.every_seconds
        self.time_left.step(self.first_sample)
        if now - self.last_shown < due and step != last and step != self.first_step + 1:
            return
        self.last_shown = now
        done = math.floor(24 * step / last)
        mfu = f"  MFU {100 * metrics['mfu']:.1f} %" if "mfu" in metrics else ""
        text = (
            f"[{'=' * done}{' ' * (24 - done)}] {step}/{last}  loss {metrics['loss']:.4f}  "
            f"lr {metrics['learning_rate']:.2e}  grad {metrics['grad_norm']:.2f}  "
            f"{metrics['tokens_per_second']:,.0f} tok/s{mfu}  data {metrics['data_share']:.2f} %  "
            f"{stage_of(trainer)}  left {_clock(self.seconds_left(trainer))}"
        )
        if terminal:
            self.stream.write(f"\r\x1b[K{text}" + ("\n" if step == last else ""))
            self.stream.flush()
        else:
            self._line(text)

    def on_evaluation(self, trainer: Trainer, losses: dict[str, float]) -> None:
        """Perplexity of each validation source."""
        self.time_left.other("evaluation")
        figures = "  ".join(f"{name} {perplexity(loss):.2f}" for name, loss in losses.items())
        self._line(f"step {trainer.state.step}: validation perplexity  {figures}")

    def on_checkpoint_saved(self, trainer: Trainer, path: Path) -> None:
        """Name the checkpoint."""
        self.time_left.other("checkpoint")
        self._line(f"step {trainer.state.step}: saved {path}")

    def seconds_left(self, trainer: Trainer) -> float:
        """Of the rest of the run, its evaluations and checkpoints included."""
        step, last, config = trainer.state.step, trainer.train_iters, trainer.config
        interval = config.train.eval_interval if trainer.validation_data else None
        others = {
            "evaluation": due_between(interval, step, last, at_end=interval is not None),
            "checkpoint": due_between(config.checkpoint.save_interval, step, last, at_end=True),
        }
        plan = trainer.train_data.plan

        def tokens_before(sample: int) -> int:
            return sum(plan.consumed(sample).values())

        consumed = trainer.state.consumed_samples
        return self.time_left.seconds(tokens_before, consumed, plan.num_tokens, others)

    def _line(self, text: str) -> None:
        lead = "\r\x1b[K" if self.stream.isatty() else ""
        self.stream.write(f"{lead}{text}\n")
        self.stream.flush()


def _fp8(metrics: dict[str, float]) -> str:
    """What the look at FP8 found: the gap, and over all layers the largest shares of a tensor's values lost."""
    lost = [
        f"{name} {metrics[key]:.2g}"
        for name in ("overflow", "underflow")
        if (key := f"fp8/max_{name}") in metrics
    ]
    figures = [f"FP8 loss gap to bf16 {metrics['fp8/loss_gap']:.2e}", *lost]
    return ", ".join(figures) + f"; {int(metrics['fp8/bf16_layers'])} layers in bf16"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
