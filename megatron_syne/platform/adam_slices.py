"""Adam's step in slices of its parameters, so that what it copies to fp32 meanwhile is small."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

SLICE_NUMBERS = 2**27
"""Numbers in one slice, at least one parameter: 0.5 GiB of fp32 copies for each state in fewer bits."""


def slices(params: Iterable[Any], limit: int) -> Iterator[list[Any]]:
    """``params`` in order, in lists of at most ``limit`` numbers together (a larger parameter has one of its own)."""
    part: list[Any] = []
    numbers = 0
    for param in params:
        if part and numbers + param.numel() > limit:
            yield part
            part, numbers = [], 0
        part.append(param)
        numbers += param.numel()
    if part:
        yield part


class StepsInSlices:
    """Stands before a FusedAdam, or what steps like it, among the bases of an optimizer.

    Transformer Engine's (2.11, ``pytorch/optimizers/fused_adam.py``, ``step``) copies every state that is not fp32
    to fp32 for a whole parameter group, and keeps all copies until the group is done: with bf16 moments 8 bytes for
    each parameter, 64 GB for an 8B model on one GPU. State belongs to parameters and the step counter to the group,
    so a group can as well be updated slice by slice, to the same bits.
    """

    param_groups: list[dict[str, Any]]
    slice_numbers = SLICE_NUMBERS

    def step(self, *arguments: Any, **options: Any) -> None:
        """One update of all parameters; counts one step in every group, also in one without parameters here."""
        groups = self.param_groups
        base: Any = super()
        try:
            for group in groups:
                before = group.get("step", 0)
                for params in slices(group["params"], self.slice_numbers):
                    self.param_groups = [{**group, "params": params, "step": before}]
                    base.step(*arguments, **options)
                group["step"] = before + 1
        finally:
            self.param_groups = groups


def in_slices(adam: type) -> type:
    """The optimizer class with its step in slices; an instance of it is still one of ``adam``."""
    return type(adam.__name__, (StepsInSlices, adam), {})
