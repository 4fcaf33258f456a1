"""The progress line: loss, speed, MFU where there is one, stage, and a time left that the first step does not spoil."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_syne.config.schema import CheckpointConfig, RunConfig, TrainConfig
from megatron_syne.monitor.console import ConsoleProgress
from megatron_syne.monitor.time_left import TimeLeft

METRICS = {
    "loss": 2.5,
    "learning_rate": 1e-3,
    "grad_norm": 0.5,
    "tokens_per_second": 12345.6,
    "data_share": 0.25,
}


class Watched:
    """A run of 100 steps of 4 samples of 16 tokens, evaluated after every 10 and saved after every 25."""

    def __init__(self) -> None:
        self.now = 0.0
        self.stream = io.StringIO()
        self.console = ConsoleProgress(self.stream, every_seconds=0)
        self.console.time_left = TimeLeft(lambda: self.now)
        plan = SimpleNamespace(
            consumed=lambda sample: {"en": 10 * sample, "zh": 6 * sample},
            num_tokens=100 * 4 * 16,
            segment_at=lambda sample: SimpleNamespace(stage="one"),
        )
        self.trainer: Any = SimpleNamespace(
            state=SimpleNamespace(step=0, consumed_samples=0),
            train_iters=100,
            train_data=SimpleNamespace(plan=plan),
            validation_data={"en": None},
            platform=SimpleNamespace(describe=lambda: "cpu"),
            config=RunConfig(
                train=TrainConfig(eval_interval=10), checkpoint=CheckpointConfig(save_interval=25)
            ),
        )
        self.console.on_train_start(self.trainer)

    def step(self, seconds: float, **metrics: float) -> str:
        self.console.on_step_start(self.trainer)
        self.now += seconds
        self.trainer.state.step += 1
        self.trainer.state.consumed_samples += 4
        self.console.on_step_end(self.trainer, METRICS | metrics)
        return self.stream.getvalue().splitlines()[-1]


def left(line: str) -> int:
    hours, minutes, seconds = re.fullmatch(r".*left (?:(\d+):)?(\d+):(\d+)", line).groups()  # type: ignore[union-attr]
    return 3600 * int(hours or 0) + 60 * int(minutes) + int(seconds)


def test_the_line() -> None:
    run = Watched()
    line = run.step(1.0)
    assert "1/100  loss 2.5000  lr 1.00e-03  grad 0.50  12,346 tok/s  data 0.25 %  one  left" in line
    assert "12,346 tok/s  MFU 41.2 %  data" in run.step(1.0, mfu=0.4123)


def test_time_left_counts_warm_steps_evaluations_and_checkpoints() -> None:
    run = Watched()
    assert left(run.step(50.0)) == 50 * 99
    assert left(run.step(2.0)) == 2 * 98  # evaluations and checkpoints not seen yet are taken for nothing
    for _ in range(23):
        run.step(2.0)
        if run.trainer.state.step % 10 == 0:
            run.now += 7.0
            run.console.on_evaluation(run.trainer, {"en": 1.0})
    run.now += 30.0
    run.console.on_checkpoint_saved(run.trainer, "iter_25")  # type: ignore[arg-type]
    assert left(run.step(2.0)) == pytest.approx(2 * 74 + 7 * 8 + 30 * 3, abs=1)
    for _ in range(74):
        run.step(2.0)
    assert left(run.stream.getvalue().splitlines()[-1]) == 0


def test_evaluations_and_checkpoints_tell_themselves() -> None:
    run = Watched()
    run.console.on_evaluation(run.trainer, {"en": 0.0, "zh": 1000.0})
    assert "validation perplexity  en 1.00  zh 5184705528587072045056.00" in run.stream.getvalue()
