"""What rounding to FP8 lost, per layer and tensor: gathered as tensors, handed out as numbers."""

from __future__ import annotations

from typing import Any

import torch

Counts = dict[str, dict[str, dict[str, Any]]]
"""``counts[layer][tensor]``: ``amax``, ``overflow``, ``underflow``, ``values``."""


def add_counts(
    counts: Counts,
    name: str,
    tensor: str,
    amax: torch.Tensor,
    overflow: torch.Tensor,
    underflow: torch.Tensor,
    values: int,
) -> None:
    """Add what one rounding lost, still as tensors (nothing waits for the device)."""
    entry = counts.setdefault(name, {}).setdefault(
        tensor, {"amax": torch.zeros_like(amax), "overflow": 0, "underflow": 0, "values": 0}
    )
    entry["amax"] = torch.maximum(entry["amax"], amax)
    entry["overflow"] = entry["overflow"] + overflow
    entry["underflow"] = entry["underflow"] + underflow
    entry["values"] += values


def plain_counts(counts: Counts) -> dict[str, dict[str, Any]]:
    """The same as numbers: ``amax`` a float, the others ints."""
    return {
        name: {
            tensor: {
                "amax": float(entry["amax"]),
                **{key: int(entry[key]) for key in ("overflow", "underflow", "values")},
            }
            for tensor, entry in tensors.items()
        }
        for name, tensors in counts.items()
    }
