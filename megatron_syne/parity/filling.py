"""Modules without memory are lent one block of it, in turn, and run with the weights that were put there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from megatron_syne.errors import DataError

_ALIGNMENT = 16
"""Elements; 64 bytes, as torch aligns its own allocations."""


class Lender:
    """Memory for the parameters of the one module that is at work, fp32.

    A block kept for good, because allocating and freeing a layer's tensors anew each time leaves holes in the
    heap, which grew by 45 MB with every layer of an 8B.
    """

    def __init__(self) -> None:
        self._block = torch.empty(0)

    def fill(self, module: nn.Module, read: Callable[[str], torch.Tensor]) -> Callable[..., Any]:
        """The module as a function, with the weights that ``read`` gives for the names of its parameters.

        Good until the next call. Raises DataError for a weight of another shape than the module's.
        """
        parameters = dict(module.named_parameters())
        sizes = [-(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT for parameter in parameters.values()]
        if sum(sizes) > len(self._block):
            self._block = torch.empty(0)  # given back before the larger one is taken
            self._block = torch.empty(sum(sizes))
        filled = {}
        parts = torch.split(self._block[: sum(sizes)], sizes)
        for part, (name, parameter) in zip(parts, parameters.items(), strict=True):
            tensor = read(name)
            if tensor.shape != parameter.shape:
                raise DataError(
                    f"{name}: expected the shape {tuple(parameter.shape)} by the configuration, "
                    f"found {tuple(tensor.shape)}"
                )
            filled[name] = part[: parameter.numel()].view(parameter.shape).copy_(tensor)
        return lambda *args, **kwargs: functional_call(module, filled, args, kwargs)
