"""What the rest of the stack may ask of a rank's FP8 layers, emulated or Transformer Engine's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch


class Fp8Layers(Protocol):
    """The FP8 linear layers of this rank, by global name: ``decoder.layers.3.mlp.linear_fc1``."""

    recipe: str
    """``delayed``, ``tensorwise`` or ``blockwise``."""

    @property
    def names(self) -> tuple[str, ...]:
        """This rank's FP8 linear layers in order, those in bf16 too."""

    @property
    def bf16_layers(self) -> frozenset[int]:
        """Global numbers of the transformer layers that compute in bf16, over all ranks."""

    def use_bf16(self, layers: Iterable[int]) -> None:
        """Compute these transformer layers (global numbers) in bf16 from now on; all ranks must call alike."""

    def disabled(self) -> AbstractContextManager[None]:
        """Everything in bf16 inside, without a change of any state (for the guard's comparison)."""

    def watched(self) -> AbstractContextManager[dict[str, dict[str, Any]]]:
        """Count inside: ``result[name][tensor] -> {"amax", "overflow", "underflow", "values"}`` on leaving it.

        ``tensor``: ``input``, ``weight``, and ``grad`` where the backward pass runs too.
        """

    def state(self) -> dict[str, torch.Tensor]:
        """All that a resume needs, as plain tensors by ``<name>.<tensor>.<field>``; empty where nothing is kept."""

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put back what :meth:`state` gave (of this rank's layers; DataError names what lacks or does not fit)."""
