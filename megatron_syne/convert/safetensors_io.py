"""The safetensors format: a strict reader of rectangles and a writer that streams.

A file is 8 bytes (little-endian length of the header), the header (JSON: name -> dtype, shape, data_offsets),
then the tensors' bytes without gaps. Read here with ``pread`` in place of the library's memory map: a file
that shrinks while it is read gives an error and not a bus error, memory stays at what is asked for, and the
descriptor that was checked is the one that is read. Tests hold both ways to the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_syne.convert.files import BLOCK_BYTES, open_inside, read_exactly
from megatron_syne.convert.pieces import Span, matrix
from megatron_syne.errors import DataError
from megatron_syne.models.json_file import parse_json

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Bits of every format that may stand in a header. Only those of DTYPES can be weights here, but a file may
# hold others beside them (old buffers), and its layout is checked whole.
_BITS = {"F4": 4, "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32} | {
    "U32": 32,
    "F32": 32,
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "C64": 64,
}
_HEADER_LIMIT = 50_000_000
_DIRECT_READ_BYTES = 4096  # a row segment at least this long is read by itself, below it the whole rows


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: format, shape, and where its bytes lie (from the start of the file)."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """An open safetensors file whose header has been checked. Raises what :func:`open_inside` raises, and
    DataError for a header that is malformed or does not fit the file."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.path = folder.joinpath(*names)
        self.descriptor = open_inside(folder, *names)
        try:
            self.size = os.fstat(self.descriptor).st_size
            self.header, self.tensors = _read_header(self.descriptor, self.size, str(self.path))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; the object is of no use afterwards."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __del__(self) -> None:
        if getattr(self, "descriptor", -1) >= 0:
            self.close()

    def read_into(self, out: torch.Tensor, name: str, rows: Span, cols: Span) -> None:
        """Fill the matrix ``out`` with a rectangle of a tensor. Reads no more than a page around each row."""
        info = self.tensors[name]
        _, width = matrix(info.shape)
        item = out.element_size()
        (top, bottom), (left, right) = rows, cols
        if (left, right) == (0, width) and out.is_contiguous():
            read_exactly(self.descriptor, _bytes(out), info.start + top * width * item, str(self.path))
            return
        segment = right - left
        if segment * item >= _DIRECT_READ_BYTES:
            band = torch.empty((_rows_per_block(segment * item, bottom - top), segment), dtype=out.dtype)
            view, line = _bytes(band), segment * item
            for start in range(top, bottom, len(band)):
                stop = min(start + len(band), bottom)
                for row in range(start, stop):
                    at = info.start + (row * width + left) * item
                    part = view[(row - start) * line : (row - start + 1) * line]
                    read_exactly(self.descriptor, part, at, str(self.path))
                out[start - top : stop - top] = band[: stop - start]
            return
        band = torch.empty((_rows_per_block(width * item, bottom - top), width), dtype=out.dtype)
        for start in range(top, bottom, len(band)):
            stop = min(start + len(band), bottom)
            block = band[: stop - start]
            read_exactly(self.descriptor, _bytes(block), info.start + start * width * item, str(self.path))
            out[start - top : stop - top] = block[:, left:right]

    def hash(self, progress: Callable[[int], None]) -> tuple[str, dict[str, str]]:
        """SHA-256 of the file and of each tensor's bytes, in one pass; ``progress`` gets bytes read."""
        whole = hashlib.sha256()
        spans = [("", 0, self.size - sum(t.stop - t.start for t in self.tensors.values()))]
        spans += [(n, t.start, t.stop) for n, t in self.tensors.items()]
        found = {}
        block = bytearray(BLOCK_BYTES)
        for name, start, stop in sorted(spans, key=lambda span: (span[1], span[2])):
            digest = hashlib.sha256()
            for at in range(start, stop, BLOCK_BYTES):
                view = memoryview(block)[: min(BLOCK_BYTES, stop - at)]
                read_exactly(self.descriptor, view, at, str(self.path))
                whole.update(view)
                digest.update(view)
                progress(len(view))
            if name:
                found[name] = digest.hexdigest()
        return whole.hexdigest(), found


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: what must be known before its bytes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorWriter:
    """Writes one safetensors file tensor by tensor, in the order of ``specs``; hashes as it writes."""

    def __init__(self, path: Path, specs: list[TensorSpec], metadata: Mapping[str, str]) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        offset = 0
        for spec in specs:
            header[spec.name] = {
                "dtype": NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.size_bytes],
            }
            offset += spec.size_bytes
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)  # the data starts on a multiple of 8, as the library has it
        self.hashes: dict[str, str] = {}
        self._waiting = list(reversed(specs))
        self._digest = hashlib.sha256()
        self._stream = path.open("xb", buffering=0)
        self._put(memoryview(len(raw).to_bytes(8, "little") + raw))

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append the next tensor."""
        spec = self._waiting.pop()
        assert (name, tensor.dtype, tuple(tensor.shape)) == (spec.name, spec.dtype, spec.shape), (
            f"{name} {tensor.dtype} {tuple(tensor.shape)} written where {spec} was announced"
        )
        digest = hashlib.sha256()
        view = _bytes(tensor.detach().cpu().contiguous())
        for at in range(0, len(view), BLOCK_BYTES):
            digest.update(view[at : at + BLOCK_BYTES])
            self._put(view[at : at + BLOCK_BYTES])
        self.hashes[name] = digest.hexdigest()

    def finish(self) -> str:
        """Bring the file to the disk; its SHA-256."""
        assert not self._waiting, f"never written: {[spec.name for spec in self._waiting]}"
        os.fsync(self._stream.fileno())
        self.close()
        return self._digest.hexdigest()

    def close(self) -> None:
        """Close the file; without :meth:`finish` it is incomplete."""
        self._stream.close()

    def _put(self, view: memoryview) -> None:
        self._digest.update(view)
        while len(view):
            view = view[self._stream.write(view) :]


def tensor_sha256(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes, as they stand in a file."""
    return hashlib.sha256(_bytes(tensor.contiguous())).hexdigest()


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _rows_per_block(row_bytes: int, rows: int) -> int:
    return max(1, min(rows, BLOCK_BYTES // max(1, row_bytes)))


def _read_header(descriptor: int, size: int, where: str) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """Metadata and tensors of a file, with every length and offset checked against its size."""
    if size < 8:
        raise DataError(f"{where}: truncated: {size} bytes, shorter than a safetensors file can be")
    raw = bytearray(8)
    read_exactly(descriptor, memoryview(raw), 0, where)
    length = int.from_bytes(raw, "little")
    if length > _HEADER_LIMIT:
        raise DataError(f"{where}: not a safetensors file: it claims a header of {length} bytes")
    if 8 + length > size:
        raise DataError(f"{where}: truncated: header of {length} bytes in a file of {size}")
    raw = bytearray(length)
    read_exactly(descriptor, memoryview(raw), 8, where)
    header = parse_json(bytes(raw), f"{where}: header")
    metadata = header.pop("__metadata__", {})
    tensors = {name: _read_info(name, entry, 8 + length, where) for name, entry in header.items()}
    at = 8 + length
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != at:
            what = "overlaps the tensor before it" if info.start < at else "leaves a gap before it"
            raise DataError(f"{where}: tensor {name}: starts at byte {info.start}, {what} (ends at {at})")
        at = info.stop
    if at > size:
        raise DataError(
            f"{where}: truncated: its header needs {at} bytes, the file has {size}; copy it again"
        )
    if at < size:
        raise DataError(f"{where}: {size - at} bytes follow the last tensor; the file is damaged")
    return metadata, tensors


def _read_info(name: str, entry: Any, data_start: int, where: str) -> TensorInfo:
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, stop]
        good = all(type(x) is int and 0 <= x < 2**63 for x in numbers) and dtype in _BITS
        good = good and set(entry) == {"dtype", "shape", "data_offsets"}
    except (TypeError, KeyError, ValueError):
        good = False
    if not good:
        raise DataError(f"{where}: tensor {name}: malformed header entry")
    bits = math.prod(shape) * _BITS[dtype]
    if bits % 8 or stop - start != bits // 8:
        raise DataError(
            f"{where}: tensor {name}: {dtype} {shape} takes {bits / 8:g} bytes, "
            f"its offsets span {stop - start}"
        )
    return TensorInfo(dtype, tuple(shape), data_start + start, data_start + stop)
