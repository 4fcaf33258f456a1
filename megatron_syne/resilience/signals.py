"""SIGTERM and SIGUSR1: finish the step, save, leave with exit code 75 so that the scheduler requeues.

The handler only sets a flag: saving inside it would interrupt a collective half-way. The flag of any rank
reaches all ranks with the next step's loss, so they stop after the same step, whichever rank was signalled
and however often (Slurm and a launcher may each send one).
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

from megatron_syne.training.callback import Callback

if TYPE_CHECKING:
    from megatron_syne.training.trainer import Trainer


class StopOnSignal(Callback):
    """Create early, in the main thread: a signal during start-up or loading must not be lost."""

    def __init__(self, names: list[str]) -> None:
        self.received: str | None = None
        for name in names:
            signal.signal(getattr(signal, name), self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        self.received = signal.Signals(number).name

    def on_step_start(self, trainer: Trainer) -> None:
        """Pass a signal on to all ranks, with this step's reduction."""
        if self.received is not None:
            trainer.stop_requested = 1.0
