"""Memory of the ranks of each pipeline stage, by component, against what the GPU has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_syne.pictures.canvas import colours, picture, wrapped

GIB = 2**30

# Name -> (colour, hatch, words): the same in every picture, dark beside light so that grey print tells them apart.
_KNOWN = {
    "parameters": ("#1f4e79", "", "parameters"),
    "gradients": ("#8fbce6", "//", "gradients"),
    "optimizer": ("#2f7f5f", "..", "optimizer state"),
    "activations": ("#f2b84b", "\\\\", "activations"),
    "logits": ("#c0504d", "xx", "logits and loss"),
    "fp8": ("#b8a1d9", "++", "FP8 copies"),
    "communication": ("#5f7f8c", "--", "communication buffers"),
    "margin": ("#dddddd", "", "margin (fragmentation, CUDA, NCCL)"),
}


def draw_memory(
    path: str | Path,
    bars: Mapping[str, Mapping[str, int]],
    capacity: int | None,
    gpu: str,
    title: str,
) -> None:
    """``bars``: name of each stage -> bytes of its ranks by component; ``capacity``: bytes of one GPU (None = none
    to compare with), named ``gpu``."""
    shown = _shown(bars)
    longest = max(sum(parts.values()) for parts in bars.values()) / GIB or 1.0
    compared = capacity is not None and capacity / GIB < 6 * longest
    if capacity is not None and compared:
        longest = max(longest, capacity / GIB)
    drawn = []
    with picture(path, 1300, 210 + 52 * max(len(bars), 2), scale=2) as (axis,):
        left = [0.0] * len(bars)
        for name in shown:
            colour, hatch, words = _style(name, shown)
            values = [parts.get(name, 0) / GIB for parts in bars.values()]
            pieces = axis.barh(
                list(bars), values, left=left, color=colour, hatch=hatch, edgecolor="black", linewidth=0.6
            )
            pieces.set_label(words)
            drawn.append(pieces)
            for row, (value, begin) in enumerate(zip(values, left, strict=True)):
                if value > 0.031 * longest:
                    _value(axis, begin + value / 2, row, value)
            left = [begin + value for begin, value in zip(left, values, strict=True)]
        for row, total in enumerate(left):
            axis.text(
                1.01,
                row,
                _total(total, capacity),
                transform=axis.get_yaxis_transform(),
                va="center",
                fontsize=10,
                weight="bold",
                color="#a00000" if capacity is not None and total * GIB > capacity else "black",
            )
        if capacity is not None:
            words = _of(gpu, capacity) + ("" if compared else ", far beyond the right edge")
            line = axis.axvline(capacity / GIB, color="#a00000", linewidth=2.2, linestyle="--", label=words)
        axis.set_ylim(len(bars) - 0.4, -0.6)  # the first stage at the top
        axis.set_xlim(0, longest * 1.04)
        axis.set_xlabel("peak memory of each rank of the stage, GiB")
        axis.set_title(wrapped(title, 1000))
        axis.grid(axis="x", alpha=0.4)
        handles = [*drawn, *([] if capacity is None else [line])]
        axis.figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=10, frameon=False)


def memory_figure(bars: Mapping[str, Mapping[str, int]], capacity: int | None, gpu: str, title: str) -> Any:
    """The same for a page: a figure of plotly with the bytes under the pointer."""
    from plotly.graph_objects import Bar, Figure

    patterns = {"": "", "//": "/", "\\\\": "\\", "..": ".", "xx": "x", "++": "+", "--": "-"}
    figure = Figure()
    shown = _shown(bars)
    for name in shown:
        colour, hatch, words = _style(name, shown)
        values = [parts.get(name, 0) / GIB for parts in bars.values()]
        figure.add_trace(
            Bar(
                y=[text.replace("\n", "<br>") for text in bars],
                x=values,
                name=words,
                orientation="h",
                marker={"color": colour, "pattern": {"shape": patterns[hatch], "solidity": 0.15}},
                hovertemplate=f"%{{y}}<br>{words}: %{{x:.3f}} GiB<extra></extra>",
            )
        )
    if capacity is not None:
        figure.add_vline(
            capacity / GIB, line={"dash": "dash", "color": "#a00000"}, annotation_text=_of(gpu, capacity)
        )
    figure.update_layout(
        barmode="stack",
        title=title,
        height=260 + 45 * len(bars),
        xaxis_title="peak memory of each rank of the stage, GiB",
        template="plotly_white",
    )
    figure.update_yaxes(autorange="reversed")
    return figure


def _shown(bars: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Components that any bar has, in their order; one of nothing is left out."""
    names = dict.fromkeys(name for parts in bars.values() for name in parts)
    return [name for name in names if any(parts.get(name, 0) for parts in bars.values())]


def _style(name: str, all_names: Sequence[str]) -> tuple[Any, str, str]:
    if name in _KNOWN:
        return _KNOWN[name]
    red, green, blue, _ = colours(all_names)[name]
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}", "", name


def _of(gpu: str, capacity: int) -> str:
    return f"{gpu}: {capacity / GIB:.4g} GiB"


def _total(gib: float, capacity: int | None) -> str:
    share = "" if capacity is None else f", {gib * GIB / capacity:.0%}"
    return f"{gib:.3g} GiB{share}" if gib < 100 else f"{gib:.0f} GiB{share}"


def _value(axis: Any, x: float, row: int, gib: float) -> None:
    axis.text(
        x,
        row,
        f"{gib:.3g}",
        ha="center",
        va="center",
        fontsize=9,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.2},
    )
