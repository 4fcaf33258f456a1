"""Shares of the sources over the tokens of a run, stacked, and the epochs of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from megatron_syne.pictures.canvas import colours, picture, tokens_axis


def draw_mixture(
    path: str | Path,
    positions: Sequence[int] | NDArray[Any],
    shares: Mapping[str, Sequence[float] | NDArray[Any]],
    stages: Sequence[tuple[str, int]],
    epochs: Mapping[str, float | None],
    reached: int | None = None,
) -> None:
    """``shares`` of each source at token ``positions`` of the run; ``stages``: (name, token at which it ends);
    ``epochs`` read of each source (None = unknown); ``reached``: tokens consumed so far, marked by a line."""
    names = list(shares)
    shade = colours(names)
    known = [name for name in names if (epochs.get(name) is not None and math.isfinite(epochs[name] or 0.0))]
    height = max(600, 220 + 24 * len(names))
    with picture(path, 1500, height, columns=2 if known else 1) as axes:
        mix = axes[0]
        mix.stackplot(
            positions,
            list(shares.values()),
            labels=names,
            colors=[shade[name] for name in names],
            linewidth=0,
        )
        mix.set_xlim(0, int(positions[-1]))
        mix.set_ylim(0, 1)
        mix.set_xlabel("tokens")
        mix.set_ylabel("share")
        tokens_axis(mix.xaxis)
        begin = 0
        for name, end in stages:
            mix.axvline(end, color="black", linewidth=1)
            if end > begin:
                mix.text(
                    (begin + end) / 2, 1.01, name, ha="center", va="bottom", fontsize="small", rotation=15
                )
            begin = end
        if reached is not None:
            mix.axvline(reached, color="red", linewidth=2, linestyle="--")
        handles, labels = mix.get_legend_handles_labels()
        # in the order in which the areas lie on one another
        mix.legend(handles[::-1], labels[::-1], loc="center left", fontsize="small", framealpha=0.9)
        if known:
            bars = axes[1]
            bars.barh(known, [epochs[name] for name in known], color=[shade[name] for name in known])
            bars.axvline(1, color="black", linewidth=1, linestyle=":")
            bars.set_title("Epochs read" if reached is None else "Epochs read so far")
            bars.grid(axis="x", alpha=0.3)
