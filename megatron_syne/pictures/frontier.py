"""The search's frontier: predicted speed of each layout against its peak memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_syne.pictures.canvas import numbered, picture, table, wrapped

GIB = 2**30
MOST_NAMED = 6

# matplotlib's mark, plotly's, colour: dark and light in turn
_LOOKS = (
    ("o", "circle", "#1f4e79"),
    ("s", "square", "#f2b84b"),
    ("^", "triangle-up", "#2f7f5f"),
    ("D", "diamond", "#b8a1d9"),
    ("v", "triangle-down", "#c0504d"),
    ("P", "cross", "#8fbce6"),
    ("h", "hexagon", "#5f7f8c"),
    ("*", "star", "#e8e337"),
)


class Point(NamedTuple):
    """One layout of the search."""

    label: str
    """``TP2 PP2 CP1 DP2, micro-batch 1, selective``."""
    group: str
    """What its mark tells: what is computed again."""
    peak_bytes: int
    """Of the fullest rank."""
    speed: float
    """Tokens/s/GPU."""
    hover: str = ""
    """More lines for the page."""


def pareto(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both speed and memory, from little memory to much."""
    front: list[Point] = []
    for point in sorted(points, key=lambda each: (each.peak_bytes, -each.speed)):
        if not front or point.speed > front[-1].speed:
            front.append(point)
    return front


def best(points: Sequence[Point], capacity: int) -> list[Point]:
    """The fastest that fit; where none does, those of least memory."""
    fit = [point for point in points if point.peak_bytes <= capacity]
    if fit:
        return sorted(fit, key=lambda each: -each.speed)[:MOST_NAMED]
    return sorted(points, key=lambda each: each.peak_bytes)[:MOST_NAMED]


def draw_frontier(path: str | Path, points: Sequence[Point], capacity: int, gpu: str, title: str) -> None:
    """``points`` of all layouts; those above ``capacity`` bytes are grey; the best few are numbered and named below."""
    from matplotlib.ticker import StrMethodFormatter

    named = best(points, capacity)
    front = pareto([point for point in points if point.peak_bytes <= capacity])
    with picture(
        path, 1300, 680 + 28 * (1 + len(named)), rows=2, heights=[620, 28 * (1 + len(named))], scale=2
    ) as (
        axis,
        below,
    ):
        for group, style in _styles(points).items():
            fit = [point for point in points if point.group == group and point.peak_bytes <= capacity]
            axis.scatter(
                [point.peak_bytes / GIB for point in fit],
                [point.speed for point in fit],
                marker=style[0],
                color=style[2],
                edgecolors="black",
                linewidths=0.6,
                s=48 if len(points) < 150 else 30,
                label=group,
                zorder=3,
            )
        out = [point for point in points if point.peak_bytes > capacity]
        far = max(1.6 * capacity, 1.2 * min(point.peak_bytes for point in points))
        near = [point for point in out if point.peak_bytes <= far]
        if near:
            words = "does not fit"
            if len(near) < len(out):
                words += f" ({len(out) - len(near)} more beyond the right edge)"
            axis.scatter(
                [point.peak_bytes / GIB for point in near],
                [point.speed for point in near],
                marker="x",
                color="#999999",
                s=34,
                label=words,
                zorder=2,
            )
        if len(front) > 1:
            axis.step(
                [point.peak_bytes / GIB for point in front],
                [point.speed for point in front],
                where="post",
                color="black",
                linewidth=1.5,
                zorder=4,
                label="most speed for the memory",
            )
        axis.axvline(
            capacity / GIB,
            color="#a00000",
            linestyle="--",
            linewidth=2.2,
            label=f"{gpu}: {capacity / GIB:.4g} GiB",
        )
        axis.set_xlabel("peak memory of the fullest rank, GiB")
        axis.set_ylabel("predicted tokens/s/GPU")
        axis.set_ylim(0, 1.1 * max(point.speed for point in points))
        axis.set_xlim(0, 1.04 * max([capacity, *(point.peak_bytes for point in near)]) / GIB)
        axis.set_title(wrapped(title, 1150))
        axis.grid(alpha=0.3)
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.figure.legend(loc="outside lower center", ncols=3, fontsize=10, frameon=False)
        table(
            below,
            [
                "",
                "the fastest that fit" if front else "none fits; the smallest",
                "tokens/s/GPU",
                "peak memory, GiB",
            ],
            [
                [str(number), point.label, f"{point.speed:,.0f}", f"{point.peak_bytes / GIB:.1f}"]
                for number, point in enumerate(named, 1)
            ],
            [0.4, 6, 1.6, 2],
        )
        seen = [(min(point.peak_bytes / GIB, axis.get_xlim()[1]), point.speed) for point in named]
        numbered(axis, seen)


def frontier_figure(points: Sequence[Point], capacity: int, gpu: str, title: str) -> Any:
    """The same for a page: a figure of plotly with each layout under the pointer."""
    from plotly.graph_objects import Figure, Scatter

    figure = Figure()
    for fits in (True, False):
        for group, (_, mark, colour) in _styles(points).items():
            own = [p for p in points if p.group == group and (p.peak_bytes <= capacity) is fits]
            if own:
                figure.add_trace(
                    Scatter(
                        x=[point.peak_bytes / GIB for point in own],
                        y=[point.speed for point in own],
                        mode="markers",
                        name=group if fits else f"{group}, does not fit",
                        marker={"symbol": mark, "color": colour if fits else "#bbbbbb", "size": 9},
                        text=[point.label + (f"<br>{point.hover}" if point.hover else "") for point in own],
                        hovertemplate="%{text}<br>%{y:,.0f} tokens/s/GPU, %{x:.2f} GiB<extra></extra>",
                    )
                )
    front = pareto([point for point in points if point.peak_bytes <= capacity])
    if len(front) > 1:
        figure.add_trace(
            Scatter(
                x=[point.peak_bytes / GIB for point in front],
                y=[point.speed for point in front],
                mode="lines",
                line={"shape": "hv", "color": "black", "width": 1},
                name="most speed for the memory",
                hoverinfo="skip",
            )
        )
    figure.add_vline(
        capacity / GIB,
        line={"dash": "dash", "color": "#a00000"},
        annotation_text=f"{gpu}: {capacity / GIB:.4g} GiB",
    )
    figure.update_layout(
        title=title,
        height=650,
        xaxis_title="peak memory of the fullest rank, GiB",
        yaxis_title="predicted tokens/s/GPU",
        template="plotly_white",
    )
    figure.update_xaxes(
        range=[0, 1.04 * max(capacity, *(min(p.peak_bytes, 1.6 * capacity) for p in points)) / GIB]
    )
    return figure


def _styles(points: Sequence[Point]) -> dict[str, tuple[str, str, str]]:
    """Mark and colour of each group, dark and light in turn."""
    names = dict.fromkeys(point.group for point in points)
    return {name: _LOOKS[number % len(_LOOKS)] for number, name in enumerate(names)}
