"""Rows for tokens that an embedding has not seen: from the rows that it has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_syne.convert.pieces import Span, matrix
from megatron_syne.convert.streams import Weights
from megatron_syne.convert.surgery.derived import Floats, blocks, load
from megatron_syne.errors import DataError


@dataclass(frozen=True)
class Moments:
    """Of each column over the rows seen."""

    mean: Floats
    std: Floats


def spans(ids: npt.NDArray[np.int64]) -> list[Span]:
    """Ascending ids as ranges ``[start, stop)``."""
    if not len(ids):
        return []
    cuts = np.flatnonzero(np.diff(ids) != 1) + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in np.split(ids, cuts)]


def moments(weights: Weights, name: str, rows: Iterable[Span]) -> Moments:
    """Mean and standard deviation of each column over ``rows`` of a tensor, in one pass, in float64.

    Raises DataError for numbers that are not finite.
    """
    width = matrix(weights.shapes[name])[1]
    total, squares, count = np.zeros(width), np.zeros(width), 0
    for span in rows:
        for block in blocks(span, width):
            values = load(weights, name, block)
            if not np.isfinite(values).all():
                raise DataError(f"{name}: rows {block[0]} to {block[1]} hold infinity or NaN")
            total += values.sum(axis=0)
            squares += np.square(values).sum(axis=0)
            count += len(values)
    mean = total / count
    return Moments(mean, np.sqrt(np.maximum(squares / count - mean * mean, 0.0)))


def mean_of(weights: Weights, name: str, ids: list[int]) -> Floats:
    """Mean of single rows of a tensor."""
    total = np.zeros(matrix(weights.shapes[name])[1])
    for number in ids:
        total += load(weights, name, (number, number + 1))[0]
    return total / len(ids)


def normal(seed: int, stream: int, token: int, width: int) -> Floats:
    """``width`` numbers of the standard normal distribution that depend on (seed, stream, token) alone.

    Philox4x64 counts, it does not step, so every row can be drawn without those before it; Box-Muller makes
    the bits normal. numpy promises the bits of its generators for ever, but not its own normal numbers (NEP 19).
    """
    half = (width + 1) // 2
    key, counter = np.array([seed, stream], np.uint64), np.array([0, token, 0, 0], np.uint64)
    bits = np.random.Philox(key=key, counter=counter).random_raw(2 * half)
    uniform = ((bits >> np.uint64(11)) + np.uint64(1)).astype(np.float64) * 2.0**-53  # (0, 1]
    radius, angle = np.sqrt(-2.0 * np.log(uniform[:half])), 2.0 * np.pi * uniform[half:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:width]
