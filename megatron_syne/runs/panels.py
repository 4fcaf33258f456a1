"""From histories to the panels of a picture: which metrics stand together, smoothed, over steps, tokens or hours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_syne.errors import ConfigError
from megatron_syne.pictures.runs import Curves, Line, Panel
from megatron_syne.runs.history import History
from megatron_syne.runs.recorder import Series, chosen
from megatron_syne.runs.shares import step_parts, token_shares
from megatron_syne.runs.text import readable

Over = Literal["step", "tokens", "hours"]
X_LABELS = {"step": "step", "tokens": "tokens consumed", "hours": "hours of training"}
MOST_POINTS = 2000
"""Of one curve in a picture: of more, the lowest and highest of each stretch are drawn."""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Kind:
    """How the metrics of a pattern are shown."""

    title: str
    unit: str
    patterns: tuple[str, ...]
    smooth: bool = False
    marked: bool = False
    log: bool = False
    scale: float = 1.0
    usual: bool = True
    """Shown without being asked for."""


_LOSS, _NORM = "nats per token", "L2 norm"
KINDS = (
    Kind("Training loss", _LOSS, ("loss",), smooth=True),
    Kind("Training loss by source", _LOSS, ("loss/*",), smooth=True),
    Kind("Validation loss by source", _LOSS, ("validation/*",), marked=True),
    Kind("Learning rate", "learning rate", ("learning_rate",)),
    Kind("Gradient norm", _NORM, ("grad_norm",), smooth=True, log=True),
    Kind("Speed per GPU", "tokens/s/GPU", ("tokens_per_second_per_gpu",), smooth=True),
    Kind("Speed", "tokens/s", ("tokens_per_second",), smooth=True),
    Kind("Model FLOP/s utilisation", "MFU (%)", ("mfu",), smooth=True, scale=100),
    Kind("Time of a step by part", "seconds", ("time/*",), smooth=True),
    Kind("Peak memory of a rank", "GiB", ("peak_memory_bytes",), scale=2.0**-30),
    Kind("Mixture as read", "share of tokens", ("mixture/*",)),
    Kind("Model FLOP/s per GPU", "TFLOP/s", ("tflops_per_gpu",), smooth=True, usual=False),
    Kind("Parameter norm", _NORM, ("param_norm",), usual=False),
    Kind("Gradient norm by part", _NORM, ("grad_norm/*",), smooth=True, log=True, usual=False),
    Kind("Validation perplexity by source", "perplexity", ("validation_perplexity/*",), marked=True, usual=False),
    Kind("lm-evaluation-harness", "score", ("harness/*",), marked=True, usual=False),
    Kind("Tokens consumed by source", "tokens", ("tokens/*",), usual=False),
)  # fmt: skip
DERIVED = ("time/*", "mixture/*")
"""Made here out of other metrics."""
NEEDED = (
    "consumed_tokens",
    "tokens/*",
    "mixture/*",
    "*_seconds",
)
"""What the axes and the derived metrics are made of."""


def wanted(metrics: Sequence[str] | None) -> list[str]:
    """Patterns of the metrics to be read for a picture."""
    usual = [pattern for kind in KINDS if kind.usual for pattern in kind.patterns]
    return [*(usual if metrics is None else metrics), *NEEDED]


def curves_of(
    histories: Sequence[History],
    metrics: Sequence[str] | None = None,
    over: Over = "step",
    smooth: int | None = None,
    from_step: int = 0,
) -> Curves:
    """The picture of one run or several beside each other.

    ``metrics``: shell patterns; None = the usual ones. ``smooth``: mean over so many logged steps; None = a fiftieth
    of the steps drawn, at most 100. ConfigError names a metric that no run has, and a run that cannot be shown over
    tokens or hours.
    """
    names = run_names([history.path for history in histories], [history.name for history in histories])
    if smooth is None:
        longest = max(sum(step >= from_step for step in history.steps) for history in histories)
        smooth = max(1, min(longest // 50, 100))
    series = [_with_derived(history, smooth) for history in histories]
    met = list(dict.fromkeys(name for each in series for name in each))
    if metrics is not None:
        for pattern in metrics:
            if not chosen(met, [pattern]):
                known = sorted({name for history in histories for name in history.names} | set(met))
                raise ConfigError(f"--metrics: no run has {pattern!r}; there are {', '.join(known)}")
        met = chosen(met, metrics)
    axes = [_x_axis(history, over) for history in histories]
    panels = []
    for kind in _kinds(met, metrics is None):
        lines = [
            _line(run, name, kind, each[name], axes[run], smooth, from_step)
            for run, each in enumerate(series)
            for name in met
            if name in each and _belongs(name, kind)
        ]
        lines = [line for line in lines if len(line.x)]
        if lines:
            panels.append(_panel(kind, lines, len(histories), smooth))
    if not panels:
        raise ConfigError(f"--from-step {from_step}: no run has a step from there on")
    stages = [
        [
            (name, float(axes[run](np.array([first], dtype=np.float64))[0]))
            for name, first in _from(history.stages, from_step)
        ]
        for run, history in enumerate(histories)
    ]
    title = ", ".join(names)
    return Curves(title, names, X_LABELS[over], panels, stages, "tokens" if over == "tokens" else "plain")


def run_names(paths: Sequence[Path], names: Sequence[str]) -> list[str]:
    """The names of the runs, or their paths where two have the same."""
    return [
        name if list(names).count(name) == 1 else readable(str(path))
        for name, path in zip(names, paths, strict=True)
    ]


def smoothed(values: Floats, window: int) -> Floats:
    """The mean of each value and the ``window - 1`` before it (fewer at the beginning), NaN left out."""
    if window <= 1:
        return values
    known = np.isfinite(values)
    sums = np.cumsum(np.where(known, values, 0.0))
    counts = np.cumsum(known)
    for array in (sums, counts):
        array[window:] -= array[:-window].copy()
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def thinned(x: Floats, y: Floats, most: int = MOST_POINTS) -> tuple[Floats, Floats]:
    """Every point up to ``most``; of more, the lowest and highest of each stretch, so that no spike is lost."""
    if len(x) <= most:
        return x, y
    keep = {0, len(x) - 1}
    for stretch in np.array_split(np.arange(len(x)), most // 2):
        known = stretch[np.isfinite(y[stretch])]
        if len(known):
            keep |= {int(known[y[known].argmin()]), int(known[y[known].argmax()])}
        if len(known) < len(stretch):
            keep.add(int(stretch[~np.isfinite(y[stretch])][0]))  # the gap stays one
    places = sorted(keep)
    return x[places], y[places]


def _with_derived(history: History, smooth: int) -> dict[str, Series]:
    """The metrics of a run, with ``time/<part>`` and ``mixture/<source>`` made of what it logged."""
    found = dict(history.series)
    found |= step_parts(found)
    if not any(name.startswith("mixture/") for name in found):
        found |= token_shares(found, smooth)
    return found


def _kinds(met: Sequence[str], usual: bool) -> list[Kind]:
    """The panels that the metrics fill, in order; unknown metrics by what stands before the slash."""
    found = [
        kind for kind in KINDS if (kind.usual or not usual) and any(_belongs(name, kind) for name in met)
    ]
    if usual:
        # not what another panel says already: the whole speed, the parts of a run of one source
        per_gpu = any(kind.unit == "tokens/s/GPU" for kind in found)
        single = [
            pattern
            for pattern in ("loss/*", "mixture/*")
            if sum(fnmatchcase(name, pattern) for name in met) < 2
        ]
        return [
            kind
            for kind in found
            if not (kind.unit == "tokens/s" and per_gpu) and kind.patterns[0] not in single
        ]
    groups = {
        name.partition("/")[0] + "/*" if "/" in name else name
        for name in met
        if not any(_belongs(name, kind) for kind in KINDS)
    }
    return [*found, *(Kind(group.removesuffix("/*"), "", (group,)) for group in sorted(groups))]


def _belongs(name: str, kind: Kind) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in kind.patterns)


def _panel(kind: Kind, lines: list[Line], runs: int, smooth: int) -> Panel:
    stacked = runs == 1 and kind.patterns[0] in DERIVED and len(lines) > 1
    if stacked:  # areas lie on one another at the same x
        x = np.unique(np.concatenate([np.asarray(line.x) for line in lines]))
        lines = [
            Line(line.run, line.label, x, np.interp(x, line.x, np.nan_to_num(line.y), 0.0, 0.0))
            for line in lines
        ]
    values = np.concatenate([np.asarray(line.raw[1] if line.raw else line.y, np.float64) for line in lines])
    values = values[np.isfinite(values)]
    # a gradient norm that stays within a decade is read more easily without a logarithm
    wide = bool(len(values)) and values.min() > 0 and values.max() > 20 * values.min()
    mean = (
        f" (mean of {smooth} logged steps)"
        if smooth > 1 and (kind.smooth or kind.patterns == ("mixture/*",))
        else ""
    )
    return Panel(kind.title + mean, kind.unit, lines, stacked, kind.log and wide, kind.marked)


def _line(run: int, name: str, kind: Kind, series: Series, axis: Any, smooth: int, first: int) -> Line:
    steps = np.array(series.steps, dtype=np.float64)
    values = np.array(series.values, dtype=np.float64) * kind.scale
    values[~np.isfinite(values)] = np.nan  # an infinite loss is a gap
    places = steps >= first
    window = smooth if kind.smooth else 1
    means = smoothed(values, window)
    x, values, means = axis(steps[places]), values[places], means[places]
    label = name.partition("/")[2] if kind.patterns[0].endswith("/*") else ""
    raw = thinned(x, values) if window > 1 and not name.startswith("time/") else None
    if kind.patterns[0] in DERIVED:  # parts of one whole keep their x
        keep = np.unique(np.linspace(0, len(x) - 1, min(len(x), MOST_POINTS)).astype(np.int64))
        return Line(run, label, x[keep], means[keep])
    x, means = thinned(x, means)
    return Line(run, label, x, means, raw)


def _x_axis(history: History, over: Over) -> Any:
    """A function from steps [n] to x [n]."""
    if over == "step":
        return lambda steps: steps
    name = "consumed_tokens" if over == "tokens" else "step_seconds"
    if name not in history.series:
        raise ConfigError(f"--x {over}: {history.path} has no {name!r} to count by; use --x step")
    series = history.series[name]
    steps = np.array(series.steps, dtype=np.float64)
    values = np.nan_to_num(np.array(series.values, dtype=np.float64))
    if over == "hours":
        values = _hours(steps, values, history.series.get("checkpoint_seconds"))
    return lambda wished: np.interp(wished, steps, values)


def _hours(steps: Floats, seconds: Floats, saving: Series | None) -> Floats:
    """Training time up to each step: the times of the steps and of saving, without stops between two jobs.

    Of steps that were not logged, the time of the next one that was.
    """
    gaps = np.diff(steps, prepend=0.0)
    if len(steps) > 1:  # a run may begin at a later step than the first
        gaps[0] = min(gaps[0], float(np.median(gaps[1:])))
    total = seconds * gaps
    if saving is not None:
        total += np.nan_to_num(np.interp(steps, saving.steps, saving.values, 0.0, 0.0))
    return np.asarray(np.cumsum(total) / 3600, dtype=np.float64)


def _from(stages: Sequence[tuple[str, int]], step: int) -> list[tuple[str, int]]:
    """The stages from a step on; the one that it lies in begins there."""
    inner = [stage for stage in stages if stage[1] >= step]
    before = [name for name, first in stages if first < step]
    if before and (not inner or inner[0][1] > step):
        return [(before[-1], step), *inner]
    return inner
