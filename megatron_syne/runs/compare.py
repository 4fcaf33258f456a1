"""Two histories beside each other: the first step where a metric differs, by how much, and the largest difference."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_syne.errors import DataError
from megatron_syne.runs.history import History
from megatron_syne.runs.recorder import Series, chosen

DEFAULT_METRICS = ("loss", "validation/*")


@dataclass
class Difference:
    """Of one metric at one step."""

    step: int
    a: float
    b: float

    @property
    def amount(self) -> float:
        """b - a; NaN where one of them is."""
        return 0.0 if self.a == self.b else self.b - self.a  # inf - inf would be NaN

    @property
    def relative(self) -> float:
        """Of the larger of the two, without its sign."""
        larger = max(abs(self.a), abs(self.b))
        return abs(self.amount) / larger if larger else 0.0

    @property
    def rank(self) -> float:
        """By how much it differs, to sort by: NaN against a number is more than everything."""
        if math.isnan(self.a) and math.isnan(self.b):
            return 0.0
        return math.inf if math.isnan(self.amount) else abs(self.amount)


@dataclass
class Comparison:
    """One metric of A and B, at the steps that both have."""

    metric: str
    steps: array[int]
    a: array[float]
    b: array[float]
    differing: int
    """How many steps differ beyond the tolerance."""
    first: Difference | None
    """The first of them."""
    largest: Difference | None
    """The step that differs most; None where all are the same."""
    last: Difference
    """The last common step."""
    only_a: array[int]
    only_b: array[int]

    def around_first(self, before: int = 3, after: int = 5) -> list[Difference]:
        """A few common steps around the first that differs; [] where none does."""
        if self.first is None:
            return []
        at = bisect_left(self.steps, self.first.step)
        return [
            Difference(self.steps[place], self.a[place], self.b[place])
            for place in range(max(at - before, 0), min(at + after + 1, len(self.steps)))
        ]


@dataclass
class Result:
    """All metrics that were compared."""

    metrics: list[Comparison]
    left_out: list[str]
    """Metrics that only one has, with words to it."""

    @property
    def equal(self) -> bool:
        """Whether no common step differs beyond the tolerance."""
        return all(each.first is None for each in self.metrics)

    @property
    def same_steps(self) -> bool:
        """Whether both have the same metrics at the same steps."""
        return not self.left_out and not any(each.only_a or each.only_b for each in self.metrics)


def compare(
    a: History,
    b: History,
    metrics: Sequence[str] = DEFAULT_METRICS,
    tolerance: float = 0.0,
    relative: bool = False,
) -> Result:
    """Compare the metrics that match the shell patterns, step by step.

    ``tolerance`` is of the difference, or with ``relative`` of the difference divided by the larger value; 0 means
    equal to the bit (of float32 where one history is tensorboard's). NaN equals NaN.
    Raises DataError where a metric asked for is in neither, or no metric has a common step.
    """
    names = list(dict.fromkeys([*a.series, *b.series]))
    known = ", ".join(sorted({*a.names, *b.names})) or "none"
    for pattern in metrics:
        if metrics is not DEFAULT_METRICS and not chosen(names, [pattern]):
            raise DataError(f"{a.path}, {b.path}: no metric {pattern!r}; there are {known}")
    found, left_out = [], []
    for name in chosen(names, metrics):
        if name not in b.series or name not in a.series:
            left_out.append(f"{name}: only in {'A' if name in a.series else 'B'}")
            continue
        single = a.single_precision != b.single_precision
        one = _compare_series(name, a.series[name], b.series[name], tolerance, relative, single)
        if one is None:
            left_out.append(f"{name}: no common step ({_span(a.series[name])} and {_span(b.series[name])})")
        else:
            found.append(one)
    if not found:
        why = "; ".join(left_out) or f"there are {known}"
        raise DataError(f"{a.path}, {b.path}: nothing to compare of {', '.join(metrics)}: {why}")
    return Result(found, left_out)


def _compare_series(
    metric: str, a: Series, b: Series, tolerance: float, relative: bool, single: bool
) -> Comparison | None:
    """None without a common step."""
    steps, left, right, only_a, only_b = _aligned(a, b)
    if not steps:
        return None
    if single:
        left, right = (array("d", array("f", values)) for values in (left, right))
    differing, first, largest = 0, None, None
    for step, x, y in zip(steps, left, right, strict=True):
        if x == y and x != 0.0:
            continue
        each = Difference(step, x, y)
        if not _within(each, tolerance, relative):
            differing += 1
            first = first or each
        if each.rank > (largest.rank if largest else 0.0):
            largest = each
    last = Difference(steps[-1], left[-1], right[-1])
    return Comparison(metric, steps, left, right, differing, first, largest, last, only_a, only_b)


def _within(each: Difference, tolerance: float, relative: bool) -> bool:
    if tolerance == 0.0:
        return each.a.hex() == each.b.hex()  # tells -0.0 from 0.0; NaN is NaN
    if math.isnan(each.a) or math.isnan(each.b):
        return math.isnan(each.a) and math.isnan(each.b)
    return (each.relative if relative else abs(each.amount)) <= tolerance


def _aligned(a: Series, b: Series) -> tuple[array[int], array[float], array[float], array[int], array[int]]:
    """(common steps, values of a, values of b, steps only in a, steps only in b)."""
    if a.steps == b.steps:
        return a.steps, a.values, b.values, array("q"), array("q")
    steps, only_a, only_b = array("q"), array("q"), array("q")
    left, right = array("d"), array("d")
    i = j = 0
    while i < len(a.steps) and j < len(b.steps):
        if a.steps[i] == b.steps[j]:
            steps.append(a.steps[i])
            left.append(a.values[i])
            right.append(b.values[j])
            i, j = i + 1, j + 1
        elif a.steps[i] < b.steps[j]:
            only_a.append(a.steps[i])
            i += 1
        else:
            only_b.append(b.steps[j])
            j += 1
    return steps, left, right, only_a + a.steps[i:], only_b + b.steps[j:]


def _span(series: Series) -> str:
    return f"steps {series.steps[0]:,} to {series.steps[-1]:,}"
