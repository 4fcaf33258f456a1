"""``metrics.jsonl`` in the run folder: one JSON object per line, for programs."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_syne.errors import IOFault, disk_fault
from megatron_syne.monitor.step import (
    fp8_events,
    is_due,
    is_per_layer,
    perplexity,
    stage_of,
    tell,
    tokens_read,
)
from megatron_syne.training.callback import Callback

if TYPE_CHECKING:
    from megatron_syne.training.trainer import Trainer


class MetricsLog(Callback):
    """One JSON object per line; losses also as ``float.hex`` so that two runs can be compared to the bit.

    A disk that is full does not end the training: what could not be written is kept and written when there is
    room again. It is told once, and at the end where something was lost.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stream: io.FileIO | None = None
        self.pending = b""
        self.told = False

    def on_train_start(self, trainer: Trainer) -> None:
        """Open for appending, after cutting off what is later than the state that was loaded; IOFault where the disk
        has no room for it."""
        try:
            _drop_after(self.path, trainer.state.step, trainer.state.evaluated_step)
        except OSError as error:
            if disk_fault(error) is None:
                raise
            raise IOFault(f"{self.path}: {error.strerror}; make room and start again") from error
        self.stream = self.path.open("ab", buffering=0)

    def on_step_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """The step's metrics, and what fell back from FP8 in it."""
        if is_due(trainer, metrics):
            values: dict[str, Any] = {  # an infinite loss gap is null: JSON has no infinity
                name: value if math.isfinite(value) else None
                for name, value in metrics.items()
                if not is_per_layer(name)
            }
            values |= {**tokens_read(trainer), "stage": stage_of(trainer), "loss_hex": metrics["loss"].hex()}
            if events := fp8_events(trainer):
                values["fp8/events"] = events
            self._write({"step": trainer.state.step, **values})

    def on_evaluation(self, trainer: Trainer, losses: dict[str, float]) -> None:
        """The validation losses, and their perplexities."""
        perplexities = {name: perplexity(loss) for name, loss in losses.items()}
        record = {"validation": losses, "validation_perplexity": perplexities}
        self._write({"step": trainer.state.step, **record})

    def on_harness(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        """What lm-evaluation-harness found for the checkpoint of ``step``."""
        self._write({"step": step, "harness": metrics})

    def on_train_end(self, trainer: Trainer) -> None:
        """Close."""
        self._close()

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Keep what was seen before the failure."""
        self._close()

    def _write(self, record: dict[str, Any]) -> None:
        self.pending += json.dumps(record).encode() + b"\n"
        self._flush()

    def _flush(self) -> None:
        assert self.stream is not None
        try:
            while self.pending:
                written = self.stream.write(self.pending)
                self.pending = self.pending[written:]
        except OSError as error:
            if disk_fault(error) is None:
                raise
            if not self.told:
                tell(f"{self.path}: {error.strerror}; training goes on, what is missing is written later")
            self.told = True
            return
        if self.told:
            tell(f"{self.path}: there is room again, nothing is missing")
            self.told = False

    def _close(self) -> None:
        if self.stream is None:
            return
        self._flush()
        if self.pending:
            tell(
                f"{self.path}: the last {self.pending.count(10)} records are lost, as they could not be written"
            )
        self.stream.close()
        self.stream = None


def _drop_after(path: Path, step: int, evaluated_step: int) -> None:
    """Remove records of what a killed process did but no checkpoint kept, and a torn last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
            if record["step"] <= (evaluated_step if "validation" in record else step):
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text("".join(kept))
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(path)
