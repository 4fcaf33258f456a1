"""How long the documents of each source are, and how many tokens it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_syne.pictures.canvas import colours, log_axis, picture, tokens_axis


def draw_lengths(
    path: str | Path, edges: Sequence[int], documents: Mapping[str, Sequence[int]], tokens: Mapping[str, int]
) -> None:
    """``edges`` [bins + 1]: begins of the bins of length, and the end of the last; ``documents`` [bins] of each
    source by name; ``tokens`` of each."""
    names = list(documents)
    shade = colours(names)
    with picture(path, 1400, max(500, 180 + 26 * len(names)), columns=2) as (left, right):
        for name in names:
            left.stairs(
                documents[name], edges, color=shade[name], label=name, linewidth=2, fill=len(names) == 1
            )
        left.set_xscale("log", base=2)
        log_axis(left.xaxis, "{:,.0f}", base=2)
        left.set_xlabel("tokens of a document")
        left.set_ylabel("documents")
        tokens_axis(left.yaxis)
        left.set_title("Lengths of documents")
        left.grid(alpha=0.3)
        if len(names) > 1:
            left.legend(fontsize="small", ncols=-(-len(names) // 20))
        right.barh(
            names[::-1], [tokens[name] for name in names[::-1]], color=[shade[name] for name in names[::-1]]
        )
        tokens_axis(right.xaxis)
        right.set_title("Tokens")
        right.grid(axis="x", alpha=0.3)
