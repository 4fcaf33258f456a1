"""Rectangles of Megatron parameters that lie in files, turned into places of Hugging Face tensors.

A parameter is seen whole here, as one rank would hold it with TP = 1; what a rank of a larger TP, a chunk of a
distributed checkpoint or a range of rows holds of it is a rectangle of that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_syne.config.schema import ModelConfig
from megatron_syne.convert.formats.hf import listed
from megatron_syne.convert.numbers import ITEM_BYTES
from megatron_syne.convert.pieces import Entry, Piece, Span, matrix, pieces
from megatron_syne.convert.streams import Place, StoredWeights
from megatron_syne.convert.table import hf_tensors, table_of
from megatron_syne.errors import DataError


@dataclass(frozen=True)
class Block:
    """Rows x columns of a whole parameter, row after row from byte ``offset`` of ``file``."""

    file: str
    offset: int
    dtype: str
    rows: Span
    cols: Span
    name: str
    """Of the stored tensor."""


def block_places(entry: Entry, model: ModelConfig, block: Block) -> Iterator[Place]:
    """Where the Hugging Face rectangles of a block lie; what it holds of padding is left out."""
    width = block.cols[1] - block.cols[0]
    for piece in pieces(entry, model, 0, 1):
        high, wide = piece.rows[1] - piece.rows[0], piece.cols[1] - piece.cols[0]
        top, bottom = max(piece.at[0], block.rows[0]), min(piece.at[0] + high, block.rows[1])
        left, right = max(piece.at[1], block.cols[0]), min(piece.at[1] + wide, block.cols[1])
        if top >= bottom or left >= right:
            continue
        down, across = piece.rows[0] - piece.at[0], piece.cols[0] - piece.at[1]
        part = Piece(
            piece.source,
            (top + down, bottom + down),
            (left + across, right + across),
            (top - block.rows[0], left - block.cols[0]),
        )
        yield Place(block.file, block.offset, width, block.dtype, part, entry.shift, block.name)


def coverage_problem(places: Iterable[Place], shape: tuple[int, ...]) -> str | None:
    """What is wrong with the places of a tensor, if they do not hold each element exactly once."""
    rows, columns = matrix(shape)
    rectangles = [(place.piece.rows, place.piece.cols) for place in places]
    row_edges = sorted({0, rows, *(edge for span, _ in rectangles for edge in span)})
    col_edges = sorted({0, columns, *(edge for _, span in rectangles for edge in span)})
    if len(row_edges) * len(col_edges) > _MOST_CELLS:
        return f" is cut into {len(rectangles)} parts, which no layout does"
    row_at, col_at = ({edge: i for i, edge in enumerate(edges)} for edges in (row_edges, col_edges))
    times = np.zeros((len(row_edges) - 1, len(col_edges) - 1), np.int32)
    for (top, bottom), (left, right) in rectangles:
        times[row_at[top] : row_at[bottom], col_at[left] : col_at[right]] += 1
    for wrong, what in ((times == 0, "not stored"), (times > 1, "stored more than once")):
        if wrong.any():
            i, j = (int(index) for index in np.argwhere(wrong)[0])
            return f"[{row_edges[i]}:{row_edges[i + 1]}, {col_edges[j]}:{col_edges[j + 1]}] is {what}"
    return None


def file_overlaps(slices: Iterable[tuple[str, int, int, str]]) -> list[str]:
    """Problems where two of (file, offset, length, name) share bytes of a file."""
    problems = []
    last: tuple[str, int, str] = ("", 0, "")
    for file, offset, length, name in sorted(slices):
        if file == last[0] and offset < last[1]:
            problems.append(f"{name} and {last[2]} share bytes of {file}")
        last = max(last, (file, offset + length, name)) if file == last[0] else (file, offset + length, name)
    return problems


def check_whole(
    folder: Path, model: ModelConfig, places: Mapping[str, list[Place]], problems: Iterable[str] = ()
) -> None:
    """Raises DataError that lists the tensors which are not there once and whole, and other problems."""
    found = list(problems)
    for name, shape in hf_tensors(model).items():
        problem = coverage_problem(places[name], shape)
        found += [f"{name}{problem}"] if problem else []
        if len({place.dtype for place in places[name]}) > 1:
            found.append(f"{name}: its parts differ in format")
    if found:
        raise DataError(listed(f"{folder}: what is stored does not make up the tensors", found))


def stored_dtypes(
    model: ModelConfig, places: Mapping[str, list[Place]], stated: Mapping[str, str]
) -> dict[str, str]:
    """Format of every Hugging Face tensor: the one it is stored in. One that is shifted may be kept in fp32 for
    the shift's sake: it has the format ``stated``, or else the embedding's."""
    (embedding,) = table_of(model).embedding.hf
    found = {name: places[name][0].dtype for name in hf_tensors(model)}
    for name, dtype in found.items():
        if places[name][0].shift and dtype == "F32":
            found[name] = stated.get(name, places[embedding][0].dtype)
    return found


def check_replicas(weights: StoredWeights) -> None:
    """Raises DataError that lists where what should be the same again is not: norms of the TP ranks, the output
    layer of a tied model. To take one of them then would be to lose the other."""
    problems = []
    for name, again in weights.replicas.items():
        dtype = weights.dtypes[name]
        for place in again:
            (first, last), cols = place.piece.rows, place.piece.cols
            row_bytes = (cols[1] - cols[0]) * ITEM_BYTES[dtype]
            step = max(1, _TILE_BYTES // row_bytes)
            for top in range(first, last, step):
                rows = (top, min(top + step, last))
                both = np.empty((2, rows[1] - rows[0], row_bytes), np.uint8)
                wanted = Piece(name, rows, cols, (0, 0))
                weights.fill(weights.places[name], wanted, both[0], dtype)
                weights.fill([place], wanted, both[1], dtype)
                if not np.array_equal(both[0], both[1]):
                    problems.append(f"{name}: {place.parameter} in {place.file} is not the same as the first")
                    break
    if problems:
        raise DataError(listed(f"{weights.folder}: copies of one tensor differ", problems))


_TILE_BYTES = 4 * 2**20
_MOST_CELLS = 2**24
