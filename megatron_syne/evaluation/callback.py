"""Evaluation beside the training: a process of its own for each checkpoint that is due, one at a time.

Rank 0 alone has this callback. Training never waits for it but at its end. A checkpoint that is due is held by
hard links below ``<run_dir>/evaluations/.held`` until its evaluation has ended, so ``keep_latest`` cannot take
it away, nor a restart; as many wait as the run keeps checkpoints, for the disk's sake.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_syne.checkpoint.folder import checkpoint_folders, checkpoint_path, step_of
from megatron_syne.config.schema import RunConfig
from megatron_syne.errors import DataError
from megatron_syne.evaluation.results import flat_metrics, read_results
from megatron_syne.evaluation.tasks import is_due, require_harness
from megatron_syne.resilience.signals import StopOnSignal
from megatron_syne.training.callback import Callback

if TYPE_CHECKING:
    from megatron_syne.training.trainer import Trainer

POLL_SECONDS = 0.2
PROGRAM = (sys.executable, "-m", "megatron_syne.evaluation")


@dataclass
class Running:
    """The evaluation under way."""

    step: int
    process: subprocess.Popen[bytes]
    deadline: float


class HarnessEvaluation(Callback):
    """Starts ``python -m megatron_syne.evaluation`` and collects what it leaves.

    A failure or a time-out is told and training goes on. When the run is stopped, or a leg of it ends, the
    evaluation under way is ended; what is due and has no result is made up for when the run goes on.
    """

    def __init__(self, config: RunConfig) -> None:
        """Raises ConfigError where lm-evaluation-harness is not installed."""
        require_harness(config)
        self.config = config
        self.folder = Path(config.run_dir) / "evaluations"
        self.checkpoints = Path(config.run_dir) / "checkpoints"
        self.held = self.folder / ".held"
        self.work = self.folder / ".work"
        self.waiting: list[int] = []
        self.running: Running | None = None
        self.unreported: list[int] = []

    def result_path(self, step: int) -> Path:
        """Where the evaluation of a checkpoint leaves its results."""
        return self.folder / f"{checkpoint_path(self.checkpoints, step).name}.json"

    def on_train_start(self, trainer: Trainer) -> None:
        """Forget what is later than the state that was loaded, and take up what was left undone."""
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.work, ignore_errors=True)
        now = trainer.state.step
        for path in self.folder.glob("iter_*.json"):
            step = step_of(path.with_suffix(""))
            if step > now:
                path.unlink()
            elif step >= 0:
                self.unreported.append(step)
        for path in self.held.glob("iter_*"):
            step = step_of(path)
            if step < 0 or step > now or self.result_path(step).exists():
                shutil.rmtree(path)
        found = {step_of(path) for path in (*checkpoint_folders(self.checkpoints), *self.held.glob("iter_*"))}
        reported = _steps_in(Path(self.config.run_dir) / "metrics.jsonl")
        self.unreported = sorted(step for step in self.unreported if step not in reported)
        for step in sorted(found):
            due = step <= now and is_due(step, trainer.train_iters, self.config)
            if due and not self.result_path(step).exists():
                self.add(step)
        if self.waiting:
            names = ", ".join(checkpoint_path(self.checkpoints, step).name for step in self.waiting)
            tell(f"made up for now: {names}")

    def on_step_boundary(self, trainer: Trainer) -> None:
        """Collect a result that has come, end what takes too long, start the next."""
        self.poll(trainer)

    def on_checkpoint_saved(self, trainer: Trainer, path: Path) -> None:
        """Evaluate it, at once or after the one under way."""
        step = step_of(path)
        if is_due(step, trainer.train_iters, self.config):
            shutil.rmtree(self.held / path.name, ignore_errors=True)
            self.result_path(step).unlink(missing_ok=True)
            self.add(step)
            if trainer.stop_reason is None:
                self.poll(trainer)

    def on_train_end(self, trainer: Trainer) -> None:
        """Wait for the results where training is complete; otherwise leave them to the next start."""
        self.poll(trainer, start=False)
        if trainer.complete and not trainer.signalled:
            self.wait(trainer)
        self.stop()

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Leave no process behind."""
        self.stop()

    def wait(self, trainer: Trainer) -> None:
        """Until all have ended, ``harness.timeout_seconds`` are over, or a signal asks to stop."""
        self.waiting.sort(reverse=True)  # the last checkpoint matters most
        if self.running or self.waiting:
            tell(
                f"training is done; waiting for evaluations, {self.config.harness.timeout_seconds} s at most"
            )
        end = time.monotonic() + self.config.harness.timeout_seconds
        self.poll(trainer)
        while self.running:
            stops = (each for each in trainer.callbacks if isinstance(each, StopOnSignal))
            stopped = next((each.received for each in stops if each.received), None)
            if stopped or time.monotonic() > end:
                left = sorted([self.running.step, *self.waiting])
                names = ", ".join(checkpoint_path(self.checkpoints, step).name for step in left)
                why = stopped or "the time for it is over"
                tell(f"not evaluated: {names} ({why}); start the same command again to make up for it")
                return
            time.sleep(POLL_SECONDS)
            self.poll(trainer)

    def add(self, step: int) -> None:
        """Hold a checkpoint and let it wait; the oldest ones give way to it where too many wait."""
        self.hold(step)
        self.waiting = [*(each for each in self.waiting if each != step), step]
        keep = self.config.checkpoint.keep_latest
        while keep and len(self.waiting) > keep:
            left_out = self.waiting.pop(0)
            shutil.rmtree(self.held / checkpoint_path(self.held, left_out).name, ignore_errors=True)
            tell(
                f"iter_{left_out:07d} is left out: evaluations take longer than checkpoints come; a larger "
                "harness.interval leaves time for each"
            )

    def hold(self, step: int) -> None:
        """Hard links to a checkpoint's files. Where the file system has none, the checkpoint itself is read."""
        source, target = checkpoint_path(self.checkpoints, step), checkpoint_path(self.held, step)
        if target.exists():
            return
        scratch = target.with_name(target.name + ".tmp")
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            self.held.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, scratch, copy_function=os.link)
            scratch.rename(target)
        except (OSError, shutil.Error):
            shutil.rmtree(scratch, ignore_errors=True)

    def poll(self, trainer: Trainer, start: bool = True) -> None:
        """One look, without waiting."""
        for step in self.unreported:
            self.report(trainer, step)
        self.unreported = []
        now = self.running
        if now is not None:
            code = now.process.poll()
            if code is None and time.monotonic() < now.deadline:
                return
            self.stop()
            shutil.rmtree(checkpoint_path(self.held, now.step), ignore_errors=True)
            name = checkpoint_path(self.checkpoints, now.step).name
            if code is None:
                seconds = self.config.harness.timeout_seconds
                tell(f"{name} took more than {seconds} s and was ended; training goes on")
            elif code:
                tell(f"{name} failed (exit {code}), training goes on: {self.last_words(now.step)}")
            else:
                self.report(trainer, now.step)
        if start and self.waiting:
            self.start(self.waiting.pop(0))

    def start(self, step: int) -> None:
        """Start the evaluation of a checkpoint."""
        held = checkpoint_path(self.held, step)
        source = held if held.is_dir() else checkpoint_path(self.checkpoints, step)
        harness = self.config.harness
        options: dict[str, Any] = {
            "--checkpoint": source,
            "--tasks": ",".join(harness.tasks),
            "--include-path": harness.include_path,
            "--output": self.result_path(step),
            "--scratch": self.work,
            "--num-fewshot": harness.num_fewshot,
            "--limit": harness.limit,
            "--batch-size": harness.batch_size,
            "--device": harness.device,
            "--beside": os.getpid(),
        }
        given = [f"{name}={value}" for name, value in options.items() if value is not None]
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            with self.result_path(step).with_suffix(".log").open("wb") as log:
                process = subprocess.Popen(
                    [*PROGRAM, *given],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # so that all of it can be ended, and Ctrl-C is ours
                )
        except OSError as error:
            tell(f"iter_{step:07d} cannot be started, training goes on: {error}")
            return
        self.running = Running(step, process, time.monotonic() + harness.timeout_seconds)

    def stop(self) -> None:
        """End the process under way, if there is one, and remove what it made."""
        if self.running is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self.running.process.pid, signal.SIGKILL)
        self.running.process.wait()
        self.running = None
        shutil.rmtree(self.work, ignore_errors=True)

    def report(self, trainer: Trainer, step: int) -> None:
        """Pass the results on to metrics.jsonl and tensorboard."""
        try:
            metrics = flat_metrics(read_results(self.result_path(step)))
        except DataError as error:
            tell(f"{error}; training goes on")
            return
        trainer.emit("on_harness", step, metrics)

    def last_words(self, step: int) -> str:
        """What the process said of its failure, and where the rest is."""
        log = self.result_path(step).with_suffix(".log")
        try:
            lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        except OSError:
            lines = []
        errors = [line for line in lines if line.startswith("error: ")]
        return f"{(errors or lines or ['it said nothing'])[-1].removeprefix('error: ')} ({log})"


def tell(text: str) -> None:
    """A line for the person who watches."""
    print(f"evaluation: {text}", file=sys.stderr, flush=True)


def _steps_in(metrics: Path) -> set[int]:
    """Iterations whose results stand in metrics.jsonl."""
    import json

    steps: set[int] = set()
    if metrics.exists():
        for line in metrics.read_text().splitlines():
            if '"harness"' in line:
                with suppress(ValueError, KeyError, TypeError):
                    steps.add(int(json.loads(line)["step"]))
    return steps
