"""The loop: ``fit`` and ``train_step``. Everything else about a run is a callback or was handed in."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from megatron_syne.config.schema import ModelConfig, RunConfig
from megatron_syne.errors import DataError
from megatron_syne.fp8.layers import Fp8Layers
from megatron_syne.platform.base import Platform
from megatron_syne.training import norms
from megatron_syne.training.callback import Callback
from megatron_syne.training.forward import Batch, forward_step, reduce_over_world
from megatron_syne.training.optimizer import set_learning_rate
from megatron_syne.training.state import TrainState


@dataclass
class Trainer:
    """A run on this rank. All parts are built by the caller (``train.py``) and handed in."""

    config: RunConfig
    model_config: ModelConfig
    platform: Platform
    chunks: list[Any]
    """This rank's model chunks, wrapped in DDP."""
    optimizer: Any
    learning_rate: Callable[[int], float]
    """Learning rate of the step that begins after so many samples."""
    train_data: Any
    """``global_batch(consumed_samples) -> list of micro-batches`` of this rank, and their sizes at a sample."""
    validation_data: dict[str, Any]
    """The same for each validation source, with ``num_samples``."""
    train_iters: int
    """Steps of the whole run."""
    leg_end: int | None = None
    """Step after which another engine goes on from the checkpoint; None = the end of the run."""
    state: TrainState = field(default_factory=TrainState)
    callbacks: Sequence[Callback] = ()
    fp8: Fp8Layers | None = None
    """This rank's FP8 layers, None without FP8."""
    fp8_record: Callable[[], dict[str, Any]] | None = None
    """What checkpoints keep of them beside their tensors."""
    extra_metrics: dict[str, float] = field(default_factory=dict)
    """What callbacks add to the metrics of the step under way; the same on every rank."""
    stop_requested: float = 0.0
    """Set non-zero by a callback of *any* rank: all ranks stop together after the current step."""
    stop_reason: str | None = None
    signalled: bool = False
    """A scheduler is waiting: nothing but saving is done any more."""

    def fit(self) -> None:
        """Train until ``leg_end``, or until a callback of some rank asks to stop."""
        end = self.train_iters if self.leg_end is None else self.leg_end
        try:
            self.emit("on_train_start")
            settle_garbage()
            self.zero_gradients()
            self.evaluate_if_due()  # the one that a stop left undone
            while self.state.step < end and self.stop_reason is None:
                self.emit("on_step_start")
                metrics = self.train_step()
                self.emit("on_step_end", metrics)
                self.evaluate_if_due()
                self.emit("on_step_boundary")
            self.emit("on_train_end")
        except BaseException as error:
            self.emit("on_exception", error)
            raise

    def train_step(self) -> dict[str, float]:
        """One optimizer step on the next global batch; returns its metrics, the same on every rank.

        Times are this rank's own: ``data_seconds`` waiting for the batch, ``forward_backward_seconds`` both passes
        with the reduction of the gradients, ``optimizer_seconds`` clipping, update and the gathering of weights. On a
        GPU they are taken from events, which are read behind the step's one wait for the device.
        """
        started = time.perf_counter()
        first = self.state.consumed_samples
        batch_size = self.train_data.global_batch_size_at(first)
        rate = self.learning_rate(first)
        set_learning_rate(self.optimizer, rate, self.config.optimizer.weight_decay)
        asked = time.perf_counter()
        batches = self.train_data.global_batch(first)
        data_seconds = time.perf_counter() - asked
        self.extra_metrics = {}
        self.emit("on_batch", batches)

        names = self.train_data.plan.sources if self.config.monitor.loss_per_source else ()
        marks = [self.platform.mark()]
        seq_length = self.train_data.seq_length_at(first)
        sums = self.run_schedule(batches, seq_length, forward_only=False, sources=len(names))
        marks.append(self.platform.mark())
        squares = self.squares_if_due()
        marks.append(self.platform.mark())
        updated, grad_norm, _ = self.optimizer.step()
        marks.append(self.platform.mark())
        told = [self.stop_requested, 0.0 if updated else 1.0]
        read = reduce_over_world(self.platform, sums, told, len(names), squares)
        self.zero_gradients()  # a GPU does so while the host reads, and while it tells of this step
        values = read()
        (loss_sum, tokens), by_source, rest = values[:2], values[2:], values[2 + 2 * len(names) :]
        (stop, refused), squared = rest[:2], rest[2:]
        loss = loss_sum / max(tokens, 1.0)
        self.refuse_unless_finite(loss, grad_norm, refused > 0)

        self.state.step += 1
        self.state.consumed_samples += batch_size
        self.state.consumed_tokens += int(tokens)
        if stop:
            self.signalled, self.stop_reason = True, "a signal asked to stop"
        seconds = time.perf_counter() - started
        return {
            "loss": loss,
            "grad_norm": float(grad_norm),
            "learning_rate": rate,
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
            "data_seconds": data_seconds,
            "data_share": 100.0 * data_seconds / seconds,
            # the reduction's result was read: all marks lie behind the device
            "forward_backward_seconds": self.platform.seconds_between(marks[0], marks[1]),
            "optimizer_seconds": self.platform.seconds_between(marks[2], marks[3]),
            "consumed_tokens": float(self.state.consumed_tokens),
            "consumed_samples": float(self.state.consumed_samples),
            "peak_memory_bytes": float(self.platform.peak_memory()),
            **loss_by_source(names, by_source),
            **(norms.as_metrics(squared, self.model_config.num_layers or 0) if squared else {}),
            **self.extra_metrics,
        }

    def zero_gradients(self) -> None:
        """Make the gradients ready for the next step's backward passes."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def squares_if_due(self) -> Any:
        """What the norms of the step under way are made of, None where they are not due."""
        interval = self.config.monitor.norms_interval
        if not interval or (self.state.step + 1) % interval:
            return None
        layers = self.model_config.num_layers or 0
        return norms.sums_of_squares(self.chunks, self.optimizer, layers, self.platform.device)

    def refuse_unless_finite(self, loss: float, grad_norm: float, refused: bool) -> None:
        """All ranks see the same values, so all stop here together; DataError, nothing of the step is kept."""
        if not math.isfinite(loss) or not math.isfinite(grad_norm) or refused:
            raise DataError(
                f"step {self.state.step + 1}: loss {loss}, gradient norm {grad_norm}: not finite; the last "
                "checkpoint is untouched. Lower the learning rate, or look at this step's data: "
                f"{self.train_data.described(self.state.consumed_samples)}"
            )

    def run_schedule(
        self,
        batches: list[Batch],
        seq_length: int,
        forward_only: bool,
        micro_batch_size: int | None = None,
        sources: int = 0,
    ) -> list[Any]:
        """megatron-core's schedule (none, 1F1B or interleaved) over one global batch of this rank, in the training
        step's micro-batches where ``micro_batch_size`` is not given; the losses of so many ``sources`` apart."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        if micro_batch_size is None:
            micro_batch_size = self.train_data.micro_batch_size_at(self.state.consumed_samples)
        on_device = [self.platform.to_device(batch) for batch in batches]
        iterators = [iter(on_device) for _ in self.chunks]  # each chunk walks the same micro-batches
        result: list[Any] = get_forward_backward_func()(
            forward_step_func=partial(forward_step, self.platform, sources=sources),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(batches),
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            forward_only=forward_only,
        )
        return result

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do: all steps, and the evaluation after the last."""
        return self.state.step >= self.train_iters and not self.evaluation_is_due()

    def evaluation_is_due(self) -> bool:
        """After every ``eval_interval`` steps and the last one, until it is done."""
        interval, step = self.config.train.eval_interval, self.state.step
        if interval is None or not self.validation_data or step == self.state.evaluated_step:
            return False
        return step % interval == 0 or step == self.train_iters

    def evaluate_if_due(self) -> None:
        """Evaluate and tell the callbacks, but not with a scheduler waiting: it is made up for on resume."""
        if self.evaluation_is_due() and not self.signalled:
            losses = self.evaluate()
            self.state.evaluated_step = self.state.step
            self.emit("on_evaluation", losses)

    def evaluate(self) -> dict[str, float]:
        """Mean loss in nats per token of each validation source, over its first ``eval_iters`` batches."""
        import torch

        losses = {}
        self.gather_parameters()
        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad():
            for name, data in self.validation_data.items():
                sums: list[Any] = []
                for start in data.batch_starts(self.config.train.eval_iters):
                    batches, length = data.global_batch(start), data.seq_length_at(start)
                    sums += self.run_schedule(batches, length, True, data.micro_batch_size_at(start))
                total, tokens = reduce_over_world(self.platform, sums, [])()
                losses[name] = total / max(tokens, 1.0)
        for chunk in self.chunks:
            chunk.train()
        return losses

    def gather_parameters(self) -> None:
        """Make every rank's weights current, before they are saved or evaluated; all ranks must call.

        With ``overlap_param_gather`` the engine gathers the updated weights only in the next forward pass:
        until then each rank holds the last step's values of what it does not own.
        """
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def emit(self, event: str, *args: Any) -> None:
        """Tell every callback, in order."""
        for callback in self.callbacks:
            getattr(callback, event)(self, *args)


def settle_garbage() -> None:
    """Collect, and leave out of later collections whatever is there now.

    A full collection walks every object of torch and the engine (hundreds of thousands: 0.16 s measured), at another
    moment on each rank, while all the others wait for it. ``assembly.release`` takes it back.
    """
    gc.collect()
    gc.freeze()


def loss_by_source(names: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    """``loss/<source>`` of the sums and then the tokens of each source; those without a token are left out."""
    each = zip(names, values[: len(names)], values[len(names) :], strict=False)
    return {f"loss/{name}": total / tokens for name, total, tokens in each if tokens > 0}
