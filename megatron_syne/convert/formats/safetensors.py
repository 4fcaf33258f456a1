"""The safetensors format: a strict reader of headers and a builder of them. No torch, no safetensors library.

A file is 8 bytes (little-endian length of the header), the header (JSON: name -> dtype, shape, data_offsets),
then the tensors' bytes without gaps. Read here with ``pread`` in place of the library's memory map: a file
that shrinks while it is read gives an error and not a bus error, memory stays at what is asked for, and the
descriptor that was checked is the one that is read. Tests hold both ways to the same bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_syne.convert.files import read_exactly
from megatron_syne.convert.numbers import ITEM_BYTES
from megatron_syne.errors import DataError
from megatron_syne.models.json_file import parse_json

# Bits of every format that may stand in a header. Only those of ITEM_BYTES can be weights here, but a file may
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


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: format, shape, and where its bytes lie (from the start of the file)."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: what must be known before its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def read_header(descriptor: int, where: str) -> dict[str, TensorInfo]:
    """Tensors of an open file, with every length and offset checked against its size.

    Raises DataError for a header that is malformed or does not fit the file; ``where`` names the file.
    """
    size = os.fstat(descriptor).st_size
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
    header.pop("__metadata__", None)
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
    return tensors


def build_header(
    specs: Iterable[TensorSpec], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, TensorInfo], int]:
    """First bytes of a file with these tensors in this order, where each will lie, and the file's size."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    specs, offset = list(specs), 0
    for spec in specs:
        stop = offset + spec.size_bytes
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, stop]}
        offset = stop
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # the data starts on a multiple of 8, as the library has it
    start = 8 + len(raw)
    infos = {}
    for spec in specs:
        first, stop = header[spec.name]["data_offsets"]
        infos[spec.name] = TensorInfo(spec.dtype, spec.shape, start + first, start + stop)
    return len(raw).to_bytes(8, "little") + raw, infos, start + offset


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
