"""When to save: at the interval, at ``exit_interval``, at the end of a leg or of the run, or when asked to stop."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_syne.checkpoint.manager import CheckpointManager
from megatron_syne.config.stages import trains
from megatron_syne.training.callback import Callback

if TYPE_CHECKING:
    from megatron_syne.training.trainer import Trainer


class CheckpointCallback(Callback):
    """Saves, and tells the other callbacks."""

    def __init__(self, manager: CheckpointManager, last_saved: tuple[int, int] | None = None) -> None:
        """``last_saved``: step, and step of the last evaluation, that this run's newest checkpoint holds."""
        self.manager = manager
        self.last_saved = last_saved

    def on_step_boundary(self, trainer: Trainer) -> None:
        """Save at the interval; stop cleanly at ``exit_interval``."""
        step, config = trainer.state.step, trainer.config
        if config.checkpoint.save_interval and step % config.checkpoint.save_interval == 0:
            self.save(trainer)
        exit_interval = config.train.exit_interval
        if exit_interval and step % exit_interval == 0 and step < trainer.train_iters:
            trainer.stop_reason = f"train.exit_interval={exit_interval} was reached"

    def on_train_end(self, trainer: Trainer) -> None:
        """Whatever ended training: nothing done is lost, an evaluation that was made up for neither."""
        now = (trainer.state.step, trainer.state.evaluated_step)
        if self.last_saved != now and trainer.state.step > 0:
            self.save(trainer)

    def save(self, trainer: Trainer) -> Path:
        """Save now."""
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
        trainer.gather_parameters()
        path = self.manager.save(trainer.chunks, trainer.optimizer, trainer.state, run, trainer.fp8)
        self.last_saved = (trainer.state.step, trainer.state.evaluated_step)
        trainer.emit("on_checkpoint_saved", path)
        return path
