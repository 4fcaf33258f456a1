"""Curves of runs beside each other, as one PNG or one HTML page: panels of lines, with the stages marked.

The colour is that of the series (a source, a part of a step), or of the run where a panel shows one series; the
line style is that of the run, so that runs also differ in grey. In a picture of a single run it is that of the
series.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_syne.pictures.canvas import colours, log_axis, picture, tokens_axis
from megatron_syne.pictures.page import css_colours, page, plotly_colours

Values = Sequence[float] | NDArray[Any]
_STYLES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (7, 2)), (0, (5, 1, 1, 1, 1, 1)))
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_MARKERS = ("o", "s", "^", "v", "D", "x", "P", "*")
_MOST_LABELS = 24


@dataclass
class Line:
    """One curve; NaN in ``y`` leaves a gap."""

    run: int
    """Number of the run in :attr:`Curves.runs`."""
    label: str
    """Of the series: the source, the part; the same in all runs; "" where the panel has no other."""
    x: Values
    y: Values
    raw: tuple[Values, Values] | None = None
    """x and y before smoothing, drawn light behind."""


@dataclass
class Panel:
    """One pair of axes."""

    title: str
    unit: str
    """Name of the y axis with its unit."""
    lines: list[Line]
    stacked: bool = False
    """Areas on top of one another, for the parts of a whole of one run, all at the same x."""
    log: bool = False
    marked: bool = False
    """A point at each value: few, far from one another."""
    legend: bool = True


@dataclass
class Curves:
    """What a picture shows."""

    title: str
    runs: list[str]
    x_label: str
    panels: list[Panel]
    stages: list[list[tuple[str, float]]] = field(default_factory=list)
    """Of each run: (name, x at which the stage begins)."""
    x_kind: Literal["plain", "tokens"] = "plain"


def draw_runs(path: str | Path, curves: Curves) -> None:
    """A ``.png`` or ``.html`` by the name's end. Raises ConfigError, CannotCreate."""
    if Path(path).suffix == ".html":
        page(path, curves.title, [_figure(curves, panel) for panel in curves.panels])
        return
    columns = 1 if len(curves.panels) == 1 else 2
    rows = -(-len(curves.panels) // columns)
    with picture(path, 800 * columns + 100, 400 * rows + 60, rows, columns) as axes:
        axes[0].figure.suptitle(curves.title)
        for axis, panel in zip(axes, curves.panels, strict=False):
            draw_panel(axis, curves, panel)
        for axis in axes[len(curves.panels) :]:
            axis.set_axis_off()


def stage_marks(curves: Curves) -> list[tuple[str, float, int]]:
    """(name, x, run) of each stage's begin; what several runs share is named once."""
    marks: dict[tuple[str, float], int] = {}
    for run, stages in enumerate(curves.stages):
        for name, x in stages:
            marks.setdefault((name, x), run)
    apart = len({tuple(stages) for stages in curves.stages}) > 1
    return [(f"{name} ({curves.runs[run]})" if apart else name, x, run) for (name, x), run in marks.items()]


def _labels(panel: Panel) -> list[str]:
    return list(dict.fromkeys(line.label for line in panel.lines))


def _shades(labels: Sequence[str]) -> dict[str, Any]:
    """Colours that differ; of more than twenty (layers, as a rule) a scale from dark to light in their order."""
    if len(labels) <= 20:
        return colours(labels)
    import matplotlib

    scale = matplotlib.colormaps["viridis"]
    return {label: scale(place / (len(labels) - 1)) for place, label in enumerate(labels)}


def _style(curves: Curves, run: int, place: int, many: bool) -> int:
    """Number of the line style: of the run; with a single run of the series, unless there are too many."""
    return run if len(curves.runs) > 1 else 0 if many else place


def x_range(curves: Curves) -> tuple[float, float]:
    """The same for all panels, so that the stages stand below one another."""
    ends = [
        float(each) for panel in curves.panels for line in panel.lines for each in (line.x[0], line.x[-1])
    ]
    margin = 0.02 * (max(ends) - min(ends)) or 1.0
    return min(ends) - margin, max(ends) + margin


def draw_panel(axis: Any, curves: Curves, panel: Panel) -> None:
    """Draw on axes of matplotlib."""
    labels, several = _labels(panel), len(curves.runs) > 1
    by_label, by_run, many = _shades(labels), colours(curves.runs), len(labels) > 20
    axis.set_title(panel.title)
    axis.set_xlabel(curves.x_label)
    axis.set_ylabel(panel.unit)
    axis.grid(alpha=0.3)
    axis.set_xlim(x_range(curves))
    if panel.log:
        axis.set_yscale("log")
        log_axis(axis.yaxis)
    else:
        axis.ticklabel_format(axis="y", scilimits=(-3, 6))
    if curves.x_kind == "tokens":
        tokens_axis(axis.xaxis)
    if panel.stacked:
        axis.stackplot(
            panel.lines[0].x,
            [line.y for line in panel.lines],
            labels=labels,
            colors=[by_label[name] for name in labels],
            edgecolor="black",
            linewidth=0.3,
        )
        axis.set_ylim(bottom=0)
    else:
        for line in panel.lines:
            place = labels.index(line.label)
            shade = by_label[line.label] if len(labels) > 1 else by_run[curves.runs[line.run]]
            style = _STYLES[_style(curves, line.run, place, many) % len(_STYLES)]
            if line.raw is not None and not many:
                axis.plot(*line.raw, color=shade, alpha=0.25, linewidth=0.7)
            few = panel.marked or len(line.x) == 1
            mark = _MARKERS[place % len(_MARKERS)] if few or (several and len(labels) > 1) else None
            axis.plot(
                line.x, line.y, color=shade, linestyle=style, linewidth=0.8 if many else 1.5, marker=mark,
                markevery=None if few else max(len(line.x) // 8, 1), markersize=4,
            )  # fmt: skip
    _mark_stages(axis, curves)
    if panel.legend:
        _legend(axis, curves, panel, by_label, by_run)


def _mark_stages(axis: Any, curves: Curves) -> None:
    for name, x, run in stage_marks(curves):
        left, right = axis.get_xlim()
        if not left <= x <= right:
            continue
        axis.axvline(x, color="black", linewidth=0.8, linestyle=_STYLES[run % len(_STYLES)], alpha=0.6)
        axis.text(
            x,
            0.02,
            f" {name}",
            transform=axis.get_xaxis_transform(),
            rotation=90,
            ha="left",
            va="bottom",
            fontsize="x-small",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.6, "pad": 0.5},
        )


def _legend(axis: Any, curves: Curves, panel: Panel, by_label: Any, by_run: Any) -> None:
    """Runs by their style, series by their colour: not each pair of the two."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    labels, several = _labels(panel), len(curves.runs) > 1
    handles: list[Any] = []
    if labels != [""]:
        skip = -(-len(labels) // _MOST_LABELS)
        for place in range(0, len(labels), skip):
            label = labels[place]
            if panel.stacked:
                handles.insert(
                    0, Patch(facecolor=by_label[label], edgecolor="black", linewidth=0.3, label=label)
                )
            else:
                style: Any = (
                    "-" if several else _STYLES[_style(curves, 0, place, len(labels) > 20) % len(_STYLES)]
                )
                mark = _MARKERS[place % len(_MARKERS)] if panel.marked or several else None
                handles.append(
                    Line2D(
                        [],
                        [],
                        color=by_label[label],
                        linestyle=style,
                        marker=mark,
                        markersize=4,
                        label=label,
                    )
                )
    if several:
        for run in sorted({line.run for line in panel.lines}):
            name = curves.runs[run]
            shade = "black" if len(labels) > 1 else by_run[name]
            handles.append(Line2D([], [], color=shade, linestyle=_STYLES[run % len(_STYLES)], label=name))
    if handles:
        outside: Any = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if len(handles) > 10 else {}
        axis.legend(handles=handles, fontsize="small", framealpha=0.8, handlelength=3, **outside)


def _figure(curves: Curves, panel: Panel) -> Any:
    """A panel as a figure of plotly."""
    import plotly.graph_objects as go

    labels, several = _labels(panel), len(curves.runs) > 1
    by_label, by_run = css_colours(_shades(labels)), plotly_colours(curves.runs)
    many = len(labels) > 20
    figure = go.Figure()
    for line in panel.lines:
        place, run = labels.index(line.label), curves.runs[line.run]
        shade = by_label[line.label] if len(labels) > 1 or panel.stacked else by_run[run]
        dash = _DASHES[_style(curves, line.run, place, many) % len(_DASHES)]
        name = " · ".join(part for part in (line.label, run if several or not line.label else "") if part)
        group = f"{line.label} {line.run}"
        if line.raw is not None and not many:
            raw: dict[str, Any] = {"color": shade, "width": 1}
            figure.add_scatter(
                x=_listed(line.raw[0]), y=_listed(line.raw[1]), name=f"{name} (each step)", mode="lines", line=raw,
                opacity=0.3, legendgroup=group, showlegend=False, hoverinfo="skip",
            )  # fmt: skip
        marked = panel.marked or len(line.x) == 1
        figure.add_scatter(
            x=_listed(line.x), y=_listed(line.y), name=name, mode="lines+markers" if marked else "lines",
            line={"color": shade, "width": 1 if panel.stacked else 2, "dash": "solid" if panel.stacked else dash},
            stackgroup="whole" if panel.stacked else None, legendgroup=group, showlegend=True,
        )  # fmt: skip
    for name, x, run_number in stage_marks(curves):
        figure.add_vline(
            x=x, line={"color": "black", "width": 1, "dash": _DASHES[run_number % len(_DASHES)]}, opacity=0.6,
            annotation_text=name, annotation_position="top right", annotation_font_size=11,
        )  # fmt: skip
    figure.update_layout(
        template="simple_white", title=panel.title, height=440, hovermode="x unified",
        xaxis={"title": curves.x_label, "range": x_range(curves), "showgrid": True, "exponentformat": "B"},
        showlegend=panel.legend,
        yaxis={"title": panel.unit, "showgrid": True, "exponentformat": "power"},
    )  # fmt: skip
    if panel.log:
        figure.update_yaxes(type="log")
    return figure


def _listed(values: Values) -> list[float | None]:
    """As JSON has them: a gap is null."""
    return [value if value == value else None for value in np.asarray(values).tolist()]
