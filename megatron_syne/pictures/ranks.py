"""The rank grid: which rank holds which layers, heads, columns and rows, and on which node it runs."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_syne.pictures.canvas import picture, table, wrapped

MOST_COLUMNS = 16
"""Ranks beside each other that can still be read: with more, one replica is drawn in full and the rest as a map."""

MAP_COLUMNS = 16
"""Nodes beside each other in the map."""

# Neighbouring nodes differ; all pale, as text stands on them.
_NODES = ("#d4e6f7", "#fbe3c2", "#d6efd8", "#f6d5d5", "#e4d8f0", "#f3f0bf", "#d0ecec", "#e6e6e6")

Place = tuple[int, int, int, int]
"""(tp, cp, dp, pp) of a rank."""


def draw_ranks(
    path: str | Path,
    places: Sequence[Place],
    stages: Sequence[str],
    tensor: Mapping[str, Sequence[str]],
    sequence: Sequence[str],
    gpus_per_node: int,
    title: str,
) -> None:
    """``places`` of the ranks in order; ``stages``: what each pipeline stage holds; ``tensor``: of each kind of thing
    that TP cuts (query heads, ...), what each TP rank holds; ``sequence``: the parts of each CP rank."""
    sizes = [1 + max(place[axis] for place in places) for axis in range(4)]
    tp, cp, dp, pp = sizes
    replicas = max(1, min(dp, MOST_COLUMNS // (tp * cp)))
    summarised = replicas < dp
    if summarised:
        replicas = 1
    rows = pp * cp if tp * cp > MOST_COLUMNS else pp
    parts = [110.0 + rows * (58 if rows <= 8 else 42), 40.0 + 26 * (tp + (cp > 1) * cp)]
    if summarised:
        nodes = math.ceil(len(places) / gpus_per_node)
        parts.append(40.0 + 19.5 * (1 + _tall(gpus_per_node)) * math.ceil(nodes / MAP_COLUMNS))
    with picture(
        path, 1500, int(sum(parts)) + (110 if summarised else 60), rows=len(parts), heights=parts, scale=2
    ) as axes:
        _grid(axes[0], places, stages, (tp, cp, replicas, pp), gpus_per_node)
        if summarised:
            axes[0].set_title(f"the first of {dp} replicas in full", loc="left", fontsize=11)
            _node_map(axes[2], places, gpus_per_node, pp)
        _holdings(axes[1], tensor, sequence if cp > 1 else [])
        axes[0].figure.suptitle(wrapped(title, 1500), fontsize=13)


def _grid(
    axis: Any, places: Sequence[Place], stages: Sequence[str], sizes: Sequence[int], gpus_per_node: int
) -> None:
    """Cells of ranks: a row for each stage, columns by replica, CP and TP."""
    from matplotlib.patches import Rectangle

    tp, cp, replicas, pp = sizes
    stacked = cp if tp * cp > MOST_COLUMNS else 1  # CP ranks below each other, as they have no room beside
    columns, rows = tp * cp * replicas // stacked, pp * stacked
    seen: dict[int, str] = {}
    for rank, (t, c, d, p) in enumerate(places):
        if d >= replicas:
            continue
        node = rank // gpus_per_node
        column, row = (t, p * cp + c) if stacked > 1 else (t + tp * (c + cp * d), p)
        colour = seen.setdefault(node, _NODES[len(seen) % len(_NODES)])
        axis.add_patch(Rectangle((column, row), 1, 1, facecolor=colour, edgecolor="#555555", linewidth=0.8))
        text = f"rank {rank}\nnode {node}" if columns <= MOST_COLUMNS else f"{rank}"
        size = 10 if columns <= 8 else 8.5
        axis.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=size)
    for d in range(replicas + 1):
        axis.axvline(d * columns / replicas, color="black", linewidth=2.5)
    for border in range(tp, columns, tp):
        axis.axvline(border, color="black", linewidth=1.4)
    for border in range(0, rows + 1, stacked):
        axis.axhline(border, color="black", linewidth=1.4)
    axis.set_xlim(0, columns)
    axis.set_ylim(rows, 0)
    lines = [
        textwrap.fill(f"stage {number}: {text}", 34, break_on_hyphens=False)
        for number, text in enumerate(stages)
    ]
    if stacked > 1:
        lines = [f"cp {c}" if c else f"{line}; cp 0" for line in lines for c in range(cp)]
    axis.set_yticks([row + 0.5 for row in range(rows)], lines, fontsize=10)
    names = [f"tp {n % tp}" for n in range(columns)]
    if cp > stacked:
        names = [f"{name}\ncp {n // tp % cp}" for n, name in enumerate(names)]
    if replicas > 1:
        names = [f"{name}\nreplica {n // (tp * cp)}" for n, name in enumerate(names)]
    axis.set_xticks([n + 0.5 for n in range(columns)], names, fontsize=10 if columns <= 16 else 8)
    axis.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
    _inside(axis)


def _inside(axis: Any) -> None:
    """What is drawn lies within the axes: the layout need not measure each piece, which takes long."""
    for artist in (*axis.patches, *axis.texts):
        artist.set_in_layout(False)


def _holdings(axis: Any, tensor: Mapping[str, Sequence[str]], sequence: Sequence[str]) -> None:
    """A table of what each TP rank (and each CP rank) holds of every layer and of the vocabulary."""
    count = max(len(row) for row in tensor.values())
    header = ["each holds", *tensor]
    rows = [[f"tp {t}", *(row[t] for row in tensor.values())] for t in range(count)]
    rows += [[f"cp {c}", text, *[""] * (len(tensor) - 1)] for c, text in enumerate(sequence)]
    table(axis, header, rows, [1.0, *[1.6] * len(tensor)])


def _tall(gpus_per_node: int) -> int:
    """Rows of a node's box in the map, four ranks wide."""
    return math.ceil(gpus_per_node / 4)


def _rectangles(corners: list[tuple[float, float]]) -> list[tuple[float, float, float, float]]:
    """(x, y, width, height) of the one rectangle that unit cells fill, or of each cell where they do not."""
    xs, ys = [x for x, _ in corners], [y for _, y in corners]
    width, height = max(xs) - min(xs) + 1, max(ys) - min(ys) + 1
    if width * height == len(corners):
        return [(min(xs), min(ys), width, height)]
    return [(x, y, 1.0, 1.0) for x, y in corners]


def _node_map(axis: Any, places: Sequence[Place], gpus_per_node: int, pp: int) -> None:
    """Every node as a box of its ranks, those of one replica and stage together, shaded by stage."""
    import matplotlib
    from matplotlib.patches import Patch, Rectangle

    wide = min(4, gpus_per_node)
    tall, across = _tall(gpus_per_node), MAP_COLUMNS
    nodes = math.ceil(len(places) / gpus_per_node)
    shades = matplotlib.colormaps["Blues"]
    tone = [0.05 + 0.8 * stage / max(1, pp - 1) for stage in range(pp)]
    blocks: dict[tuple[int, int, int], list[tuple[float, float]]] = {}  # (node, replica, stage) -> corners
    for rank, (_, _, d, p) in enumerate(places):
        node, own = divmod(rank, gpus_per_node)
        corner = (node % across * (wide + 0.5) + own % wide, node // across * (tall + 1.0) + own // wide)
        blocks.setdefault((node, d, p), []).append(corner)
    for (_, d, p), corners in blocks.items():
        color = "white" if tone[p] > 0.5 else "black"
        for x, y, width, height in _rectangles(corners):
            axis.add_patch(
                Rectangle(
                    (x, y), width, height, facecolor=shades(tone[p]), edgecolor="#777777", linewidth=0.6
                )
            )
            if d == 0:
                inner = (x + 0.08, y + 0.08), width - 0.16, height - 0.16
                axis.add_patch(Rectangle(*inner, fill=False, edgecolor="#c00000", linewidth=1.8))
            middle = (x + width / 2, y + height / 2 + 0.02)
            axis.text(*middle, str(d), ha="center", va="center", fontsize=7.5, color=color)
    for node in range(nodes):
        x, y = node % across * (wide + 0.5), node // across * (tall + 1.0)
        axis.add_patch(Rectangle((x, y), wide, tall, fill=False, edgecolor="black", linewidth=1.2))
        axis.text(x, y - 0.12, f"node {node}", va="bottom", fontsize=8)
    axis.set_xlim(-0.2, across * (wide + 0.5))
    axis.set_ylim(math.ceil(nodes / across) * (tall + 1.0), -0.9)
    axis.set_axis_off()
    _inside(axis)
    axis.set_title(
        "every node and its GPUs: number = replica (dp), shade = pipeline stage, red = the replica above",
        loc="left",
        fontsize=11,
    )
    told = range(pp) if pp <= 16 else sorted({round(n * (pp - 1) / 7) for n in range(8)})
    handles = [Patch(facecolor=shades(tone[p]), edgecolor="#777777", label=f"stage {p}") for p in told]
    columns = min(len(handles), 8)
    axis.figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, fontsize=9.5, frameon=False
    )
