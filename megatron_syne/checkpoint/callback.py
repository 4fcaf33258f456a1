"""When to save: at the interval, at ``exit_interval``, at the end of a leg or of the run, or when asked to stop.

With ``checkpoint.async_save`` a checkpoint that training goes on after is written beside it: training waits while the
values are copied, and for a moment at a later step's end when all ranks have written. Everything that ends training
well waits for the checkpoint under way first, and the last one is written while nothing else goes on. After an error
the one under way is left unfinished, which its name says; the one before is whole.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megatron_syne.checkpoint.background import HostCopies
from megatron_syne.checkpoint.manager import CheckpointManager
from megatron_syne.config.stages import trains
from megatron_syne.monitor.step import is_due
from megatron_syne.training.callback import Callback

if TYPE_CHECKING:
    from megatron_syne.training.trainer import Trainer


class CheckpointCallback(Callback):
    """Saves, and tells the other callbacks. To stand before those that log.

    Adds to the metrics ``checkpoint_seconds``, which training has waited for saving since the last logged step, and
    with ``async_save`` ``checkpoint_write_seconds``, from the begin of a checkpoint to its end on disk.
    """

    def __init__(self, manager: CheckpointManager, last_saved: tuple[int, int] | None = None) -> None:
        """``last_saved``: step, and step of the last evaluation, that this run's newest checkpoint holds."""
        self.manager = manager
        self.last_saved = last_saved
        self.copies: HostCopies | None = None
        self.waited = 0.0
        self.writing = 0.0
        self.begun = 0.0

    def on_step_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Add the times."""
        metrics["checkpoint_seconds"] = self.waited
        if trainer.config.checkpoint.async_save:
            metrics["checkpoint_write_seconds"] = self.writing
        if is_due(trainer, metrics):
            self.waited = self.writing = 0.0

    def on_step_boundary(self, trainer: Trainer) -> None:
        """Save at the interval; stop cleanly at ``exit_interval``."""
        started = time.perf_counter()
        step, config = trainer.state.step, trainer.config
        interval = config.checkpoint.save_interval
        due = interval is not None and step % interval == 0
        exit_interval = config.train.exit_interval
        if exit_interval and step % exit_interval == 0 and step < trainer.train_iters:
            trainer.stop_reason = f"train.exit_interval={exit_interval} was reached"
        if self.manager.pending is not None and not due:
            path = self.manager.progress(trainer.platform.device)
            if path is not None:
                self._saved(trainer, path)
            self.waited += time.perf_counter() - started
        if due:
            last = trainer.train_iters if trainer.leg_end is None else trainer.leg_end
            self.save(
                trainer, beside=config.checkpoint.async_save and step < last and not trainer.stop_reason
            )
            self.waited += time.perf_counter() - started

    def on_train_end(self, trainer: Trainer) -> None:
        """Whatever ended training: nothing done is lost, an evaluation that was made up for neither."""
        self.finish(trainer)
        self._free()
        now = (trainer.state.step, trainer.state.evaluated_step)
        if self.last_saved != now and trainer.state.step > 0:
            self.save(trainer)

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Leave the checkpoint under way, if it needs other ranks: the ranks no longer agree on what comes next."""
        words = self.manager.abandon()
        self._free()
        if words is not None and dist.get_rank() == 0:
            print(f"{words}, since training failed; earlier checkpoints are as they were", file=sys.stderr)

    def save(self, trainer: Trainer, beside: bool = False) -> None:
        """Save now: begin to, where it is written ``beside`` the training, or wait until it is done."""
        run: dict[str, Any] = {
            "model": asdict(trainer.model_config),
            "data": trainer.train_data.ledger(trainer.state.consumed_samples),
            "layout": asdict(trainer.config.parallel),
            "precision": asdict(trainer.config.precision),
            "optimizer": asdict(trainer.config.optimizer),
            "trains": trains(trainer.config),
        }
        if trainer.fp8_record is not None:
            run["fp8"] = trainer.fp8_record()
        waited = self.finish(trainer)
        if waited and beside and dist.get_rank() == 0:
            print(
                f"step {trainer.state.step}: waited {waited:.1f} s for the checkpoint before to be written; a longer "
                "checkpoint.save_interval or a faster disk would spare it",
                file=sys.stderr,
            )
        if beside and self.copies is None:
            self.copies = HostCopies(pin=trainer.platform.pins_memory)
        self.begun = time.perf_counter()
        trainer.gather_parameters()
        copies = self.copies if beside else None
        self.manager.begin(trainer.chunks, trainer.optimizer, trainer.state, run, trainer.fp8, copies)
        self.last_saved = (trainer.state.step, trainer.state.evaluated_step)
        if not beside:
            self.finish(trainer)

    def finish(self, trainer: Trainer) -> float:
        """Wait for the checkpoint under way, if there is one; the seconds waited for."""
        if self.manager.pending is None:
            return 0.0
        started = time.perf_counter()
        self._saved(trainer, self.manager.finish())
        return time.perf_counter() - started

    def _saved(self, trainer: Trainer, path: Path) -> None:
        self.writing += time.perf_counter() - self.begun
        trainer.emit("on_checkpoint_saved", path)

    def _free(self) -> None:
        if self.copies is not None:
            self.copies.close()
            self.copies = None
