"""Weights whose rows are computed from those of other weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_syne.convert.numbers import from_float32, to_float32
from megatron_syne.convert.pieces import Span
from megatron_syne.convert.streams import Bytes, Weights
from megatron_syne.errors import DataError

BLOCK_ELEMENTS = 2**18
"""Elements computed at a time: 2 MB in float64, whatever the size of the tile that is asked for."""

Floats = npt.NDArray[np.float64]


class Derived(Weights):
    """The result of an operation. Starts as a copy of the first input's model, configuration and documents;
    the operation changes what it changes."""

    def __init__(self, operation: str, parameters: dict[str, Any], inputs: dict[str, Weights]) -> None:
        first = next(iter(inputs.values()))
        self.operation = operation
        self.parameters = parameters
        """JSON values, no paths: they stand in the certificate."""
        self.inputs = inputs
        self.model, self.config, self.artifacts_dir = first.model, dict(first.config), first.artifacts_dir
        self.dtypes, self.shapes = dict(first.dtypes), dict(first.shapes)
        self.documents: dict[str, bytes] = dict(getattr(first, "documents", {}))
        """Small files by name, which go before those of ``artifacts_dir``."""

    @property
    def ignored(self) -> list[str]:
        """Tensors that the inputs left out."""
        return sorted({name for weights in self.inputs.values() for name in getattr(weights, "ignored", [])})

    def describe(self) -> dict[str, Any]:
        """See :class:`Weights`."""
        return {
            "kind": "surgery",
            "operation": self.operation,
            "parameters": self.parameters,
            "inputs": {name: weights.describe() for name, weights in self.inputs.items()},
        }

    def files(self) -> dict[str, Path]:
        """See :class:`Weights`. Of several inputs each file's name begins with the input's."""
        if len(self.inputs) == 1:
            return next(iter(self.inputs.values())).files()
        return {
            f"{name}/{file}": path
            for name, weights in self.inputs.items()
            for file, path in weights.files().items()
        }

    def folders(self) -> list[Path]:
        """See :class:`Weights`."""
        return sorted({folder for weights in self.inputs.values() for folder in weights.folders()})

    def identity(self) -> str:
        """See :class:`Weights`."""
        own = [f"surgery {self.operation} {json.dumps(self.parameters, sort_keys=True)}"]
        return "\n".join([*own, *(f"{n}: {w.identity()}" for n, w in self.inputs.items())])

    def close(self) -> None:
        """See :class:`Weights`."""
        for weights in self.inputs.values():
            weights.close()


def blocks(rows: Span, columns: int) -> Iterator[Span]:
    """``rows`` in parts of at most ``BLOCK_ELEMENTS`` elements (one row at least)."""
    step = max(1, BLOCK_ELEMENTS // columns)
    for first in range(rows[0], rows[1], step):
        yield (first, min(first + step, rows[1]))


def load(weights: Weights, name: str, rows: Span) -> Floats:
    """Rows of a tensor in float64, rows x columns."""
    raw = np.empty((rows[1] - rows[0], weights.row_bytes(name)), np.uint8)
    weights.read(name, rows, raw)
    return to_float32(raw, weights.dtypes[name]).astype(np.float64)


def rounded(values: Floats, dtype: str, where: str) -> Bytes:
    """float64 numbers in a format, rows x row bytes. Raises DataError for what is not finite there."""
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    raw = from_float32(np.ascontiguousarray(single), dtype)
    if not np.isfinite(to_float32(raw, dtype)).all():
        raise DataError(
            f"{where}: the result is not finite in {dtype}: an input holds infinity or NaN, "
            f"or the numbers grow beyond the format"
        )
    return raw
