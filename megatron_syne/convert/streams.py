"""The two ends of every conversion: weights to read from, and places to write to.

Everything is said in Hugging Face tensors, seen as matrices (``pieces.matrix``). A format only says where the
rectangles of those tensors lie in its files; so reading for training, conversion in either direction, from one
layout to another and surgery are all the same act, and a new format needs no second one to know of it.

Bytes are numpy arrays of ``uint8`` throughout: nothing here, nor in what moves the bytes, needs torch, whose
import alone takes as long as copying two gigabytes.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_syne.config.schema import ModelConfig
from megatron_syne.convert.files import read_exactly
from megatron_syne.convert.hub import hub_origin
from megatron_syne.convert.numbers import ITEM_BYTES, convert
from megatron_syne.convert.pieces import Piece, Span, matrix, overlap
from megatron_syne.errors import DataError

Bytes = npt.NDArray[np.uint8]
"""A matrix of bytes: rows of the tensor, each ``columns * item size`` long."""


@dataclass(frozen=True)
class Place:
    """A rectangle of a Hugging Face tensor inside a file.

    ``piece.at`` is its (row, column) in a row-major matrix of ``columns`` columns of ``dtype`` whose first
    element stands at byte ``offset`` of ``file`` (relative to the folder, with ``/``).
    """

    file: str
    offset: int
    columns: int
    dtype: str
    """As safetensors names it: ``BF16``, ``F16``, ``F32``."""
    piece: Piece
    shift: float = 0.0
    """Stored value less the Hugging Face tensor's (``Entry.shift``)."""
    parameter: str = ""
    """The stored tensor's own name, for messages and the certificate."""

    def rows_at(self, rows: Span) -> tuple[int, int]:
        """(first byte, row stride in bytes) of tensor rows that lie in the piece, at its left edge."""
        item = ITEM_BYTES[self.dtype]
        down = self.piece.at[0] + rows[0] - self.piece.rows[0]
        return self.offset + (down * self.columns + self.piece.at[1]) * item, self.columns * item


class Weights(ABC):
    """Weights that can be read, tensor by tensor and row by row. Safe to read from several threads."""

    model: ModelConfig
    """The resolved model; ``hf_tensors(model)`` names the tensors."""
    config: dict[str, Any]
    """Contents of the ``config.json`` that describes them (what a copy's own starts from)."""
    artifacts_dir: Path | None
    """Folder with tokenizer, generation config, licence; None where there is none."""
    dtypes: dict[str, str]
    """Format of every Hugging Face tensor, by its name (safetensors' names), in the model's order."""
    shapes: dict[str, tuple[int, ...]]
    """Its shape, likewise."""

    @abstractmethod
    def read(self, name: str, rows: Span, out: Bytes) -> None:
        """Fill ``out`` (rows x row bytes, contiguous) with rows of a tensor in its format.

        Raises DataError where the files no longer hold them.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What stands of these weights under ``source`` in a certificate (the kind, names, parameters of an
        operation, the certificates behind it); JSON values, no absolute paths."""

    def files(self) -> dict[str, Path]:
        """Weight files to be hashed as the source, by the name that they get in the certificate."""
        return {}

    def folders(self) -> list[Path]:
        """Folders that they are read from, into which nothing may be written."""
        return sorted({path.parent for path in self.files().values()})

    def identity(self) -> str:
        """Text that changes whenever the source's files do: their names, sizes and times of change."""
        lines = [f"{type(self).__name__} {self.describe()}"]
        for name, path in sorted(self.files().items()):
            status = path.stat()
            lines.append(f"{name} {status.st_size} {status.st_mtime_ns}")
        return "\n".join(lines)

    def close(self) -> None:  # noqa: B027 (weights that hold no file have nothing to do)
        """Close files; nothing can be read afterwards."""

    def row_bytes(self, name: str) -> int:
        """Bytes of one row of a tensor, seen as a matrix."""
        return matrix(self.shapes[name])[1] * ITEM_BYTES[self.dtypes[name]]


@dataclass
class StoredWeights(Weights):
    """Weights that lie in files, at :class:`Place` s."""

    kind: str
    """``hf``, ``shards``, ``torch_dist``, ``megatron_pt``."""
    folder: Path
    model: ModelConfig
    config: dict[str, Any]
    artifacts_dir: Path | None
    dtypes: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    places: dict[str, list[Place]]
    """Of every tensor the places that make it up, each element once."""
    replicas: dict[str, list[Place]] = field(default_factory=dict)
    """Further places that hold the same again (norms of other TP ranks, the copy of a tied embedding)."""
    descriptors: dict[str, int] = field(default_factory=dict)
    """Open files by their relative names, opened through ``files.open_inside``."""
    ignored: list[str] = field(default_factory=list)
    """Tensors in the files that are left out: buffers, optimizer state, the copy of a tied embedding."""
    layout: Any = None
    """How shards are cut (``formats.shards.Layout``); None for other kinds."""
    certificate: dict[str, Any] | None = None
    """``certificate.json`` of the folder, where it has one."""

    def read(self, name: str, rows: Span, out: Bytes) -> None:
        """See :class:`Weights`."""
        width = matrix(self.shapes[name])[1]
        self.fill(self.places[name], Piece(name, rows, (0, width), (0, 0)), out, self.dtypes[name])

    def fill(self, places: Iterable[Place], wanted: Piece, out: Bytes, dtype: str) -> None:
        """Copy a rectangle of a tensor out of ``places`` to (row, column) ``wanted.at`` of ``out``, a matrix of
        bytes in ``dtype``; converted where it is stored otherwise. DataError where it is not all there."""
        item = ITEM_BYTES[dtype]
        missing = (wanted.rows[1] - wanted.rows[0]) * (wanted.cols[1] - wanted.cols[0])
        for place in places:
            move = overlap(wanted, place.piece)
            if move is None:
                continue
            high, wide = move.rows[1] - move.rows[0], move.cols[1] - move.cols[0]
            down, right = move.at
            target = out[down : down + high, right * item : (right + wide) * item]
            self._copy(place, move.rows, move.cols, target, dtype)
            missing -= high * wide
        if missing:
            raise DataError(
                f"{self.folder}: {wanted.source}: {missing} elements of rows {wanted.rows} are not stored"
            )

    def _copy(self, place: Place, rows: Span, cols: Span, target: Bytes, dtype: str) -> None:
        """Rows and columns of the *stored* matrix into ``target``, a part of rows of the tensor."""
        item = ITEM_BYTES[place.dtype]
        stride, segment = place.columns * item, (cols[1] - cols[0]) * item
        start = place.offset + rows[0] * stride + cols[0] * item
        high = rows[1] - rows[0]
        where = f"{self.folder / place.file}: {place.parameter}"
        descriptor = self.descriptors[place.file]
        plain = place.dtype == dtype and not place.shift
        if plain and segment == stride and target.flags.c_contiguous:
            read_exactly(descriptor, _view(target.reshape(-1)), start, where)
            return
        # whole stored rows at a time: narrow columns of a wide matrix are read with what lies between them
        step = max(1, min(high, _BLOCK_BYTES // stride))
        block = np.empty((step, stride), np.uint8)
        for first in range(0, high, step):
            count = min(step, high - first)
            at = start + first * stride
            size = (count - 1) * stride + segment  # not beyond the last element: the file may end there
            flat = block.reshape(-1)[:size]
            read_exactly(descriptor, _view(flat), at, where)
            part = np.lib.stride_tricks.as_strided(flat, (count, segment), (stride, 1))
            if plain:
                target[first : first + count] = part
            else:
                target[first : first + count] = convert(part, place.dtype, dtype, -place.shift, where)

    def describe(self) -> dict[str, Any]:
        """See :class:`Weights`."""
        found: dict[str, Any] = {"kind": self.kind, "folder": self.folder.resolve().name}
        if self.layout is not None:
            found["layout"] = self.layout.describe()
        origin = hub_origin(self.folder)
        if origin is not None:
            found["hub"] = origin
        if self.certificate is not None:
            found["certificate"] = self.certificate["source"]
        return found

    def files(self) -> dict[str, Path]:
        """See :class:`Weights`."""
        return {name: self.folder / name for name in sorted(self.descriptors)}

    def folders(self) -> list[Path]:
        """See :class:`Weights`."""
        return [self.folder]

    def close(self) -> None:
        """See :class:`Weights`."""
        for descriptor in self.descriptors.values():
            os.close(descriptor)
        self.descriptors.clear()


_BLOCK_BYTES = 4 * 2**20


def _view(flat: Bytes) -> memoryview:
    return memoryview(flat)  # type: ignore[arg-type]


@dataclass
class TargetFile:
    """A file to be written: everything in it but the weights. What neither ``fixed`` nor a place covers is
    zero (padding)."""

    path: str
    """Relative to the folder, with ``/``."""
    size: int
    fixed: list[tuple[int, bytes]]
    """(byte offset, bytes): headers and the like."""


@dataclass
class Target:
    """Where weights are to be written, in full and before the first byte."""

    kind: str
    model: ModelConfig
    dtypes: dict[str, str]
    """Format that each Hugging Face tensor has for a reader of the target."""
    files: list[TargetFile]
    places: dict[str, list[Place]]
    """Every place of every tensor, replicas too."""
    documents: Mapping[str, bytes]
    """Small files, complete: configuration, tokenizer, manifest, index (by relative path)."""
    layout: dict[str, Any] = field(default_factory=dict)
    """For the certificate: how it is cut."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files) + sum(map(len, self.documents.values()))
