"""Cost of a step as layers, width, sequence and ranks grow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_syne.pictures.canvas import picture

AXES = {"layers": "layers", "width": "hidden size", "sequence": "tokens of a sequence", "ranks": "layout"}
"""What varies -> the axis of its panels."""


class Cost(NamedTuple):
    """One measured point."""

    value: str
    """What was varied: ``16``, ``TP2 PP2``."""
    milliseconds: float
    """Of one step."""
    per_flop: float
    """Its time over that of the base, divided by the same of the floating-point operations."""
    megabytes: float
    """Peak memory of rank 0."""


def draw_cost(path: str | Path, costs: Mapping[str, Sequence[Cost]], title: str) -> None:
    """Above the time of a step along each axis, with what the arithmetic alone would give; below rank 0's memory."""
    columns = len(costs)
    with picture(path, 430 * columns, 800, rows=2, columns=columns, heights=[3, 2], scale=2) as panels:
        for number, (axis, rows) in enumerate(costs.items()):
            time, memory = panels[number], panels[columns + number]
            values = [row.value.replace(" ", "\n") for row in rows]
            if axis == "ranks":
                _bars(time, values, [row.milliseconds for row in rows], "#1f4e79", "//")
            else:
                _lines(time, values, rows)
            _bars(memory, values, [row.megabytes for row in rows], "#f2b84b", "")
            time.set_title(f"by {axis}")
            memory.set_xlabel(AXES.get(axis, axis))
            if number == 0:
                time.set_ylabel("ms per step")
                memory.set_ylabel("peak memory of rank 0, MB")
        panels[0].figure.suptitle(title, fontsize=13)


def _lines(panel: Any, values: Sequence[str], rows: Sequence[Cost]) -> None:
    """On logarithmic scale, which tells growth; the value at each point."""
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    measured = [row.milliseconds for row in rows]
    panel.plot(values, measured, "o-", color="#1f4e79", linewidth=2, label="measured")
    panel.plot(
        values,
        [row.milliseconds / row.per_flop for row in rows],
        "s--",
        color="#999999",
        markerfacecolor="white",
        label="as the arithmetic grows",
    )
    for place, row in enumerate(rows):
        below = row.per_flop < 1  # on the side where the other line is not
        panel.annotate(
            f"{row.milliseconds:,.0f}",
            (place, row.milliseconds),
            xytext=(7, -6) if below else (-5, 7),
            textcoords="offset points",
            ha="left" if below else "right",
            va="top" if below else "bottom",
            fontsize=9.5,
        )
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.margins(x=0.2, y=0.16)
    panel.grid(alpha=0.3)
    panel.legend(loc="upper left", fontsize=9.5)


def _bars(panel: Any, values: Sequence[str], heights: Sequence[float], colour: str, hatch: str) -> None:
    drawn = panel.bar(values, heights, color=colour, hatch=hatch, edgecolor="black", linewidth=0.6)
    panel.bar_label(
        drawn,
        fmt="{:,.0f}",
        padding=2,
        fontsize=9.5,
    )
    panel.margins(y=0.12)
    panel.grid(axis="y", alpha=0.3)
