"""A comparison as a picture: both curves of each metric, and how far they lie apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_syne.pictures.runs import Curves, Line, Panel, draw_runs
from megatron_syne.runs.compare import Result
from megatron_syne.runs.history import History
from megatron_syne.runs.panels import run_names, thinned


def draw_comparison(path: str | Path, a: History, b: History, result: Result) -> None:
    """One row for each metric: A and B, and |B - A| (logarithmic; equal steps are gaps). Raises CannotCreate."""
    names = run_names([a.path, b.path], [a.name, b.name])
    panels = []
    for one in result.metrics:
        both = []
        for run, history in enumerate((a, b)):
            series = history.series[one.metric]
            x, y = thinned(np.array(series.steps, dtype=np.float64), np.array(series.values))
            both.append(Line(run, "", x, y))
        few = max(len(line.x) for line in both) <= 50
        unit = "nats per token" if one.metric.partition("/")[0] in ("loss", "validation") else one.metric
        panels.append(Panel(one.metric, unit, both, marked=few))
        apart = np.abs(np.array(one.b) - np.array(one.a))
        apart[~np.isfinite(apart) | (apart == 0)] = np.nan
        x, y = thinned(np.array(one.steps, dtype=np.float64), apart)
        some = bool(np.isfinite(apart).any())
        where = (
            f"first at step {one.first.step:,}" if one.first else "within the tolerance" if some else "none"
        )
        title = f"Difference of {one.metric}: {where}"
        panels.append(
            Panel(title, f"|B - A| ({unit})", [Line(0, "", x, y)], log=some, marked=few, legend=False)
        )
    stages = [[(name, float(first)) for name, first in history.stages] for history in (a, b)]
    draw_runs(path, Curves(f"A: {names[0]}    B: {names[1]}", names, "step", panels, stages))
