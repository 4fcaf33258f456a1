"""The one seam of the trainer: subclass :class:`Callback` and override the events you need.

Order of events: ``on_train_start``, then per step ``on_step_start``, ``on_batch``, ``on_step_end``,
``on_evaluation`` where one was due, ``on_step_boundary``; ``on_checkpoint_saved`` after each checkpoint; at the
end ``on_train_end``, or ``on_exception`` in its place. An evaluation that was due when the run was stopped comes
first on resume.
All ranks get all events, with the same metrics (times and speeds are each rank's own).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_syne.training.forward import Batch
    from megatron_syne.training.trainer import Trainer


class Callback:
    """Does nothing; every event may be overridden. Events run in the order of the trainer's list."""

    def on_train_start(self, trainer: Trainer) -> None:
        """Everything is built and loaded; no step was done yet in this process."""

    def on_step_start(self, trainer: Trainer) -> None:
        """Before the batch of the next step is read."""

    def on_batch(self, trainer: Trainer, batches: list[Batch]) -> None:
        """This rank's micro-batches of the step are there, the forward pass comes next."""

    def on_step_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """A step is done and counted. ``metrics``: loss, grad_norm, learning_rate, tokens_per_second, ..."""

    def on_evaluation(self, trainer: Trainer, losses: dict[str, float]) -> None:
        """Mean loss in nats per token of each validation source."""

    def on_harness(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        """lm-evaluation-harness has evaluated the checkpoint of an earlier ``step``; rank 0 alone is told."""

    def on_step_boundary(self, trainer: Trainer) -> None:
        """All of the step is done, also what its evaluation changed: the time to save."""

    def on_checkpoint_saved(self, trainer: Trainer, path: Path) -> None:
        """A checkpoint is complete on disk."""

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Training failed. No collectives here: the ranks no longer agree on what comes next."""

    def on_train_end(self, trainer: Trainer) -> None:
        """Training has finished or was asked to stop; collectives are still possible."""
