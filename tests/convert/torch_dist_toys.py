"""Toys as Megatron's side has them: state dicts, and folders written and read by torch itself."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from unit.convert.format_toys import ToyWeights

from megatron_syne.convert.numbers import to_float32
from megatron_syne.convert.pieces import Entry, local_shape, pieces
from megatron_syne.convert.table import entries
from megatron_syne.models.hf_config import hf_config_from_model


def stated(weights: ToyWeights, folder: Path) -> Path:
    """A folder with the ``config.json`` alone."""
    folder.mkdir()
    config = hf_config_from_model(weights.model, "bfloat16")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def parameter(weights: ToyWeights, entry: Entry) -> torch.Tensor:
    """The whole Megatron parameter in fp32 (of ToyWeights' numbers all are exact there)."""
    shape = local_shape(entry, weights.model, 1)
    out = np.zeros((shape[0], int(np.prod(shape[1:], dtype=int))), np.float32)
    for piece in pieces(entry, weights.model, 0, 1):
        values = to_float32(weights.rows[piece.source], weights.dtypes[piece.source])[slice(*piece.rows)]
        high, wide = values[:, slice(*piece.cols)].shape
        down, right = piece.at
        out[down : down + high, right : right + wide] = values[:, slice(*piece.cols)] + entry.shift
    return torch.from_numpy(out).view(shape)


def state_dict(
    weights: ToyWeights, stacked: bool = True, te: bool = True, halves: bool = False
) -> dict[str, Any]:
    """What a Megatron model has, by the names that it has in a checkpoint, as fp32 tensors."""
    found: dict[str, torch.Tensor] = {}
    for entry in entries(weights.model):
        value = parameter(weights, entry)
        name = (entry.te if te else None) or entry.megatron
        if halves and name.endswith("linear_fc1.weight"):
            found |= {f"{name}_w": value.chunk(2)[0], f"{name}_v": value.chunk(2)[1]}
        else:
            found[name] = value
    if not stacked:
        return found
    layers: dict[str, list[torch.Tensor]] = {}
    for name, value in found.items():
        parts = name.split(".")
        if parts[1] == "layers":
            layers.setdefault(".".join([*parts[:2], *parts[3:]]), []).append(value)
    ends = {name: value for name, value in found.items() if not name.startswith("decoder.layers.")}
    return ends | {name: torch.stack(values) for name, values in layers.items()}


def save(state: dict[str, Any], folder: Path) -> Path:
    """Write with torch's own writer."""
    dcp.save({name: value.contiguous() for name, value in state.items()}, checkpoint_id=folder, no_dist=True)
    return folder


def load(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors, by torch's own reader."""
    metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {
        name: torch.full(tuple(one.size), 7, dtype=one.properties.dtype)
        for name, one in metadata.items()
        if hasattr(one, "size")
    }
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


class Evil:
    """Unpickled in earnest it makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.canary}",)
