"""Figures put together step by step, as they were logged, with what a resumed run repeats taken once."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

_NOTES = 3
"""Repetitions told one by one; of more only the number is told."""

_Sink = tuple[Callable[[float], None], Callable[[int], None]]
"""How a value and its step are added at the end of a series."""
_NEW: Any = object()
_NO_FIGURES = ("step", "stage", "loss_hex")


@dataclass
class Series:
    """One metric over the steps; 16 bytes a step."""

    steps: array[int] = field(default_factory=lambda: array("q"))
    """Rising."""
    values: array[float] = field(default_factory=lambda: array("d"))
    """NaN where the step was logged without a finite value (null)."""

    def put(self, step: int, value: float) -> bool:
        """Set the value of a step wherever it belongs; returns whether the step had one before."""
        at = bisect_left(self.steps, step)
        if at < len(self.steps) and self.steps[at] == step:
            self.values[at] = value
            return True
        self.values.insert(at, value)
        self.steps.insert(at, step)
        return False

    def cut_after(self, step: int) -> None:
        """Forget what is later than ``step``."""
        at = bisect_right(self.steps, step)
        del self.steps[at:], self.values[at:]


def chosen(names: Sequence[str], patterns: Sequence[str] | None) -> list[str]:
    """The names that match one of the shell patterns (``loss``, ``validation/*``), by pattern; None = all names."""
    if patterns is None:
        return list(names)
    found = {name: None for pattern in patterns for name in names if fnmatchcase(name, pattern)}
    return list(found)


class Recorder:
    """Takes the records of a file in order; with ``keep`` (shell patterns) only the series that match.

    A step record that goes back means that the run was resumed from a checkpoint there, so what had been logged
    later is forgotten: those steps were lost with the run that did them. Results of lm-evaluation-harness come
    late, at the step of their checkpoint, and take nothing away.
    """

    def __init__(self, keep: Sequence[str] | None = None) -> None:
        self.series: dict[str, Series] = {}
        self.stages: list[tuple[str, int]] = []
        self.notes: list[str] = []
        self._keep = keep
        self._sinks: dict[str, _Sink | None] = dict.fromkeys(_NO_FIGURES)
        self.newest = -1
        """The newest step of any record; -1 = none."""
        self._repeated = 0

    def add(self, step: int, record: Mapping[str, Any], where: str) -> None:
        """One record of ``metrics.jsonl``; ``where`` names file and line. Raises ValueError, OverflowError where
        a number is none; nothing of the record was taken then."""
        exact = record.get("loss_hex")  # to the bit, and also where JSON had to say null for infinity
        if exact is not None and not isinstance(exact, str):
            raise ValueError(f"loss_hex: expected text, found {exact!r:.40}")
        bits = None if exact is None else float.fromhex(exact)
        late = "harness" in record
        if step > self.newest and not late:
            self.newest = step
            self._append(step, record)
        else:
            if not late:
                self._go_back(step, record, where)
            for name, value in _flat(record):
                self._insert(name, step, value)
        if "stage" in record:
            self._stage(str(record["stage"]), step)
        if bits is not None and "loss" in self.series:
            self.series["loss"].put(step, bits)

    def forget_after(self, step: int) -> None:
        """What is later than ``step`` was lost with a killed run."""
        for series in self.series.values():
            series.cut_after(step)
        self.stages = [(name, first) for name, first in self.stages if first <= step]
        self.newest = min(self.newest, step)

    def put(self, name: str, step: int, value: float) -> None:
        """One figure of a step, whatever came before."""
        self.newest = max(self.newest, step)
        self._insert(name, step, value)

    def names(self) -> list[str]:
        """Of all metrics met, kept or not."""
        return [name for name in self._sinks if name not in _NO_FIGURES]

    def problems(self) -> list[str]:
        """What was repeated."""
        more = self._repeated - len(self.notes)
        return [*self.notes, *([f"... and {more:,} more repetitions of steps"] if more else [])]

    def _append(self, step: int, record: Mapping[str, Any]) -> None:
        """A record later than all before: 25 figures in each of a million steps come through here."""
        sinks = self._sinks
        for name, value in record.items():
            sink = sinks.get(name, _NEW)
            if sink is None:
                continue
            if sink is _NEW:  # or never a figure: its parts, text
                for part, number in _flat({name: value}):
                    self._insert(part, step, number)
                continue
            try:
                sink[0](value)
            except TypeError:  # null, text, a list
                if value is not None:
                    continue
                sink[0](math.nan)
            sink[1](step)

    def _insert(self, name: str, step: int, value: Any) -> None:
        """A figure wherever it belongs; text and lists are none."""
        if value is not None and not isinstance(value, int | float):
            return
        if name not in self._sinks:
            if self._keep is not None and not chosen([name], self._keep):
                self._sinks[name] = None
                return
            series = self.series[name] = Series()
            self._sinks[name] = (series.values.append, series.steps.append)
        if self._sinks[name] is not None:
            self.series[name].put(step, math.nan if value is None else value)

    def _stage(self, name: str, step: int) -> None:
        while self.stages and self.stages[-1][1] >= step:
            self.stages.pop()
        if not self.stages or self.stages[-1][0] != name:
            self.stages.append((name, step))

    def _go_back(self, step: int, record: Mapping[str, Any], where: str) -> None:
        newest = self.newest
        if step < newest:
            self.forget_after(step)
        elif not any(
            name in self.series and self.series[name].steps and self.series[name].steps[-1] == step
            for name in record
        ):
            return  # another kind of record of the same step
        self._repeated += 1
        if self._repeated <= _NOTES:
            before = f"step {newest:,}" if step == newest else f"steps {step:,} to {newest:,}"
            self.notes.append(
                f"{where}: step {step:,} comes again after step {newest:,} (a run resumed without clean-up?); "
                f"the later ones count, what was logged before of {before} does not"
            )


def _flat(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """``{"validation": {"zh": 2.1}}`` -> ``validation/zh``, 2.1."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{part}", number) for part, number in value.items())
        else:
            yield name, value
