"""Shares of the sources over the tokens of a run, stacked, and the epochs of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_syne.pictures.canvas import colours, picture, tokens_axis, tokens_text

Positions = Sequence[int] | NDArray[Any]
Shares = Mapping[str, Sequence[float] | NDArray[Any]]
Stages = Sequence[tuple[str, int]]
Epochs = Mapping[str, float | None]

WIDTH = 1500


def draw_mixture(
    path: str | Path,
    positions: Positions,
    shares: Shares,
    stages: Stages,
    epochs: Epochs,
    reached: int | None = None,
) -> None:
    """``shares`` of each source at token ``positions`` of the run; ``stages``: (name, token at which it ends);
    ``epochs`` read of each source (None = unknown); ``reached``: tokens consumed so far, marked by a line."""
    from matplotlib.ticker import PercentFormatter

    names = list(shares)
    shade = colours(names)
    known = _known(names, epochs)
    height = max(600, 220 + 24 * len(names))
    with picture(path, WIDTH, height, columns=2 if known else 1, widths=[2, 1] if known else None) as axes:
        mix = axes[0]
        mix.stackplot(
            positions,
            list(shares.values()),
            labels=names,
            colors=[shade[name] for name in names],
            edgecolor="white",  # so that greys, too, part from one another
            linewidth=0.7,
        )
        mix.set_xlim(0, int(positions[-1]))
        mix.set_ylim(0, 1)
        mix.set_xlabel("tokens")
        mix.set_ylabel("share of the samples")
        tokens_axis(mix.xaxis)
        mix.yaxis.set_major_formatter(PercentFormatter(1))
        _stages(mix, stages, WIDTH * (0.5 if known else 0.75))
        _shares(mix, positions, shares, stages, shade)
        if reached is not None:
            mix.axvline(reached, color="red", linewidth=2, linestyle="--")
        handles, labels = mix.get_legend_handles_labels()
        # in the order in which the areas lie on one another, beside them
        mix.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        if known:
            bars = axes[1]
            drawn = bars.barh(
                known[::-1], [epochs[name] for name in known[::-1]], edgecolor="black", linewidth=0.5
            )
            for bar, name in zip(drawn, known[::-1], strict=True):
                bar.set_facecolor(shade[name])
            bars.bar_label(drawn, fmt="%.3g", padding=3)
            bars.margins(x=0.12)
            bars.axvline(1, color="black", linewidth=1, linestyle=":")
            bars.set_xlabel("epochs")
            bars.set_title("Epochs read" if reached is None else "Epochs read so far")
            bars.grid(axis="x", alpha=0.3)


def mixture_figure(
    positions: Positions, shares: Shares, stages: Stages, epochs: Epochs, reached: int | None = None
) -> Any:
    """The same for a page: a figure of plotly with share and epochs under the pointer."""
    from plotly.graph_objects import Figure, Scatter

    from megatron_syne.pictures.page import plotly_colours

    shade = plotly_colours(list(shares))
    figure = Figure()
    for name, values in shares.items():
        read = epochs.get(name)
        more = "" if read is None else f", {read:.3g} epochs in all"
        figure.add_trace(
            Scatter(
                x=[int(place) for place in positions],
                y=[float(value) for value in values],
                name=name,
                mode="lines",
                line={"width": 0.5, "color": shade[name]},
                fillcolor=shade[name],
                stackgroup="shares",
                hovertemplate=f"{name}: %{{y:.2%}} of the samples{more}<extra></extra>",
            )
        )
    begin = 0
    for name, end in stages:
        figure.add_vline(end, line={"width": 1, "color": "black"})
        figure.add_annotation(
            x=(begin + end) / 2,
            y=1.0,
            yref="paper",
            yanchor="bottom",
            text=name,
            showarrow=False,
            textangle=-15,
        )
        begin = end
    if reached is not None:
        figure.add_vline(reached, line={"width": 2, "color": "red", "dash": "dash"})
    figure.update_layout(
        height=max(550, 200 + 22 * len(shares)),
        margin={"t": 110},
        title="Mixture over the tokens of the run",
        xaxis_title="tokens",
        yaxis={"title": "share of the samples", "range": [0, 1], "tickformat": ".0%"},
        hovermode="x",
        template="plotly_white",
    )
    return figure


def _known(names: Sequence[str], epochs: Epochs) -> list[str]:
    """Sources of which it is known how often they are read."""
    return [name for name in names if (read := epochs.get(name)) is not None and math.isfinite(read)]


def _stages(mix: Any, stages: Stages, width: float) -> None:
    """A line at the end of each stage and its name above it, on two levels where the names would meet."""
    whole, begin = max(1, stages[-1][1]) if stages else 1, 0
    ends = [-1e9, -1e9]  # where the text on each level ends, in pixels
    for name, end in stages:
        mix.axvline(end, color="black", linewidth=1.5)
        if end > begin:
            words = f"{name} ({tokens_text(end - begin)})"
            half = 3.6 * len(words)
            middle = min(max((begin + end) / 2 / whole * width, half), width - half)  # inside the picture
            level = 0 if middle - half > ends[0] else 1
            ends[level] = middle + half + 8
            mix.text(
                middle / width,
                1.012 + 0.045 * level,
                words,
                transform=mix.transAxes,
                ha="center",
                va="bottom",
                fontsize=10.5,
            )
        begin = end


def _shares(mix: Any, positions: Positions, shares: Shares, stages: Stages, shade: Mapping[str, Any]) -> None:
    """Name and share in each area that has the room: in the middle of a stage, where it is level."""
    begin, whole = 0, max(1, int(positions[-1]))
    for _, end in stages:
        middle, wide = (begin + end) / 2, (end - begin) / whole
        column = max(0, int(np.searchsorted(np.asarray(positions), middle)) - 1)
        low = 0.0
        for name, values in shares.items():
            share = float(values[column])
            words = f"{100 * share:.3g}%"
            if wide * 110 > len(name) + 7:
                words = f"{name} {words}"
            if share >= 0.028 and wide * 110 > len(words) + 1:
                bright = sum(
                    part * weight for part, weight in zip(shade[name], (0.3, 0.59, 0.11), strict=False)
                )
                mix.text(
                    middle,
                    low + share / 2,
                    words,
                    ha="center",
                    va="center",
                    fontsize=9,
                    color="black" if bright > 0.55 else "white",
                )
            low += share
        begin = end
