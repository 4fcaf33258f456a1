"""The learning rate over tokens and steps, with the stages and the points at which something begins or ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_syne.pictures.canvas import numbered, picture, table, tokens_axis, tokens_text


class KeyPoint(NamedTuple):
    """Where something begins or ends."""

    name: str
    tokens: int
    """Consumed before the step."""
    step: float
    """Steps before it."""
    rate: float


class Curve(NamedTuple):
    """The schedule at some of its steps, in order."""

    tokens: Sequence[int]
    """Consumed before the step."""
    steps: Sequence[int]
    """Steps before it."""
    rates: Sequence[float]


def draw_learning_rate(
    path: str | Path, curve: Curve, stages: Sequence[tuple[str, int]], points: Sequence[KeyPoint], title: str
) -> None:
    """``stages``: (name, token at which it ends); ``points`` are numbered and told below the curve."""
    from matplotlib.ticker import FuncFormatter

    below_height = 27 * (1 + len(points))
    with picture(path, 1400, 560 + below_height, rows=2, heights=[500, below_height], scale=2) as (
        axis,
        below,
    ):
        axis.plot(curve.tokens, curve.rates, color="#1f4e79", linewidth=2.2)
        axis.set_xlim(0, max(stages[-1][1] if stages else 0, curve.tokens[-1], 1))
        axis.set_ylim(0, (max(curve.rates) or 1.0) * 1.16)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:.3g}"))
        tokens_axis(axis.xaxis)
        axis.set_xlabel("tokens consumed")
        axis.set_ylabel("learning rate")
        axis.grid(alpha=0.35)
        axis.set_title(title)
        _stages(axis, stages)
        _steps_axis(axis, curve)
        table(
            below,
            ["", "key point", "tokens consumed", "steps done", "learning rate"],
            [
                [str(n), each.name, f"{each.tokens:,}", f"{each.step:,.10g}", f"{each.rate:.4g}"]
                for n, each in enumerate(points, 1)
            ],
            [0.3, 4, 2, 1.4, 1.4],
        )
        numbered(axis, [(each.tokens, each.rate) for each in points])


def learning_rate_figure(
    curve: Curve, stages: Sequence[tuple[str, int]], points: Sequence[KeyPoint], title: str
) -> Any:
    """The same for a page: a figure of plotly."""
    from plotly.graph_objects import Figure, Scatter

    figure = Figure(
        [
            Scatter(
                x=list(curve.tokens),
                y=list(curve.rates),
                customdata=list(curve.steps),
                mode="lines",
                name="learning rate",
                hovertemplate="%{y:.4g} after %{x:,} tokens, %{customdata:,} steps<extra></extra>",
            ),
            Scatter(
                x=[each.tokens for each in points],
                y=[each.rate for each in points],
                text=[each.name for each in points],
                mode="markers",
                name="key points",
                marker={"size": 10, "color": "#c0504d"},
                hovertemplate="%{text}: %{y:.4g} after %{x:,} tokens<extra></extra>",
            ),
        ]
    )
    begin = 0
    for number, (name, end) in enumerate(stages):
        figure.add_vrect(
            begin,
            end,
            fillcolor="#eeeeee" if number % 2 else "white",
            line_width=0,
            layer="below",
            annotation_text=name,
        )
        begin = end
    figure.update_layout(
        title=title,
        height=520,
        xaxis_title="tokens consumed",
        yaxis_title="learning rate",
        yaxis={"rangemode": "tozero", "exponentformat": "e"},
        template="plotly_white",
    )
    return figure


def _stages(axis: Any, stages: Sequence[tuple[str, int]]) -> None:
    """Shade every other stage, and write each one's name into it, upright where it is narrow."""
    begin, whole = 0, axis.get_xlim()[1]
    for number, (name, end) in enumerate(stages):
        if number % 2:
            axis.axvspan(begin, end, color="#e9e9e9", zorder=0)
        if number:
            axis.axvline(begin, color="black", linewidth=1, linestyle=":")
        tokens = f"{name} ({tokens_text(end - begin)})"
        room = (end - begin) / whole * 1250 / 7.5
        words = tokens if len(tokens) <= room else name if len(name) <= room else ""
        if words:
            axis.text(
                (begin + end) / 2, 0.97, words, transform=axis.get_xaxis_transform(), ha="center", va="top"
            )
        elif end > begin:
            axis.text(
                (begin + end) / 2,
                0.04,
                tokens,
                transform=axis.get_xaxis_transform(),
                ha="center",
                va="bottom",
                rotation=90,
                fontsize=9,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1},
            )
        begin = end


def _steps_axis(axis: Any, curve: Curve) -> None:
    """Steps along the top edge: evenly spaced only where batch and sequence length do not change."""
    from matplotlib.ticker import MaxNLocator

    ticks = [
        tick
        for tick in MaxNLocator(8, integer=True).tick_values(0, curve.steps[-1])
        if 0 <= tick <= curve.steps[-1]
    ]
    top = axis.secondary_xaxis("top")
    top.set_xticks(np.interp(ticks, curve.steps, curve.tokens), [f"{tick:,.0f}" for tick in ticks])
    top.set_xlabel("steps done")
