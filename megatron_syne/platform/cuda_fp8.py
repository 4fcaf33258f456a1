"""Transformer Engine's FP8 layers as :class:`megatron_syne.fp8.layers.Fp8Layers`.

Written after Transformer Engine 2.11's Python sources and megatron-core 0.16.1's; **never run on a GPU**, only
against stand-ins. What it relies on:

* per layer ``fp8_meta["scaling_fwd"]`` and ``["scaling_bwd"]``: under delayed scaling their ``amax_history``
  [history, 3 or 2] and ``scale`` [3 or 2], made in the first FP8 forward pass (``init_fp8_metadata``); the
  quantizers and ``FP8GlobalStateManager``'s buffers hold views of them, so they are only ever written in place.
* columns: forward input, weight, output; backward gradient of the output, of the input (``FP8FwdTensors``).
* megatron-core asks ``config.fp8`` anew in each forward pass of a decoder block (``transformer_block.py``).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from megatron_syne.config.schema import PrecisionConfig
from megatron_syne.errors import DataError
from megatron_syne.fp8.counts import Counts, add_counts, plain_counts
from megatron_syne.fp8.recipes import (
    ROW_TILE,
    SQUARE_TILE,
    amax_of,
    block_scales,
    current_scale,
    fit_history,
    formats,
    losses_of,
    to_fp8,
)
from megatron_syne.fp8.state import check_state

COLUMNS = {"input": ("scaling_fwd", 0), "weight": ("scaling_fwd", 1), "grad": ("scaling_bwd", 0)}
"""Tensor -> (entry of ``fp8_meta``, column in it)."""

Linears = dict[str, tuple[int, Any]]


class EngineFp8:
    """Transformer Engine's layers of this rank; ``decoders``: per model chunk its block and its FP8 layers."""

    def __init__(
        self, decoders: list[tuple[Any, Linears]], precision: PrecisionConfig, bf16_layers: frozenset[int]
    ) -> None:
        self.recipe = str(precision.fp8)
        self.precision = precision
        self.decoders = [decoder for decoder, _ in decoders]
        self.linears: Linears = {name: entry for _, found in decoders for name, entry in found.items()}
        self._bf16_layers = bf16_layers
        for decoder in self.decoders:
            decoder.register_forward_hook(self._forget_evaluation)
            for layer in decoder.layers:
                self._may_leave_fp8(layer)

    @property
    def names(self) -> tuple[str, ...]:
        """This rank's FP8 linear layers in order, those in bf16 too."""
        return tuple(self.linears)

    @property
    def bf16_layers(self) -> frozenset[int]:
        """Global numbers of the transformer layers that compute in bf16, over all ranks."""
        return self._bf16_layers

    def use_bf16(self, layers: Iterable[int]) -> None:
        """Compute these transformer layers in bf16 from now on; all ranks must call alike."""
        self._bf16_layers |= frozenset(layers)

    def _may_leave_fp8(self, layer: Any) -> None:
        """Run a layer outside FP8 where it has been put into bf16.

        The context is nested in the engine's own, which alone moves the amax histories on (it does so at
        depth 0), so delayed scaling of the other layers is not disturbed. ``first_last_layers_bf16`` is the
        engine's own doing and comes to the same.
        """
        forward, number = layer.forward, layer.layer_number - 1
        reference = weakref.ref(self)

        @functools.wraps(forward)
        def chosen(*args: Any, **kwargs: Any) -> Any:
            layers = reference()
            if layers is None or number not in layers.bf16_layers:
                return forward(*args, **kwargs)
            from transformer_engine.pytorch import fp8_autocast

            with fp8_autocast(enabled=False):
                return forward(*args, **kwargs)

        layer.forward = chosen

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Everything in bf16 inside, without a change of any state."""
        configs = {id(decoder.config): decoder.config for decoder in self.decoders}
        before = {key: config.fp8 for key, config in configs.items()}
        for config in configs.values():
            config.fp8 = None
        try:
            yield
        finally:
            for key, config in configs.items():
                config.fp8 = before[key]

    def _forget_evaluation(self, decoder: Any, _arguments: Any, _output: Any) -> None:
        """A forward pass without gradients leaves no trace: empty the row that its amaxes went to."""
        if self.recipe != "delayed" or torch.is_grad_enabled():
            return
        for layer in decoder.layers:
            for module in layer.modules():
                meta = getattr(module, "fp8_meta", {}).get("scaling_fwd")
                if meta is not None:
                    meta.amax_history[0].zero_()

    @contextmanager
    def watched(self) -> Iterator[dict[str, dict[str, Any]]]:
        """Count inside; on leaving it ``result[name][tensor] = {"amax", "overflow", "underflow", "values"}``.

        Transformer Engine's kernels do not count, so inputs, weights and gradients are rounded once more by
        the same rules, from the values that the layers are given: under sequence parallelism this rank's part.
        """
        result: dict[str, dict[str, Any]] = {}
        counts: Counts = {}
        handles = []
        for name, (number, module) in self.linears.items():
            if number in self._bf16_layers:
                continue
            handles.append(module.register_forward_pre_hook(self._count_forward(counts, name)))
            handles.append(module.register_full_backward_hook(self._count_backward(counts, name)))
        try:
            yield result
        finally:
            for handle in handles:
                handle.remove()
            result.update(plain_counts(counts))

    def _count_forward(self, counts: Counts, name: str) -> Any:
        def count(module: Any, arguments: tuple[Any, ...]) -> None:
            self._count(counts, name, "input", module, normed(module, arguments[0].detach()))
            self._count(counts, name, "weight", module, module.weight.detach())

        return count

    def _count_backward(self, counts: Counts, name: str) -> Any:
        def count(module: Any, _grad_input: Any, grad_output: tuple[Any, ...]) -> None:
            if grad_output[0] is not None:
                self._count(counts, name, "grad", module, grad_output[0].detach())

        return count

    def _count(self, counts: Counts, name: str, tensor: str, module: Any, x: torch.Tensor) -> None:
        dtype = formats(self.precision.fp8_format)[1 if tensor == "grad" else 0]
        flat = x.reshape(-1, x.shape[-1])
        if self.recipe == "delayed":
            key, column = COLUMNS[tensor]
            meta = module.fp8_meta.get(key)
            scale = torch.ones((), device=x.device) if meta is None else meta.scale[column]
        elif self.recipe == "blockwise":
            scale = block_scales(flat, dtype, SQUARE_TILE if tensor == "weight" else ROW_TILE)
        else:
            scale = current_scale(amax_of(flat), dtype, power_of_two=False)
        overflow, underflow = losses_of(flat, to_fp8(flat, scale, dtype), scale)
        add_counts(counts, name, tensor, amax_of(flat), overflow, underflow, flat.numel())

    def state(self) -> dict[str, torch.Tensor]:
        """``<name>.<tensor>.amax_history`` [history] and ``.scale`` [], copies; empty but for delayed scaling.

        A layer that has not run in FP8 yet has Transformer Engine's start: scale 1, an empty history.
        """
        found: dict[str, torch.Tensor] = {}
        for name, (_, module) in self.linears.items() if self.recipe == "delayed" else ():
            for tensor, (key, column) in COLUMNS.items():
                meta = module.fp8_meta.get(key)
                device = module.weight.device
                if meta is None:
                    history = torch.zeros(self.precision.fp8_amax_history_len, device=device)
                    scale = torch.ones((), device=device)
                else:
                    history, scale = meta.amax_history[:, column].clone(), meta.scale[column].clone()
                found[f"{name}.{tensor}.amax_history"], found[f"{name}.{tensor}.scale"] = history, scale
        return found

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put back what :meth:`state` gave; a history of another length is cut or filled with zeros."""
        check_state(state, self.state())
        for name, (_, module) in self.linears.items() if self.recipe == "delayed" else ():
            if "scaling_fwd" not in module.fp8_meta:
                self._make_state(name, module)
            for tensor, (key, column) in COLUMNS.items():
                meta = module.fp8_meta[key]
                length = meta.amax_history.shape[0]
                meta.amax_history[:, column].copy_(
                    fit_history(state[f"{name}.{tensor}.amax_history"], length)
                )
                meta.scale[column].copy_(state[f"{name}.{tensor}.scale"])

    def _make_state(self, name: str, module: Any) -> None:
        """What the layer's first FP8 forward pass would make; later it finds it there and keeps it."""
        from megatron.core.fp8_utils import get_fp8_recipe

        recipe = get_fp8_recipe(self.decoders[0].config)
        if recipe is None:
            raise DataError(f"FP8 state of {name}: Transformer Engine has no recipe for this configuration")
        module.fp8_meta["recipe"], module.fp8_meta["num_gemms"] = recipe, 1
        module.init_fp8_meta_tensors(recipe)


def normed(module: Any, x: torch.Tensor) -> torch.Tensor:
    """What a layer's product is given: its input, behind its own norm where it has one (``LayerNormLinear``)."""
    weight = getattr(module, "layer_norm_weight", None)
    if weight is None:
        return x
    gain = weight.detach().float() + (1.0 if module.zero_centered_gamma else 0.0)
    values = x.float()
    if module.normalization == "RMSNorm":
        return torch.nn.functional.rms_norm(values, gain.shape, gain, module.eps).to(x.dtype)
    bias = module.layer_norm_bias.detach().float()
    return torch.nn.functional.layer_norm(values, gain.shape, gain, bias, module.eps).to(x.dtype)
