"""The pipeline's timeline: forward and backward passes of each stage, and the bubble between them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_syne.pictures.canvas import picture, wrapped

WIDTH = 1500


class Pass(Protocol):
    """One pass of one micro-batch through one model chunk on one stage; times in seconds."""

    @property
    def stage(self) -> int:
        """Pipeline stage, from 0."""

    @property
    def chunk(self) -> int:
        """Model chunk of the stage, from 0."""

    @property
    def micro_batch(self) -> int:
        """From 0."""

    @property
    def kind(self) -> str:
        """``forward`` or ``backward``."""

    @property
    def begin(self) -> float:
        """Seconds from the start of the step."""

    @property
    def end(self) -> float:
        """Seconds from the start of the step."""


def bubble_share(tasks: Sequence[Pass]) -> float:
    """Share of the time of all stages, from the first pass to the last one's end, in which they wait."""
    span = max(task.end for task in tasks) - min(task.begin for task in tasks)
    stages = 1 + max(task.stage for task in tasks)
    return max(0.0, 1.0 - sum(task.end - task.begin for task in tasks) / (span * stages))


def waiting(tasks: Sequence[Pass]) -> list[float]:
    """Share of the time, up to the last one's end, in which each stage waits."""
    end = max(task.end for task in tasks)
    busy = [0.0] * (1 + max(task.stage for task in tasks))
    for task in tasks:
        busy[task.stage] += task.end - task.begin
    return [1 - seconds / end for seconds in busy]


def draw_pipeline(
    path: str | Path, tasks: Sequence[Pass], title: str, waits: Sequence[float] | None = None
) -> None:
    """The whole step and, where its passes are too narrow to be told apart, how it fills and drains.

    The bubble's share and the sizes are added to ``title``. ``waits``: the share of the whole step that each stage
    waits, where ``tasks`` lack the steady middle of a long one; the title says so.
    """
    stages = 1 + max(task.stage for task in tasks)
    end = max(task.end for task in tasks)
    forward = sorted(task.end - task.begin for task in tasks if task.kind == "forward")
    window = (WIDTH - 230) / _needed(max(task.micro_batch for task in tasks)) * forward[len(forward) // 4]
    parts, width = [("the whole step" if waits is None else "the step without its middle", 0.0, end)], WIDTH
    if window < 0.7 * end:
        parts += [("how it fills", 0.0, min(window, end)), ("how it drains", max(0.0, end - window), end)]
    elif window < end:
        width = round(WIDTH * end / window)  # a wider sheet shows them all
    each = 60 + max(22 if len(parts) > 1 else 34, 120 // stages) * stages
    with picture(path, width, 150 + each * len(parts), rows=len(parts), scale=2) as axes:
        for axis, (words, begin, until) in zip(axes, parts, strict=True):
            whole = until - begin >= end
            numbers = not whole or len(parts) == 1
            _draw(axis, tasks, begin, until, _unit(end), width - 230 if numbers else 0)
            if waits is not None:
                axis.set_xlabel(f"time without the middle, {_unit(end)[1]}")
            if len(parts) > 1:
                axis.set_title(words, loc="left", fontsize=11)
        idle(axes[0], waiting(tasks) if waits is None else waits)
        axes[0].figure.suptitle(wrapped(headline(tasks, title, "\n", waits), width), fontsize=13)
        _legend(axes[0].figure, tasks)


def headline(tasks: Sequence[Pass], title: str, between: str, waits: Sequence[float] | None = None) -> str:
    """``title``, then ``between``, then the schedule's name, its sizes, what is left out and the bubble's share."""
    stages, chunks = (1 + max(getattr(task, name) for task in tasks) for name in ("stage", "chunk"))
    batches = 1 + max(task.micro_batch for task in tasks)
    name = f"interleaved 1F1B, {stages} stages of {chunks} chunks" if chunks > 1 else f"1F1B, {stages} stages"
    if waits is None:
        count, share = f"{batches} micro-batches", bubble_share(tasks)
    else:
        drawn, share = len({task.micro_batch for task in tasks}), max(0.0, sum(waits) / len(waits))
        count = f"{batches:,} micro-batches, drawn the first {drawn - drawn // 2} and the last {drawn // 2}"
    return f"{title}{between}{name}, {count}; bubble {share:.1%} of the stages' time"


def idle(axis: Any, waits: Sequence[float]) -> None:
    """Write at the right of each stage which share of the step it waits."""
    for stage, share in enumerate(waits):
        text = f" waits {share:.1%}"
        axis.text(1.0, stage, text, transform=axis.get_yaxis_transform(), va="center", fontsize=9)


def pipeline_figure(tasks: Sequence[Pass], title: str, waits: Sequence[float] | None = None) -> Any:
    """The same for a page: a figure of plotly to zoom into."""
    from plotly.graph_objects import Bar, Figure

    stages = 1 + max(task.stage for task in tasks)
    size, unit = _unit(max(task.end for task in tasks))
    figure = Figure()
    for kind, chunk in _kinds(tasks):
        own = [task for task in tasks if task.kind == kind and task.chunk == chunk]
        figure.add_trace(
            Bar(
                y=[f"stage {task.stage}" for task in own],
                x=[(task.end - task.begin) / size for task in own],
                base=[task.begin / size for task in own],
                name=_name(kind, chunk, tasks),
                orientation="h",
                marker={"color": _hex(kind, chunk, tasks), "line": {"color": "black", "width": 0.4}},
                customdata=[[task.micro_batch, task.begin / size, task.end / size] for task in own],
                hovertemplate=f"%{{y}}, {kind} of micro-batch %{{customdata[0]}}, chunk {chunk}<br>"
                f"%{{customdata[1]:.4g}} to %{{customdata[2]:.4g}} {unit}<extra></extra>",
            )
        )
    figure.update_layout(
        barmode="overlay",
        title=headline(tasks, title, "<br>", waits),
        height=220 + 40 * stages,
        xaxis_title=f"time{'' if waits is None else ' without the middle'}, {unit}",
        template="plotly_white",
        plot_bgcolor="#eeeeee",  # what shows between the passes is the bubble
    )
    order = [f"stage {stage}" for stage in range(stages)]
    figure.update_yaxes(autorange="reversed", categoryorder="array", categoryarray=order)
    return figure


def _draw(
    axis: Any, tasks: Sequence[Pass], begin: float, until: float, unit: tuple[float, str], pixels: int
) -> None:
    from matplotlib.collections import PolyCollection

    size, stages = unit[0], 1 + max(task.stage for task in tasks)
    for stage in range(stages):
        axis.broken_barh(
            [(begin / size, (until - begin) / size)],
            (stage - 0.42, 0.84),
            facecolor="#f4f4f4",
            edgecolor="#bbbbbb",
            hatch="////",
            linewidth=0,
        )
    seen = [task for task in tasks if task.end > begin and task.begin < until]
    for kind, chunk in _kinds(tasks):
        own = [task for task in seen if task.kind == kind and task.chunk == chunk]
        corners = [
            [
                (task.begin / size, task.stage - 0.42),
                (task.end / size, task.stage - 0.42),
                (task.end / size, task.stage + 0.42),
                (task.begin / size, task.stage + 0.42),
            ]
            for task in own
        ]
        axis.add_collection(
            PolyCollection(
                corners,
                facecolors=_hex(kind, chunk, tasks),
                edgecolors="black",
                linewidths=0.5 if pixels else 0.0,
                label=_name(kind, chunk, tasks),
            )
        )
    for task in seen if pixels else []:
        width = (task.end - task.begin) / (until - begin) * pixels
        middle = (task.begin + task.end) / 2
        inside = begin <= task.begin and task.end <= until
        if inside and width >= _needed(task.micro_batch):
            dark = task.kind == "backward"
            axis.text(
                middle / size,
                task.stage,
                str(task.micro_batch),
                ha="center",
                va="center",
                fontsize=7.5,
                color="white" if dark else "black",
                clip_on=True,
                in_layout=False,
            )
    axis.set_xlim(begin / size, until / size)
    axis.set_ylim(stages - 0.5, -0.5)
    axis.set_yticks(range(stages), [f"stage {stage}" for stage in range(stages)])
    axis.set_xlabel(f"time in the step, {unit[1]}")


def _needed(micro_batch: int) -> float:
    """Pixels that a pass must be wide to show its number."""
    return 3.5 + 6.5 * len(str(micro_batch))


def _kinds(tasks: Sequence[Pass]) -> list[tuple[str, int]]:
    return sorted(
        {(task.kind, task.chunk) for task in tasks}, key=lambda each: (each[0] == "backward", each[1])
    )


def _hex(kind: str, chunk: int, tasks: Sequence[Pass]) -> str:
    """Forward light blue, backward dark orange; later chunks darker."""
    chunks = 1 + max(task.chunk for task in tasks)
    part = chunk / max(1, chunks - 1) if chunks > 1 else 0.35
    pale, deep = ((214, 234, 250), (110, 168, 220)) if kind == "forward" else ((205, 110, 40), (95, 40, 5))
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(pale, deep, strict=True))


def _name(kind: str, chunk: int, tasks: Sequence[Pass]) -> str:
    return f"{kind}, chunk {chunk}" if any(task.chunk for task in tasks) else kind


def _unit(seconds: float) -> tuple[float, str]:
    return (1.0, "s") if seconds >= 2 else (1e-3, "ms") if seconds >= 2e-3 else (1e-6, "µs")


def _legend(figure: Any, tasks: Sequence[Pass]) -> None:
    from matplotlib.patches import Patch

    chunks = sorted({task.chunk for task in tasks})
    told = chunks if len(chunks) <= 6 else [chunks[0], chunks[len(chunks) // 2], chunks[-1]]
    handles = [
        Patch(facecolor=_hex(kind, chunk, tasks), edgecolor="black", label=_name(kind, chunk, tasks))
        for chunk in told
        for kind in ("forward", "backward")
    ]
    handles.append(Patch(facecolor="#f4f4f4", edgecolor="#bbbbbb", hatch="////", label="bubble (waits)"))
    columns = len(told) + 1 if len(told) > 1 else 3  # forward above backward
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=10, frameon=False)
