"""Every Megatron parameter of a tensor-parallel rank is made of rectangles of Hugging Face tensors.

A :class:`Piece` is one such rectangle and the place where it lies. Import fills a parameter from its pieces,
export scatters the pieces back, and resharding intersects the pieces wanted with the pieces stored; that is
all there is to conversion. Tensors are seen as matrices; a vector of n is a matrix of n rows and 1 column.
No rotary permutation is needed: Hugging Face and megatron-core use the same half-split order. Pure.

    h  hidden          f  feed-forward        v  vocabulary
    n  query heads     g  key/value heads     d  size of a head
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from megatron_syne.config.schema import ModelConfig
from megatron_syne.errors import ConfigError
from megatron_syne.models.config import padded_vocab_size

Span = tuple[int, int]
"""Half-open range ``[start, stop)``."""


class Kind(Enum):
    """How a Megatron parameter is made of Hugging Face tensors and cut over TP."""

    DIRECT = "direct"
    """One tensor, the same on every rank (norms)."""
    VOCABULARY = "vocabulary"
    """Rows of one tensor; rows above the vocabulary are padding (embedding, output layer)."""
    COLUMNS = "columns"
    """Columns of one tensor (megatron's row-parallel layers: attention output, second feed-forward)."""
    FUSED_QKV = "fused_qkv"
    """Rows of q, k, v interleaved by query group: n/g query heads, one key head, one value head."""
    GATED_MLP = "gated_mlp"
    """Per rank its rows of the gate projection, then its rows of the up projection."""


@dataclass(frozen=True)
class Entry:
    """One line of a family's table: names with ``{layer}``, shapes of the Hugging Face tensors in letters."""

    kind: Kind
    hf: dict[str, str]
    """Hugging Face name to shape: ``{"model.embed_tokens.weight": "v h"}``."""
    megatron: str
    """Name under megatron-core's local layer spec."""
    te: str | None = None
    """Name under the Transformer Engine spec, where it is another one."""
    shift: float = 0.0
    """Megatron's value less Hugging Face's: -1 for the weight of a zero-centred norm. Such a parameter is
    kept in fp32 on Megatron's side, where 1 can be taken from a bf16 number without loss."""


@dataclass(frozen=True)
class Piece:
    """Rectangle ``rows`` x ``cols`` of the tensor ``source``, at (row, column) ``at`` of a parameter."""

    source: str
    rows: Span
    cols: Span
    at: tuple[int, int]

    def __str__(self) -> str:
        (top, bottom), (left, right) = self.rows, self.cols
        return f"{self.source}[{top}:{bottom}, {left}:{right}] at ({self.at[0]}, {self.at[1]})"


@dataclass(frozen=True)
class Move:
    """Copy ``rows`` x ``cols`` of a stored tensor to ``at`` of the wanted one (same height and width)."""

    rows: Span
    cols: Span
    at: tuple[int, int]


def letters(model: ModelConfig) -> dict[str, int]:
    """Sizes named in the tables' shapes; ``n*d`` and ``g*d`` are the widths of the projections."""
    h, f, v = model.hidden_size, model.ffn_hidden_size, model.vocab_size
    n, g, d = model.num_attention_heads, model.num_query_groups, model.kv_channels
    assert h and f and v and n and g and d, "resolve_model first"
    return {"h": h, "f": f, "v": v, "n": n, "g": g, "d": d, "n*d": n * d, "g*d": g * d}


def hf_shapes(entry: Entry, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face tensors of an entry and their shapes."""
    size = letters(model)
    return {name: tuple(size[x] for x in shape.split()) for name, shape in entry.hf.items()}


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """A shape as (rows, columns)."""
    return (shape[0], math.prod(shape[1:]))


def check_tensor_parallel(model: ModelConfig, tp_size: int) -> None:
    """Raises ConfigError where TP does not suit the heads, the key/value heads and the FFN width.

    More ranks than key/value heads are possible where each head's group is cut evenly: megatron-core then
    stores plain slices of the fused rows and gathers them for the product (``attention.py``).
    """
    problems = _misfits(model, tp_size)
    if problems:
        possible = [size for size in range(1, letters(model)["n"] + 1) if not _misfits(model, size)]
        raise ConfigError(
            f"parallel.tensor_model_parallel_size: {tp_size} {'; '.join(problems)}; "
            f"possible for this model: {', '.join(map(str, possible))}"
        )


def _misfits(model: ModelConfig, tp_size: int) -> list[str]:
    size = letters(model)
    problems = [
        f"does not divide {name} {size[letter]}"
        for letter, name in (("n", "num_attention_heads"), ("f", "ffn_hidden_size"))
        if size[letter] % tp_size
    ]
    if size["g"] % tp_size and tp_size % size["g"]:
        problems.append(f"neither divides num_query_groups {size['g']} nor is a multiple of it")
    if tp_size > size["g"] and (size["n*d"] + 2 * size["g*d"]) % tp_size:
        problems.append(f"does not divide the {size['n*d'] + 2 * size['g*d']} rows of query, key and value")
    return problems


def local_shape(entry: Entry, model: ModelConfig, tp_size: int) -> tuple[int, ...]:
    """Shape of the parameter on one rank of ``tp_size``."""
    shapes = list(hf_shapes(entry, model).values())
    first = shapes[0]
    if entry.kind is Kind.VOCABULARY:
        return (padded_vocab_size(model, tp_size) // tp_size, *first[1:])
    if entry.kind is Kind.COLUMNS:
        return (first[0], first[1] // tp_size)
    if entry.kind is Kind.DIRECT:
        return first
    return (sum(shape[0] for shape in shapes) // tp_size, *first[1:])


def pieces(entry: Entry, model: ModelConfig, tp_rank: int, tp_size: int) -> list[Piece]:
    """The rectangles that make up the parameter of one rank; what they leave free is padding (zeros).

    Over all ranks they tile each tensor exactly once (DIRECT: once per rank).
    Raises ConfigError where ``tp_size`` does not suit the model.
    """
    check_tensor_parallel(model, tp_size)
    shapes = {name: matrix(shape) for name, shape in hf_shapes(entry, model).items()}
    names = list(shapes)
    rows, width = shapes[names[0]]
    whole = (0, width)
    if entry.kind is Kind.DIRECT:
        return [Piece(names[0], (0, rows), whole, (0, 0))]
    if entry.kind is Kind.VOCABULARY:
        each = padded_vocab_size(model, tp_size) // tp_size
        start, stop = tp_rank * each, min((tp_rank + 1) * each, rows)
        return [Piece(names[0], (start, stop), whole, (0, 0))] if start < stop else []
    if entry.kind is Kind.COLUMNS:
        each = width // tp_size
        return [Piece(names[0], (0, rows), (tp_rank * each, (tp_rank + 1) * each), (0, 0))]
    if entry.kind is Kind.GATED_MLP:
        each = rows // tp_size
        span = (tp_rank * each, (tp_rank + 1) * each)
        return [Piece(name, span, whole, (index * each, 0)) for index, name in enumerate(names)]
    return _fused_qkv(names, model, tp_rank, tp_size, whole)


def _fused_qkv(names: list[str], model: ModelConfig, tp_rank: int, tp_size: int, cols: Span) -> list[Piece]:
    """Attention's rows, group by group (``merge_qkv_weights`` in Megatron-Bridge has the same order), and of
    them this rank's even share: whole groups, or with more ranks than groups a part of one."""
    size = letters(model)
    each = (size["n*d"] + 2 * size["g*d"]) // tp_size
    first, last = tp_rank * each, (tp_rank + 1) * each
    heads = (size["n"] // size["g"], 1, 1)  # query, key, value heads of one group
    per_group = sum(heads) * size["d"]
    found = []
    for group in range(first // per_group, -(-last // per_group)):
        at = group * per_group
        for name, count in zip(names, heads, strict=True):
            high = count * size["d"]
            start, stop = max(at, first), min(at + high, last)
            if start < stop:
                down = group * high - at
                found.append(Piece(name, (start + down, stop + down), cols, (start - first, 0)))
            at += high
    return found


def overlap(wanted: Piece, stored: Piece) -> Move | None:
    """What a stored piece can give to a wanted one; None where they have nothing in common."""
    if wanted.source != stored.source:
        return None
    rows = (max(wanted.rows[0], stored.rows[0]), min(wanted.rows[1], stored.rows[1]))
    cols = (max(wanted.cols[0], stored.cols[0]), min(wanted.cols[1], stored.cols[1]))
    if rows[0] >= rows[1] or cols[0] >= cols[1]:
        return None
    down, right = stored.at[0] - stored.rows[0], stored.at[1] - stored.cols[0]
    return Move(
        rows=(rows[0] + down, rows[1] + down),
        cols=(cols[0] + right, cols[1] + right),
        at=(
            wanted.at[0] + rows[0] - wanted.rows[0],
            wanted.at[1] + cols[0] - wanted.cols[0],
        ),
    )
