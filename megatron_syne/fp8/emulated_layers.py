"""A rank's emulated FP8 layers as :class:`megatron_syne.fp8.layers.Fp8Layers`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from megatron_syne.fp8.counts import plain_counts
from megatron_syne.fp8.emulation import TENSORS, ChunkScaling, Settings, Switches
from megatron_syne.fp8.linear import Fp8Linear
from megatron_syne.fp8.recipes import fit_history
from megatron_syne.fp8.state import check_state

Linears = dict[str, tuple[int, Any]]
"""Global name -> (global number of the transformer layer, module)."""


class EmulatedFp8:
    """Hands each layer its scaling, follows the chunks' forward passes, and answers for them all."""

    def __init__(
        self, decoders: list[tuple[Any, Linears]], settings: Settings, bf16_layers: frozenset[int]
    ) -> None:
        """``decoders``: per model chunk its decoder block and what :func:`megatron_syne.fp8.attach.linears` found."""
        self.recipe = settings.recipe
        self.switches = Switches(bf16_layers=bf16_layers)
        self.chunks: list[ChunkScaling] = []
        for decoder, linears in decoders:
            if not linears:
                continue
            device = next(module.weight.device for _, module in linears.values())
            scaling = ChunkScaling(tuple(linears), settings, self.switches, device)
            for slot, (layer, module) in enumerate(linears.values()):
                assert isinstance(module, Fp8Linear), f"{type(module).__name__} is no emulated FP8 layer"
                module.scaling, module.slot, module.layer = scaling, slot, layer
            follow(decoder, scaling)
            self.chunks.append(scaling)

    @property
    def names(self) -> tuple[str, ...]:
        """This rank's FP8 linear layers in order, those in bf16 too."""
        return tuple(name for chunk in self.chunks for name in chunk.names)

    @property
    def bf16_layers(self) -> frozenset[int]:
        """Global numbers of the transformer layers that compute in bf16, over all ranks."""
        return self.switches.bf16_layers

    def use_bf16(self, layers: Iterable[int]) -> None:
        """Compute these transformer layers in bf16 from now on; all ranks must call alike."""
        self.switches.bf16_layers |= frozenset(layers)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Everything in bf16 inside, without a change of any state."""
        before, self.switches.off = self.switches.off, True
        try:
            yield
        finally:
            self.switches.off = before

    @contextmanager
    def watched(self) -> Iterator[dict[str, dict[str, Any]]]:
        """Count inside; on leaving it ``result[name][tensor] = {"amax", "overflow", "underflow", "values"}``."""
        result: dict[str, dict[str, Any]] = {}
        before, self.switches.counts = self.switches.counts, {}
        try:
            yield result
        finally:
            counts, self.switches.counts = self.switches.counts, before
            result.update(plain_counts(counts))

    def state(self) -> dict[str, torch.Tensor]:
        """``<name>.<tensor>.amax_history`` [history] and ``.scale`` [], copies; empty but for delayed scaling."""
        found: dict[str, torch.Tensor] = {}
        for chunk in self.chunks if self.recipe == "delayed" else ():
            for slot, name in enumerate(chunk.names):
                for tensor in TENSORS:
                    found[f"{name}.{tensor}.amax_history"] = chunk.histories[tensor][:, slot].clone()
                    found[f"{name}.{tensor}.scale"] = chunk.scales[tensor][slot].clone()
        return found

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put back what :meth:`state` gave; a history of another length is cut or filled with zeros."""
        check_state(state, self.state())
        for chunk in self.chunks if self.recipe == "delayed" else ():
            length = chunk.settings.history_len
            for slot, name in enumerate(chunk.names):
                for tensor in TENSORS:
                    history = state[f"{name}.{tensor}.amax_history"]
                    chunk.histories[tensor][:, slot] = fit_history(history, length)
                    chunk.scales[tensor][slot] = state[f"{name}.{tensor}.scale"]


def follow(decoder: Any, scaling: ChunkScaling) -> None:
    """Tell ``scaling`` where each forward pass of the decoder block begins and ends."""

    def enter(*_: Any) -> None:
        # The engine's schedules number the micro-batches on each layer; taken away again, so that a forward
        # pass outside them is not mistaken for a later micro-batch of the step before.
        number = decoder.layers[0].__dict__.pop("current_microbatch", None)
        scaling.enter(first_micro_batch=number is None or number <= 0)

    def leave(_module: Any, _arguments: Any, output: Any) -> None:
        scaling.leave(output[0] if isinstance(output, tuple) else output)

    decoder.register_forward_pre_hook(enter)
    decoder.register_forward_hook(leave)
