"""``histogram``: how long the documents of each prefix are, and its tokens; in numbers and as a picture."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_syne.data.tokens.reader import IndexedReader
from megatron_syne.errors import ConfigError
from megatron_syne.inspection.text import say

_BLOCK = 1 << 20
_BINS = 32  # a document's length is an int32


@dataclass
class Lengths:
    """Of one prefix; bin ``i`` holds documents of 2^i to 2^(i+1) - 1 tokens (the first one also empty ones)."""

    documents: int
    tokens: int
    shortest: int
    longest: int
    bins: NDArray[np.int64]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="of the .bin, .idx and .json files")
    parser.add_argument("--output", metavar="PNG", help="also write a picture")


def run(options: argparse.Namespace) -> int:
    """Print, and draw where asked; returns the exit code."""
    found = {
        name: lengths_of(IndexedReader(prefix, require_manifest=False).document_lengths)
        for name, prefix in short_names(options.prefixes).items()
    }
    say(table(found))
    if options.output:
        from megatron_syne.pictures.lengths import draw_lengths

        first, last = filled(found)
        draw_lengths(
            options.output,
            [1 << number for number in range(first, last + 1)],
            {name: each.bins[first:last].tolist() for name, each in found.items()},
            {name: each.tokens for name, each in found.items()},
        )
        say(f"picture: {options.output}")
    return 0


def lengths_of(lengths: NDArray[Any]) -> Lengths:
    """Counted block by block: the lengths of 100 million documents are mapped, and not copied whole."""
    bins, tokens, shortest, longest = np.zeros(_BINS, dtype=np.int64), 0, 1 << 31, 0
    for begin in range(0, len(lengths), _BLOCK):
        block = np.asarray(lengths[begin : begin + _BLOCK])
        # frexp is exact where a logarithm would round: 2^k is in bin k
        exponents = np.frexp(np.maximum(block, 1).astype(np.float64))[1] - 1
        bins += np.bincount(exponents, minlength=_BINS)
        tokens += int(block.sum(dtype=np.int64))
        shortest, longest = min(shortest, int(block.min())), max(longest, int(block.max()))
    return Lengths(len(lengths), tokens, shortest if len(lengths) else 0, longest, bins)


def filled(found: dict[str, Lengths]) -> tuple[int, int]:
    """First bin that holds anything, and the one after the last."""
    places = np.flatnonzero(sum(each.bins for each in found.values()))
    return (int(places[0]), int(places[-1]) + 1) if places.size else (0, 1)


def table(found: dict[str, Lengths]) -> str:
    """Numbers of every prefix, and documents by length."""
    width = max(14, *(len(name) for name in found))
    lines = [
        f"{'':{width}} {'documents':>14} {'tokens':>18} {'share':>7} {'shortest':>9} {'mean':>10} {'longest':>12}"
    ]
    total = sum(each.tokens for each in found.values())
    for name, each in found.items():
        lines.append(
            f"{name:{width}} {each.documents:>14,} {each.tokens:>18,} {each.tokens / max(total, 1):>7.2%}"
            f" {each.shortest:>9,} {each.tokens / max(each.documents, 1):>10,.1f} {each.longest:>12,}"
        )
    lines.append(f"{'all':{width}} {sum(each.documents for each in found.values()):>14,} {total:>18,}")
    lines += ["", "documents by tokens:"]
    lines.append(f"{'':{width + 13}}" + "".join(f" {name:>14}" for name in found))
    first, last = filled(found)
    for number in range(first, last):
        span = f"{(1 << number) if number else 0:,} to {(1 << number + 1) - 1:,}"
        lines.append(
            f"{span:>{width + 13}}" + "".join(f" {each.bins[number]:>14,}" for each in found.values())
        )
    return "\n".join(line.rstrip() for line in lines)


def short_names(prefixes: list[str]) -> dict[str, str]:
    """The last part of each path, or the whole path where that says it twice."""
    names = [Path(prefix).name for prefix in prefixes]
    chosen = {
        name if names.count(name) == 1 else prefix: prefix
        for name, prefix in zip(names, prefixes, strict=True)
    }
    if len(chosen) < len(prefixes):
        raise ConfigError(f"the same prefix is given twice: {', '.join(prefixes)}")
    return chosen
