"""What a run leaves to be looked at: tensorboard events and ``metrics.jsonl``, written by rank 0 alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from megatron_syne.training.callback import Callback

if TYPE_CHECKING:
    from megatron_syne.training.trainer import Trainer

# tensorboard groups scalars by what stands before the slash
_TAGS = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "learning_rate": "train/learning_rate",
    "tokens_per_second": "speed/tokens_per_second",
    "step_seconds": "speed/step_seconds",
    "data_seconds": "speed/data_seconds",
    "data_share": "speed/data_share_percent",
    "peak_memory_bytes": "memory/peak_bytes",
    "consumed_tokens": "progress/consumed_tokens",
    "consumed_samples": "progress/consumed_samples",
}


def tokens_read(trainer: Trainer) -> dict[str, float]:
    """``tokens/<source>``: tokens read of each source since the start of the run."""
    consumed = trainer.train_data.consumed(trainer.state.consumed_samples)
    return {f"tokens/{source}": float(tokens) for source, tokens in consumed.items()}


def mixture_shares(trainer: Trainer) -> dict[str, float]:
    """``mixture/<source>``: share of each source in the step just done."""
    plan = trainer.train_data.plan
    shares = plan.segment_at(trainer.state.consumed_samples - 1).shares
    return {f"mixture/{source}": share for source, share in zip(plan.sources, shares, strict=True)}


def is_due(trainer: Trainer, metrics: dict[str, float]) -> bool:
    """Whether a step is logged: at the interval, and wherever FP8 was looked at."""
    looked = "fp8/bf16_layers" in metrics
    return looked or trainer.state.step % trainer.config.monitor.log_interval == 0


def is_per_layer(name: str) -> bool:
    """Whether a metric is one of FP8's for one tensor of one layer: a dozen per layer, for tensorboard alone."""
    return name.startswith(("fp8/amax/", "fp8/overflow/", "fp8/underflow/"))


def fp8_events(trainer: Trainer) -> list[dict[str, Any]]:
    """What fell back from FP8 to bf16 in the step just done."""
    if trainer.fp8_record is None:
        return []
    return [event for event in trainer.fp8_record()["events"] if event["step"] == trainer.state.step]


class TensorboardEvents(Callback):
    """Events below ``<run_dir>/tensorboard``; a resumed run writes on, and hides what it repeats."""

    def __init__(self, folder: Path, description: str) -> None:
        self.folder = folder
        self.description = description
        self.writer: Any = None

    def on_train_start(self, trainer: Trainer) -> None:
        """Open the writer; ``purge_step`` drops events of steps that were lost with a killed process."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.folder), purge_step=trainer.state.step + 1)
        self.writer.add_text("run", f"```\n{self.description}\n```", trainer.state.step)

    def on_step_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """One scalar per metric, and what was read of each source; a fallback from FP8 as text."""
        if is_due(trainer, metrics):
            for name, value in (tokens_read(trainer) | mixture_shares(trainer)).items():
                self.writer.add_scalar(name, value, trainer.state.step)
            for name, value in metrics.items():
                tag = name if name.startswith("fp8/") else _TAGS.get(name, f"train/{name}")
                self.writer.add_scalar(tag, value, trainer.state.step)
        for event in fp8_events(trainer):
            layers = ", ".join(str(layer) for layer in event["layers"])
            text = f"layers {layers} in bf16 from step {event['from_step']} on: {event['reason']}"
            self.writer.add_text("fp8/fallback", text, trainer.state.step)

    def on_evaluation(self, trainer: Trainer, losses: dict[str, float]) -> None:
        """Loss and perplexity per validation source."""
        for name, loss in losses.items():
            self.writer.add_scalar(f"validation_loss/{name}", loss, trainer.state.step)
            self.writer.add_scalar(
                f"validation_perplexity/{name}", math.exp(min(loss, 50.0)), trainer.state.step
            )
        self.writer.flush()

    def on_harness(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        """``harness/<task>/<metric>``, at the checkpoint's step."""
        for name, value in metrics.items():
            self.writer.add_scalar(f"harness/{name}", value, step)
        self.writer.flush()

    def on_train_end(self, trainer: Trainer) -> None:
        """Flush to disk."""
        self.writer.close()

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Keep what was seen before the failure."""
        if self.writer is not None:
            self.writer.close()


class MetricsLog(Callback):
    """One JSON object per line; losses also as ``float.hex`` so that two runs can be compared to the bit."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stream: TextIO | None = None

    def on_train_start(self, trainer: Trainer) -> None:
        """Open for appending, after cutting off what is later than the state that was loaded."""
        _drop_after(self.path, trainer.state.step, trainer.state.evaluated_step)
        self.stream = self.path.open("a")

    def on_step_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """The step's metrics, and what fell back from FP8 in it."""
        if is_due(trainer, metrics):
            values: dict[str, Any] = {  # an infinite loss gap is null: JSON has no infinity
                name: value if math.isfinite(value) else None
                for name, value in metrics.items()
                if not is_per_layer(name)
            }
            values |= {**tokens_read(trainer), "loss_hex": metrics["loss"].hex()}
            if events := fp8_events(trainer):
                values["fp8/events"] = events
            self._write({"step": trainer.state.step, **values})

    def on_evaluation(self, trainer: Trainer, losses: dict[str, float]) -> None:
        """The validation losses, and their perplexities."""
        perplexities = {name: math.exp(min(loss, 50.0)) for name, loss in losses.items()}
        record = {"validation": losses, "validation_perplexity": perplexities}
        self._write({"step": trainer.state.step, **record})

    def on_harness(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        """What lm-evaluation-harness found for the checkpoint of ``step``."""
        self._write({"step": step, "harness": metrics})

    def on_train_end(self, trainer: Trainer) -> None:
        """Close."""
        if self.stream is not None:
            self.stream.close()

    def _write(self, record: dict[str, Any]) -> None:
        assert self.stream is not None
        self.stream.write(json.dumps(record) + "\n")
        self.stream.flush()


def _drop_after(path: Path, step: int, evaluated_step: int) -> None:
    """Remove records of what a killed process did but no checkpoint kept, and a torn last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
            if record["step"] <= (evaluated_step if "validation" in record else step):
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)
