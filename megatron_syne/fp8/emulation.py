"""Scales of emulated FP8: which one a tensor is rounded with, and the amax history behind it.

Transformer Engine's rules [read in 2.11], kept here:

* delayed scaling: the amax of a round decides the scale of the next. A round is a micro-batch, not a step:
  histories of inputs and weights move on at the end of a chunk's forward pass (``autocast_exit``), those of
  gradients at the end of its backward pass; each time the row of new amaxes is first reduced over TP x CP x DP.
* a weight is rounded in the first micro-batch of a step and kept for the others (``is_first_microbatch``).
* recomputation uses the scales of the first forward pass and records nothing.

Two differences, both so that a run does not depend on them: an evaluation leaves no trace (Transformer Engine
takes its amaxes along into the next round), and with recomputation or several chunks per stage histories
move on once per micro-batch and chunk (Transformer Engine moves all of a rank's, and more often).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist

from megatron_syne.fp8.counts import Counts, add_counts
from megatron_syne.fp8.recipes import (
    COLUMN_TILE,
    ROW_TILE,
    SQUARE_TILE,
    amax_of,
    block_scales,
    current_scale,
    delayed_scale,
    from_fp8,
    losses_of,
    roll_history,
    to_fp8,
)

INPUT, WEIGHT, GRAD = "input", "weight", "grad"
TENSORS = (INPUT, WEIGHT, GRAD)


@dataclass(frozen=True)
class Settings:
    """The recipe, as ``precision`` has it."""

    recipe: str
    forward: torch.dtype
    backward: torch.dtype
    margin: int = 0
    history_len: int = 1024
    algo: str = "max"
    group: Any = None
    """Ranks that share scales under delayed scaling (TP x CP x DP); None = this one alone."""


@dataclass
class Switches:
    """What may change while training; shared by all chunks of a rank."""

    off: bool = False
    bf16_layers: frozenset[int] = frozenset()
    counts: Counts | None = None


class Phase(Enum):
    """What a forward pass of a layer is for."""

    PLAIN = "evaluation: nothing is recorded"
    RECORD = "training"
    FIRST = "training, to be run again in the backward pass"
    AGAIN = "that second run"


@dataclass
class ChunkScaling:
    """Scales of one model chunk's linear layers, by their position (``slot``) in ``names``."""

    names: tuple[str, ...]
    settings: Settings
    switches: Switches
    device: torch.device
    scales: dict[str, torch.Tensor] = field(init=False)
    histories: dict[str, torch.Tensor] = field(init=False)
    """Each float32 [history, slots]; row 0 is the round under way."""
    inside: bool | None = None
    """Within the chunk's forward pass: whether it is for training."""

    def __post_init__(self) -> None:
        slots = len(self.names)
        self.scales = {name: torch.ones(slots, device=self.device) for name in TENSORS}
        shape = (self.settings.history_len, slots)
        self.histories = {name: torch.zeros(shape, device=self.device) for name in TENSORS}
        self.weights: dict[int, torch.Tensor] = {}
        self.kept_scales: list[deque[torch.Tensor]] = [deque() for _ in self.names]

    @property
    def delayed(self) -> bool:
        """Whether there is any state."""
        return self.settings.recipe == "delayed"

    def enter(self, first_micro_batch: bool) -> None:
        """The chunk's forward pass begins."""
        if self.switches.off:
            return
        self.inside = torch.is_grad_enabled()
        if first_micro_batch:
            self.weights.clear()

    def leave(self, output: torch.Tensor) -> None:
        """It is over: histories of inputs and weights move on; those of gradients will after the backward pass."""
        training, self.inside = self.inside, None
        if self.switches.off or not training or not self.delayed:
            return
        self.advance(INPUT, WEIGHT)
        if output.requires_grad:
            # The gradient of the chunk's output comes first in its backward pass, outside any recomputation;
            # the callback runs when that pass is over.
            engine: Any = torch.autograd.Variable._execution_engine
            output.register_hook(  # type: ignore[no-untyped-call]
                lambda _: engine.queue_callback(lambda: self.advance(GRAD))
            )

    def advance(self, *tensors: str) -> None:
        """Reduce the round's amaxes over the group, decide the next scales, move the histories on."""
        settings = self.settings
        rows = torch.cat([self.histories[name][0] for name in tensors])
        if settings.group is not None and dist.get_world_size(settings.group) > 1:
            dist.all_reduce(rows, op=dist.ReduceOp.MAX, group=settings.group)
        for name, row in zip(tensors, rows.chunk(len(tensors)), strict=True):
            self.histories[name][0] = row
            rolled, amax = roll_history(self.histories[name], settings.algo)
            dtype = settings.backward if name == GRAD else settings.forward
            self.histories[name] = rolled
            self.scales[name] = delayed_scale(amax, self.scales[name], dtype, settings.margin)

    def phase(self, slot: int) -> Phase:
        """What a layer's forward pass is for; to be asked outside ``autograd.Function``, which hides gradients."""
        if self.inside is None:
            again = self.delayed and torch.is_grad_enabled() and bool(self.kept_scales[slot])
            return Phase.AGAIN if again else Phase.PLAIN
        if not self.inside:
            return Phase.PLAIN
        return Phase.RECORD if torch.is_grad_enabled() else Phase.FIRST

    def round_input(
        self, slot: int, x: torch.Tensor, phase: Phase, both: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``x`` [tokens, features] rounded for the forward product and, where ``both``, for the weight's gradient."""
        if not self.delayed:
            return self._copies(slot, INPUT, x, both, count=phase is not Phase.AGAIN)
        if phase is Phase.AGAIN:
            scale = self.kept_scales[slot].popleft()
        else:
            scale = self.scales[INPUT][slot]
        if phase is Phase.FIRST:
            self.kept_scales[slot].append(scale)
        if phase in (Phase.RECORD, Phase.FIRST):
            self._record(slot, INPUT, x)
        rounded = self._round(slot, INPUT, x, scale, count=phase is not Phase.AGAIN)
        return rounded, rounded

    def round_weight(self, slot: int, weight: torch.Tensor, phase: Phase) -> torch.Tensor:
        """``weight`` [out, in] rounded; once per step within the chunk's forward pass."""
        if self.inside is not None or phase is Phase.AGAIN:
            kept = self.weights.get(slot)
            if kept is not None:
                return kept
        if self.delayed:
            scale = self.scales[WEIGHT][slot]
            if phase in (Phase.RECORD, Phase.FIRST):
                self._record(slot, WEIGHT, weight)
        else:
            scale = self._current(weight, self.settings.forward, SQUARE_TILE)
        rounded = self._round(slot, WEIGHT, weight, scale)
        if self.inside is not None:
            self.weights[slot] = rounded
        return rounded

    def round_grad(self, slot: int, grad: torch.Tensor, both: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """``grad`` [tokens, features] rounded for the input's and, where ``both``, for the weight's gradient."""
        if not self.delayed:
            return self._copies(slot, GRAD, grad, both)
        self._record(slot, GRAD, grad)
        rounded = self._round(slot, GRAD, grad, self.scales[GRAD][slot])
        return rounded, rounded

    def _copies(
        self, slot: int, tensor: str, x: torch.Tensor, both: bool, count: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Blockwise scaling has tiles along what each product sums over, so it rounds twice, each from ``x``."""
        dtype = self.settings.backward if tensor == GRAD else self.settings.forward
        rounded = self._round(slot, tensor, x, self._current(x, dtype, ROW_TILE), count)
        if self.settings.recipe != "blockwise" or not both:
            return rounded, rounded
        return rounded, self._round(slot, tensor, x, self._current(x, dtype, COLUMN_TILE), count=False)

    def _current(self, x: torch.Tensor, dtype: torch.dtype, tile: tuple[int, int]) -> torch.Tensor:
        """Scale by what the values are now: one for the tensor, or one per tile."""
        if self.settings.recipe == "blockwise":
            return block_scales(x, dtype, tile)
        return current_scale(amax_of(x), dtype, power_of_two=False)

    def _record(self, slot: int, tensor: str, x: torch.Tensor) -> None:
        row = self.histories[tensor][0]
        row[slot] = torch.maximum(row[slot], amax_of(x))

    def _round(
        self, slot: int, tensor: str, x: torch.Tensor, scale: torch.Tensor, count: bool = True
    ) -> torch.Tensor:
        q = to_fp8(x, scale, self.settings.backward if tensor == GRAD else self.settings.forward)
        if count and self.switches.counts is not None:
            overflow, underflow = losses_of(x, q, scale)
            add_counts(
                self.switches.counts, self.names[slot], tensor, amax_of(x), overflow, underflow, x.numel()
            )
        return from_fp8(q, scale, x.dtype)
