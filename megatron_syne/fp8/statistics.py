"""What FP8 did to the values of each layer, agreed over all ranks in one collective."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from typing import Any

import torch
import torch.distributed as dist

TENSORS = ("input", "weight", "grad")
FIGURES = ("amax", "overflow", "underflow")

Counts = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""By layer and tensor: ``amax``, and how many of its ``values`` are an ``overflow`` or an ``underflow``."""
Figures = dict[str, dict[str, dict[str, float]]]
"""By layer and tensor: ``amax``, and the shares of its values that are an ``overflow`` or an ``underflow``."""


def layer_number(name: str) -> int:
    """Global number of the transformer layer: ``decoder.layers.3.mlp.linear_fc1`` -> 3."""
    return int(name.split(".layers.", 1)[1].split(".", 1)[0])


def without_scale(state: Mapping[str, torch.Tensor]) -> frozenset[str]:
    """``<layer>.<tensor>`` of those in an FP8 state that never had a scale of their own: 1, and no amax yet.

    An empty history alone says nothing: the weights' amax is of a step's first micro-batch, and with as many
    micro-batches as the history is long it has left it by the end of the step.
    """
    end = ".amax_history"
    found = (
        key.removesuffix(end) for key, history in state.items() if key.endswith(end) and not history.any()
    )
    return frozenset(name for name in found if float(state[f"{name}.scale"]) == 1.0)


def shares(counts: Counts, unscaled: Container[str] = ()) -> Figures:
    """Counts as shares of all values. An amax that is no number is infinite.

    Left out are tensors without values, and those of ``unscaled`` (``<layer>.<tensor>``): what is lost before a
    tensor had a scale of its own says nothing of FP8.
    """
    return {
        name: {
            tensor: {
                "amax": amax if math.isfinite(amax := float(seen["amax"])) else math.inf,
                "overflow": float(seen["overflow"]) / float(seen["values"]),
                "underflow": float(seen["underflow"]) / float(seen["values"]),
            }
            for tensor, seen in tensors.items()
            if float(seen["values"]) > 0 and f"{name}.{tensor}" not in unscaled
        }
        for name, tensors in counts.items()
    }


def all_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """The FP8 layers of all ranks, sorted by layer; all ranks must call."""
    found: list[tuple[str, ...]] = [()] * dist.get_world_size()
    dist.all_gather_object(found, names)
    return tuple(sorted({name for part in found for name in part}, key=lambda n: (layer_number(n), n)))


def over_all_ranks(mine: list[Figures], names: tuple[str, ...], device: torch.device) -> Figures:
    """The largest of each figure over ``mine`` and all ranks, of the layers ``names``; all ranks must call.

    Ranks of one TP, CP or DP group see other parts of a layer's values, pipeline stages other layers: one
    maximum over the world serves both.
    """
    table = torch.full((len(names), len(TENSORS), len(FIGURES)), -1.0, dtype=torch.float64)
    row = {name: index for index, name in enumerate(names)}
    for figures in mine:
        for name, tensors in figures.items():
            for tensor, values in tensors.items():
                cell = table[row[name], TENSORS.index(tensor)]
                torch.maximum(cell, torch.tensor([values[f] for f in FIGURES], dtype=torch.float64), out=cell)
    table = table.to(device)
    dist.all_reduce(table, op=dist.ReduceOp.MAX)
    result: Figures = {}
    for name, tensors in zip(names, table.tolist(), strict=True):
        seen = {t: dict(zip(FIGURES, cell, strict=True)) for t, cell in zip(TENSORS, tensors, strict=True)}
        result[name] = {tensor: values for tensor, values in seen.items() if values["amax"] >= 0}
    return result
