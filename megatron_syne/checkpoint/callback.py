"""When to save: at the interval, at ``exit_interval``, and at the end or when asked to stop."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_syne.checkpoint.manager import CheckpointManager
from megatron_syne.training.callback import Callback

if TYPE_CHECKING:
    from megatron_syne.training.trainer import Trainer


class CheckpointCallback(Callback):
    """Saves, and tells the other callbacks."""

    def __init__(self, manager: CheckpointManager, last_saved: int = -1) -> None:
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
        """Whatever ended training: nothing done is lost."""
        if self.last_saved != trainer.state.step and trainer.state.step > 0:
            self.save(trainer)

    def save(self, trainer: Trainer) -> Path:
        """Save now."""
        run: dict[str, Any] = {
            "model": asdict(trainer.model_config),
            "data": trainer.train_data.ledger(trainer.state.consumed_samples),
            "layout": asdict(trainer.config.parallel),
            "precision": asdict(trainer.config.precision),
        }
        trainer.gather_parameters()
        path = self.manager.save(trainer.chunks, trainer.optimizer, trainer.state, run, trainer.fp8)
        self.last_saved = trainer.state.step
        trainer.emit("on_checkpoint_saved", path)
        return path
