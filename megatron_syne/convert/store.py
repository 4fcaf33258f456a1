"""Any rectangle of the Hugging Face tensors, out of whatever layout they are stored in.

A stored layout is a list of :class:`Stored` pieces. A Hugging Face folder is the plainest one (each tensor
one piece); TP/PP shards are another. Reading for training, resharding and export are all the same act: find
what the wanted rectangle and the stored ones have in common, and copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from megatron_syne.convert.pieces import Piece, Span, overlap
from megatron_syne.convert.safetensors_io import DTYPES, TensorFile, TensorInfo
from megatron_syne.errors import DataError


@dataclass(frozen=True)
class Stored:
    """A piece of a Hugging Face tensor that lies in tensor ``name`` of ``file``."""

    file: TensorFile
    name: str
    piece: Piece

    @property
    def info(self) -> TensorInfo:
        """Header entry of the tensor that holds the piece."""
        return self.file.tensors[self.name]


class Store:
    """Stored pieces by Hugging Face tensor. They must not overlap (of replicas, hand in one)."""

    def __init__(self, stored: Iterable[Stored]) -> None:
        self._by_tensor: dict[str, list[Stored]] = {}
        for item in stored:
            self._by_tensor.setdefault(item.piece.source, []).append(item)

    def dtype(self, tensor: str) -> torch.dtype:
        """Format in which a Hugging Face tensor is stored."""
        return DTYPES[self._by_tensor[tensor][0].info.dtype]

    def fill(self, out: torch.Tensor, pieces: Iterable[Piece]) -> None:
        """Copy the pieces to their places in the matrix ``out``. DataError where they are not all stored."""
        for piece in pieces:
            missing = _area(piece.rows, piece.cols)
            for stored in self._by_tensor.get(piece.source, ()):
                move = overlap(piece, stored.piece)
                if move is None:
                    continue
                height, width = move.rows[1] - move.rows[0], move.cols[1] - move.cols[0]
                down, right = move.at
                target = out[down : down + height, right : right + width]
                stored.file.read_into(target, stored.name, move.rows, move.cols)
                missing -= height * width
            if missing:
                raise DataError(f"{piece.source}: {missing} elements of the part asked for are not stored")

    def read(self, shape: tuple[int, ...], pieces: list[Piece], dtype: torch.dtype) -> torch.Tensor:
        """A new tensor made of the pieces; what they leave free is zero."""
        out = torch.zeros(shape, dtype=dtype)
        self.fill(out.view(shape[0], math.prod(shape[1:])), pieces)
        return out

    def files(self) -> list[TensorFile]:
        """The files behind the pieces, each once."""
        return list({id(s.file): s.file for items in self._by_tensor.values() for s in items}.values())


def _area(rows: Span, cols: Span) -> int:
    return (rows[1] - rows[0]) * (cols[1] - cols[0])
