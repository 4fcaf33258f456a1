"""When training waits for checkpoints, when it does not, and how long it is told to have waited."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_syne.checkpoint import callback
from megatron_syne.checkpoint.callback import CheckpointCallback
from megatron_syne.config.schema import CheckpointConfig, ModelConfig, MonitorConfig, RunConfig, TrainConfig


class Disk:
    """A manager whose checkpoints take ``takes`` seconds to write and half a second to copy or to begin."""

    def __init__(self, clock: list[float], takes: float) -> None:
        self.clock, self.takes = clock, takes
        self.pending: float | None = None
        self.events: list[str] = []

    def begin(self, chunks: Any, optimizer: Any, state: Any, run: Any, fp8: Any, copies: Any) -> None:
        assert self.pending is None
        self.step = state.step
        self.clock[0] += 0.5
        self.pending = self.clock[0] + self.takes
        self.events.append(f"{state.step} {'beside' if copies is not None else 'waiting'}")

    def progress(self, device: Any) -> Path | None:
        assert self.pending is not None
        return self.finish() if self.clock[0] >= self.pending else None

    def finish(self) -> Path:
        assert self.pending is not None
        self.clock[0], self.pending = max(self.clock[0], self.pending), None
        return Path(f"iter_{self.step}")

    def abandon(self) -> str | None:
        unfinished, self.pending = self.pending, None
        return None if unfinished is None else "iter_x.tmp was not finished"


class Run:
    """20 steps of a second each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, takes: float, **checkpoint: Any) -> None:
        self.clock = [0.0]
        monkeypatch.setattr(callback.time, "perf_counter", lambda: self.clock[0])
        monkeypatch.setattr(callback.dist, "get_rank", lambda: 0)
        self.disk = Disk(self.clock, takes)
        self.saver = CheckpointCallback(self.disk)  # type: ignore[arg-type]
        self.state = SimpleNamespace(step=0, evaluated_step=0, consumed_samples=0)
        self.trainer: Any = SimpleNamespace(
            config=RunConfig(
                checkpoint=CheckpointConfig(**checkpoint),
                monitor=MonitorConfig(log_interval=4),
                train=TrainConfig(exit_interval=None),
            ),
            model_config=ModelConfig(),
            state=self.state,
            train_data=SimpleNamespace(ledger=lambda consumed: {}),
            platform=SimpleNamespace(device="cpu", pins_memory=False),
            fp8=None,
            fp8_record=None,
            chunks=[],
            optimizer=None,
            stop_reason=None,
            train_iters=20,
            leg_end=None,
            gather_parameters=lambda: None,
            emit=lambda event, path: self.disk.events.append(f"saved {path.name} at {self.state.step}"),
        )
        self.told: list[tuple[float, float | None]] = []

    def steps(self, last: int) -> None:
        while self.state.step < last:
            self.state.step += 1
            self.clock[0] += 1.0
            metrics: dict[str, float] = {}
            self.saver.on_step_end(self.trainer, metrics)
            self.told.append((metrics["checkpoint_seconds"], metrics.get("checkpoint_write_seconds")))
            self.saver.on_step_boundary(self.trainer)


def test_waiting_counts_for_the_next_step_that_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, takes=2.5, save_interval=3)
    run.steps(8)
    assert [waited for waited, _ in run.told] == [0.0, 0.0, 0.0, 3.0, 0.0, 0.0, 3.0, 3.0]
    assert run.disk.events == ["3 waiting", "saved iter_3 at 3", "6 waiting", "saved iter_6 at 6"]


def test_beside_the_training_only_the_copy_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, takes=2.5, save_interval=10, async_save=True)
    run.steps(16)
    assert run.disk.events == ["10 beside", "saved iter_10 at 13"]
    assert run.told[11] == (0.5, 0.0)
    assert run.told[15] == (0.0, 3.5)  # three steps and the copy


def test_the_next_checkpoint_waits_for_the_one_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(monkeypatch, takes=7.0, save_interval=5, async_save=True)
    run.steps(10)
    assert run.disk.events == ["5 beside", "saved iter_5 at 10", "10 beside"]
    assert capsys.readouterr().err.count("step 10: waited 2.0 s for the checkpoint before") == 1
    run.steps(12)
    assert run.told[11][0] == 2.0 + 0.5


@pytest.mark.parametrize("step", [17, 20])
def test_the_end_waits_for_all(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The last checkpoint is not copied: nothing goes on beside it."""
    run = Run(monkeypatch, takes=9.0, save_interval=10, async_save=True)
    run.steps(step)
    run.saver.on_train_end(run.trainer)
    assert run.disk.events[0] == "10 beside"
    assert run.disk.events[1] == f"saved iter_10 at {min(step, 19)}"
    assert run.saver.copies is None
    assert run.disk.events[2:] == [f"{step} waiting", f"saved iter_{step} at {step}"]


def test_a_stop_at_a_checkpoint_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, takes=9.0, save_interval=10, async_save=True)
    run.trainer.config.train.exit_interval = 10
    run.steps(10)
    run.saver.on_train_end(run.trainer)
    assert run.disk.events == ["10 waiting", "saved iter_10 at 10"]


def test_an_error_leaves_it_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(monkeypatch, takes=9.0, save_interval=10, async_save=True)
    run.steps(12)
    run.saver.on_exception(run.trainer, ValueError())
    assert "iter_x.tmp was not finished" in capsys.readouterr().err
    run.saver.on_exception(run.trainer, ValueError())
    assert capsys.readouterr().err == ""
