"""Watch FP8 against bf16 while training, log it, and fall back to bf16 where it goes wrong.

Every ``precision.fp8_guard.interval`` iterations the first micro-batch of the step is run forward twice, in FP8
and in bf16, before the step; and what FP8 does to each layer's values is counted there and in the step itself,
its backward pass included. The training state stays as it was: a run that is watched has the losses of one that
is not, to the bit, until it falls back.

A loss gap above its limit puts all layers into bf16 at once, so that a loss that is no number in FP8 alone does
not end the run; a layer above its limits is in bf16 from the next step on. Both stay so, also on resume.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from megatron_syne.config.schema import Fp8GuardConfig, RunConfig
from megatron_syne.fp8.statistics import (
    Counts,
    Figures,
    all_names,
    layer_number,
    over_all_ranks,
    shares,
    without_scale,
)
from megatron_syne.training.callback import Callback

if TYPE_CHECKING:
    from megatron_syne.training.forward import Batch
    from megatron_syne.training.trainer import Trainer


class Fp8Guard(Callback):
    """In every run with FP8: without ``interval`` it does no more than keep up what an earlier part fell back to."""

    def __init__(self, config: RunConfig) -> None:
        self.options = config.precision.fp8_guard
        self.recipe = config.precision.fp8
        self.bf16_layers: set[int] = set()
        """What has fallen back (not what the configuration leaves in bf16)."""
        self.events: list[dict[str, Any]] = []
        self.names: tuple[str, ...] = ()
        self.counts: list[Counts] = []
        self.unscaled: frozenset[str] = frozenset()
        self.watch = ExitStack()

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps under ``fp8`` in ``state.json``: plain values, the same on every rank."""
        return {
            "version": 1,
            "recipe": self.recipe,
            "bf16_layers": sorted(self.bf16_layers),
            "events": [dict(event) for event in self.events],
        }

    def restore(self, record: dict[str, Any] | None) -> None:
        """Go on from what :meth:`record` gave (None: nothing), in any layout; it takes effect as training starts.

        Layers fell back under one recipe: a run that goes on with another begins with all in FP8 again.
        """
        if record is not None and record["recipe"] == self.recipe:
            self.bf16_layers = {int(layer) for layer in record["bf16_layers"]}
            self.events = [dict(event) for event in record["events"]]

    def on_train_start(self, trainer: Trainer) -> None:
        """Put back into bf16 what was; learn the layers of all ranks."""
        assert trainer.fp8 is not None
        if self.bf16_layers:
            trainer.fp8.use_bf16(sorted(self.bf16_layers))
            _tell(f"layers {_ranges(self.bf16_layers)} compute in bf16, to which they fell back before")
        if self.options.interval:
            self.names = all_names(trainer.fp8.names)

    def on_batch(self, trainer: Trainer, batches: list[Batch]) -> None:
        """The look, where it is due, and the counting of the step that follows."""
        fp8, options = trainer.fp8, self.options
        assert fp8 is not None
        if not options.interval or (trainer.state.step + 1) % options.interval or not self.in_fp8(trainer):
            return
        before = {name: value.clone() for name, value in fp8.state().items()}
        self.unscaled = without_scale(before)
        with fp8.watched() as counts:
            in_fp8 = self.loss(trainer, batches)
        with fp8.disabled():
            in_bf16 = self.loss(trainer, batches)
        if before:
            fp8.load_state(before)
        self.counts = [counts]
        gap = loss_gap(in_fp8, in_bf16)
        trainer.extra_metrics["fp8/loss_gap"] = gap
        limit = options.max_loss_gap
        if limit is not None and gap > limit:
            reason = f"loss {in_fp8:.6g} against {in_bf16:.6g} in bf16: gap {gap:.3g}, above {limit:g}"
            step = trainer.state.step + 1
            self.fall_back(trainer, {layer: reason for layer in self.in_fp8(trainer)}, step, step)
        self.counts.append(self.watch.enter_context(fp8.watched()))

    def on_step_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """What was counted goes into the step's metrics, and decides which layers stay in FP8."""
        if not self.counts:
            return
        self.watch.close()
        mine = [shares(counts, self.unscaled) for counts in self.counts]
        figures = over_all_ranks(mine, self.names, trainer.platform.device)
        self.counts = []
        step, still = trainer.state.step, self.in_fp8(trainer)
        bad = beyond_limits(figures, self.options)
        self.fall_back(trainer, {layer: why for layer, why in bad.items() if layer in still}, step, step + 1)
        metrics.update(as_metrics(figures))
        assert trainer.fp8 is not None
        metrics["fp8/bf16_layers"] = float(len(trainer.fp8.bf16_layers))

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Stop counting."""
        self.watch.close()

    def in_fp8(self, trainer: Trainer) -> list[int]:
        """Global numbers of the transformer layers that compute in FP8 now."""
        assert trainer.fp8 is not None
        return [n for n in range(trainer.model_config.num_layers or 0) if n not in trainer.fp8.bf16_layers]

    def loss(self, trainer: Trainer, batches: list[Batch]) -> float:
        """Mean loss of the step's first micro-batch over all replicas, forward only; all ranks must call."""
        import torch

        from megatron_syne.training.forward import reduce_over_world

        # the interleaved schedule takes micro-batches in groups of one per pipeline stage
        stages = trainer.config.parallel.pipeline_model_parallel_size
        count = stages if len(trainer.chunks) > 1 else 1
        seq_length = trainer.train_data.seq_length_at(trainer.state.consumed_samples)
        trainer.gather_parameters()
        for chunk in trainer.chunks:
            chunk.eval()
        with torch.no_grad():
            sums = trainer.run_schedule(batches[:count], seq_length, forward_only=True)
        for chunk in trainer.chunks:
            chunk.train()
        total, tokens = reduce_over_world(trainer.platform, sums, [])()
        return total / max(tokens, 1.0)

    def fall_back(self, trainer: Trainer, reasons: dict[int, str], step: int, first: int) -> None:
        """Compute these layers in bf16 from step ``first`` on, and say so once; seen at ``step``."""
        if not reasons:
            return
        assert trainer.fp8 is not None
        trainer.fp8.use_bf16(sorted(reasons))
        self.bf16_layers |= set(reasons)
        by_reason: dict[str, list[int]] = {}
        for layer, reason in sorted(reasons.items()):
            by_reason.setdefault(reason, []).append(layer)
        for reason, layers in by_reason.items():
            self.events.append({"step": step, "from_step": first, "layers": layers, "reason": reason})
            _tell(f"step {step}: {reason}; layers {_ranges(layers)} compute in bf16 from step {first} on")


def loss_gap(in_fp8: float, in_bf16: float) -> float:
    """Difference relative to bf16's; infinite where FP8's alone is no finite number, 0 where both are not."""
    if not math.isfinite(in_bf16):
        return 0.0  # the step itself will say so
    return abs(in_fp8 / in_bf16 - 1.0) if math.isfinite(in_fp8) else math.inf


def beyond_limits(figures: Figures, options: Fp8GuardConfig) -> dict[int, str]:
    """By global number, each transformer layer with a share above its limit, and the worst of them in words."""
    worst: dict[int, tuple[float, str]] = {}
    for figure, limit in (("overflow", options.max_overflow), ("underflow", options.max_underflow)):
        if limit is None:
            continue
        for name, tensors in figures.items():
            for tensor, values in tensors.items():
                excess, layer = values[figure] - limit, layer_number(name)
                if excess > worst.get(layer, (0.0, ""))[0]:
                    words = (
                        f"{name} {tensor}: {figure} of {values[figure]:.3g} of its values, above {limit:g}"
                    )
                    worst[layer] = (excess, words)
    return {layer: words for layer, (_, words) in sorted(worst.items())}


def as_metrics(figures: Figures) -> dict[str, float]:
    """``fp8/<figure>/<layer>/<tensor>`` each, and the largest shares of all as ``fp8/max_<figure>``."""
    result = {
        f"fp8/{figure}/{name}/{tensor}": value
        for name, tensors in figures.items()
        for tensor, values in tensors.items()
        for figure, value in values.items()
    }
    for figure in ("overflow", "underflow"):
        found = [values[figure] for tensors in figures.values() for values in tensors.values()]
        if found:
            result[f"fp8/max_{figure}"] = max(found)
    return result


def _ranges(layers: Iterable[int]) -> str:
    """``0-3, 7``"""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _tell(words: str) -> None:
    """On stderr, by rank 0 alone: all ranks come to the same."""
    import torch.distributed as dist

    if dist.get_rank() == 0:
        print(f"FP8: {words}", file=sys.stderr, flush=True)
