"""Tensorboard events of a run, written by rank 0 alone: curves, a page, a dashboard, hyper-parameters."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_syne.errors import disk_fault
from megatron_syne.monitor.step import (
    fp8_events,
    is_due,
    mixture_shares,
    perplexity,
    stage_number,
    tell,
    tokens_read,
)
from megatron_syne.training.callback import Callback

if TYPE_CHECKING:
    from megatron_syne.monitor.description import Plain
    from megatron_syne.training.trainer import Trainer

# tensorboard groups scalars by what stands before the slash
_TAGS = {
    "data_share": "speed/data_share_percent",
    "peak_memory_bytes": "memory/peak_bytes",
    "param_norm": "norm/parameters",
    **{f"consumed_{what}": f"progress/consumed_{what}" for what in ("tokens", "samples")},
    **{
        name: f"speed/{name}"
        for name in (
            "tokens_per_second",
            "tokens_per_second_per_gpu",
            "tflops_per_gpu",
            "mfu",
            "step_seconds",
        )
    },
}
_SPLIT = ("data", "forward_backward", "optimizer", "checkpoint")


def tag_of(name: str) -> str:
    """Tensorboard's tag of a metric: ``train/loss``, ``train_loss/zh``, ``grad_norm/layer_3``, ``speed/mfu``, ..."""
    if name in _TAGS:
        return _TAGS[name]
    group, _, rest = name.partition("/")
    if rest:
        return f"train_loss/{rest}" if group == "loss" else name
    if name.removesuffix("_seconds") in (*_SPLIT, "checkpoint_write"):
        return f"time/{name}"
    return f"train/{name}"


def dashboard(sources: Iterable[str], num_layers: int) -> dict[str, dict[str, list[Any]]]:
    """What belongs beside each other, for the custom scalars page: sources of one chart as lines, each a pattern that
    tensorboard matches against the beginning of a tag."""

    def lines(*tags: str) -> list[Any]:
        return ["Multiline", [f"{re.escape(tag)}$" for tag in tags]]

    names = list(sources)
    groups = ["embedding", *(f"layer_{n}" for n in range(num_layers)), "final_norm", "output_layer"]
    return {
        "loss": {
            "training loss by source": lines("train/loss", *(f"train_loss/{name}" for name in names)),
            "validation loss by source": ["Multiline", ["validation_loss/.*"]],
        },
        "norms": {
            "gradient norm by layer": lines("train/grad_norm", *(f"grad_norm/{name}" for name in groups)),
            "parameter norm": lines("norm/parameters"),
        },
        "speed": {
            "tokens/s per GPU": lines("speed/tokens_per_second_per_gpu"),
            "model TFLOP/s per GPU": lines("speed/tflops_per_gpu"),
            "MFU": lines("speed/mfu"),
            "seconds of a step": lines("speed/step_seconds", *(f"time/{part}_seconds" for part in _SPLIT)),
        },
        "data": {
            "tokens read by source": lines(*(f"tokens/{name}" for name in names)),
            "mixture": lines(*(f"mixture/{name}" for name in names)),
        },
    }


def add_scalars(writer: Any, values: dict[str, float], step: int) -> None:
    """All values of a step as one event: a tenth of the time of ``add_scalar`` for each."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    if values:
        each = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        writer.file_writer.add_summary(Summary(value=each), step)


class TensorboardEvents(Callback):
    """Events below ``<run_dir>/tensorboard``; a resumed run writes on, and hides what it repeats.

    A disk that is full ends the events, told once, and not the training.
    """

    def __init__(self, folder: Path, page: str, options: dict[str, Plain], num_layers: int) -> None:
        """``page``: Markdown; ``options``: hyper-parameters."""
        self.folder = folder
        self.page, self.options, self.num_layers = page, options, num_layers
        self.writer: Any = None
        self.session_end: Any = None

    def on_train_start(self, trainer: Trainer) -> None:
        """Open the writer; ``purge_step`` drops events of steps that were lost with a killed process."""
        from torch.utils.tensorboard import SummaryWriter, summary

        hparams: Any = summary.hparams

        self.writer = SummaryWriter(str(self.folder), purge_step=trainer.state.step + 1)
        # without add_hparams, which would begin another run in a folder of its own
        finals = {"train/loss": 0.0, **{f"validation_loss/{name}": 0.0 for name in trainer.validation_data}}
        experiment, session, self.session_end = hparams(self.options, finals)

        def describe(writer: Any) -> None:
            writer.add_text("run", self.page, trainer.state.step)
            writer.add_custom_scalars(dashboard(trainer.train_data.plan.sources, self.num_layers))
            writer.file_writer.add_summary(experiment)
            writer.file_writer.add_summary(session)
            writer.flush()

        self._write(describe)

    def on_step_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """One scalar per metric, and what was read of each source; a fallback from FP8 as text."""
        step, values = trainer.state.step, {}
        if is_due(trainer, metrics):
            values = tokens_read(trainer) | mixture_shares(trainer)
            values |= {tag_of(name): value for name, value in metrics.items()}
            values["progress/stage"] = stage_number(trainer)
        texts = []
        for event in fp8_events(trainer):
            layers = ", ".join(str(layer) for layer in event["layers"])
            texts.append(f"layers {layers} in bf16 from step {event['from_step']} on: {event['reason']}")

        def write(writer: Any) -> None:
            add_scalars(writer, values, step)
            for text in texts:
                writer.add_text("fp8/fallback", text, step)

        self._write(write)

    def on_evaluation(self, trainer: Trainer, losses: dict[str, float]) -> None:
        """Loss and perplexity per validation source."""
        values = {f"validation_loss/{name}": loss for name, loss in losses.items()}
        values |= {f"validation_perplexity/{name}": perplexity(loss) for name, loss in losses.items()}
        self._scalars(values, trainer.state.step)

    def on_harness(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        """``harness/<task>/<metric>``, at the checkpoint's step."""
        self._scalars({f"harness/{name}": value for name, value in metrics.items()}, step)

    def on_train_end(self, trainer: Trainer) -> None:
        """Flush to disk; a run that is complete is marked so among the hyper-parameters."""
        if trainer.complete:
            self._write(lambda writer: writer.file_writer.add_summary(self.session_end))
        self._write(lambda writer: writer.close())

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Keep what was seen before the failure."""
        self._write(lambda writer: writer.close())

    def _scalars(self, values: dict[str, float], step: int) -> None:
        def write(writer: Any) -> None:
            add_scalars(writer, values, step)
            writer.flush()

        self._write(write)

    def _write(self, action: Callable[[Any], object]) -> None:
        """Do it, unless the disk has refused before."""
        if self.writer is None:
            return
        try:
            action(self.writer)
        except Exception as error:  # the writer's thread hands its error on at the next call
            fault = disk_fault(error)
            if fault is None:
                raise
            self.writer = None
            tell(f"{self.folder}: {fault.strerror}; training goes on without tensorboard events")
