"""torch's zip files: where the numbers of a tensor lie in one, and the bytes round them when one is written.

``torch.save`` writes a zip of uncompressed records: ``<name>/data.pkl`` (a pickle that describes the object),
``<name>/data/0`` and so on (the numbers of its tensors), ``byteorder``, ``version``. A ``.distcp`` file of a
distributed checkpoint is a row of such zips, one for each chunk of a tensor. No torch.
"""

from __future__ import annotations

import itertools
import math
import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from megatron_syne.convert.files import read_exactly
from megatron_syne.convert.formats.dcp_pickle import Call, Global, Persistent, write_pickle
from megatron_syne.convert.formats.pickles import TENSOR_NAMES, Tensor, read_pickle
from megatron_syne.convert.numbers import ITEM_BYTES
from megatron_syne.errors import DataError, SyneError

ALIGNMENT = 64
"""The first byte of a tensor's numbers is a multiple of this, counted from the zip's start (torch's rule)."""

_STORAGES = {"BF16": "BFloat16Storage", "F16": "HalfStorage", "F32": "FloatStorage"}
_DTYPES = {f"torch.{name}": dtype for dtype, name in _STORAGES.items()}

_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")
_LOCATOR64 = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_BIG = 0xFFFFFFFF
_HEAD_BYTES, _TAIL_BYTES = 1024, 2048
_DIRECTORY_LIMIT_BYTES = 256 * 2**20
_PICKLE_LIMIT_BYTES = 2**20
_UTF8 = 0x0800
_JANUARY_1980 = 0x0021


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's numbers, row after row, from byte ``offset`` of a file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


class Archive:
    """One zip, the ``length`` bytes of an open file from ``start``. Raises DataError where it is none of torch's.

    ``where`` names it in messages. Records are looked up by their names without the first folder.
    """

    def __init__(self, descriptor: int, start: int, length: int, where: str) -> None:
        self.descriptor, self.start, self.length, self.where = descriptor, start, length, where
        self._head = self._read(0, min(length, _HEAD_BYTES))
        self._tail_at = max(0, length - _TAIL_BYTES)
        self._tail = self._read(self._tail_at, length - self._tail_at)
        self._records = self._directory()

    def locate(self, name: str) -> tuple[int, int]:
        """(first byte in the file, size) of a record."""
        if name not in self._records:
            raise self._bad(f"has no record {name}")
        path, header, size, limit = self._records[name]
        fields = _LOCAL.unpack(self._bytes(header, _LOCAL.size))
        name_size, extra_size = fields[9], fields[10]
        same = self._bytes(header + _LOCAL.size, name_size) == path
        if fields[0] != b"PK\3\4" or fields[3] != 0 or not same:
            raise self._bad(f"record {name}: its two headers disagree")
        first = header + _LOCAL.size + name_size + extra_size
        if first + size > limit:
            raise self._bad(f"record {name}: {size} bytes from {first} run into what follows at {limit}")
        return self.start + first, size

    def read(self, name: str, limit_bytes: int = _PICKLE_LIMIT_BYTES) -> bytes:
        """A small record."""
        first, size = self.locate(name)
        if size > limit_bytes:
            raise self._bad(f"record {name} has {size} bytes; at most {limit_bytes} are expected")
        return self._bytes(first - self.start, size)

    def __contains__(self, name: str) -> bool:
        return name in self._records

    def check_byte_order(self) -> None:
        """Numbers are read as they lie: little-endian."""
        if "byteorder" in self and self.read("byteorder") != b"little":
            raise self._bad(f"byte order {self.read('byteorder')[:20]!r} is not supported; supported: little")

    def _directory(self) -> dict[str, tuple[bytes, int, int, int]]:
        """Record to (full name, offset of its header, size, offset of what lies behind it)."""
        at, size, count = self._find_directory()
        content = self._bytes(at, size)
        found: dict[str, tuple[bytes, int, int]] = {}
        position = 0
        for _ in range(count):
            if position + _CENTRAL.size > size:
                raise self._bad("its directory ends early")
            fields = _CENTRAL.unpack_from(content, position)
            flags, method, packed, plain = fields[3], fields[4], fields[8], fields[9]
            name_size, extra_size, comment_size, header = *fields[10:13], fields[16]
            position += _CENTRAL.size
            path = content[position : position + name_size]
            extra = content[position + name_size : position + name_size + extra_size]
            position += name_size + extra_size + comment_size
            packed, plain, header = self._extended([packed, plain, header], extra)
            if fields[0] != b"PK\1\2" or position > size:
                raise self._bad("its directory is damaged")
            if method != 0 or flags & 1 or packed != plain:
                raise self._bad(f"record {path[:80]!r} is compressed or encrypted, which torch never does")
            name = path.partition(b"/")[2].decode("utf-8", "replace")
            if not name or name in found:
                raise self._bad(f"record {path[:80]!r}: unexpected or there twice")
            found[name] = (path, header, plain)
        folders = {path.partition(b"/")[0] for path, _, _ in found.values()}
        if len(folders) != 1:
            raise self._bad("its records are not in one folder")
        ends = sorted([header for _, header, _ in found.values()] + [at])
        following = dict(itertools.pairwise(ends))
        if len(following) != count or ends[-1] != at:
            raise self._bad("its records overlap")
        return {name: (path, head, plain, following[head]) for name, (path, head, plain) in found.items()}

    def _find_directory(self) -> tuple[int, int, int]:
        """(offset, bytes, records) of the central directory, from the end record, which is the last thing."""
        if self._head[:4] != b"PK\3\4" or self._tail[-_END.size :][:4] != b"PK\5\6":
            raise self._bad("does not begin and end as a zip file of torch's does; is it cut short?")
        end = len(self._tail) - _END.size
        _, _, _, _, count, size, at, _ = _END.unpack_from(self._tail, end)
        locator = end - _LOCATOR64.size
        last = self._tail_at + end
        if locator >= 0 and self._tail[locator : locator + 4] == b"PK\6\7":
            _, _, at64, _ = _LOCATOR64.unpack_from(self._tail, locator)
            fields = _END64.unpack(self._bytes(at64, _END64.size))
            if fields[0] != b"PK\6\6":
                raise self._bad("its end record is damaged")
            count, size, at, last = fields[7], fields[8], fields[9], at64
        if at + size > last or size > _DIRECTORY_LIMIT_BYTES or count * _CENTRAL.size > size:
            raise self._bad("its end record is damaged")
        return at, size, count

    def _extended(self, values: list[int], extra: bytes) -> list[int]:
        """Numbers past 4 GiB, which stand in an extra field, in the order of those that do not fit."""
        if _BIG not in values:
            return values
        position = 0
        while position + 4 <= len(extra):
            kind, size = struct.unpack_from("<HH", extra, position)
            if kind == 1:
                stream = iter(struct.iter_unpack("<Q", extra[position + 4 : position + 4 + size // 8 * 8]))
                try:
                    return [next(stream)[0] if value == _BIG else value for value in values]
                except StopIteration:
                    break
            position += 4 + size
        raise self._bad("a size above 4 GiB is missing from its directory")

    def _bytes(self, at: int, size: int) -> bytes:
        """Bytes of the zip, from what has been read already where possible."""
        if at < 0 or at + size > self.length:
            raise self._bad(f"refers to bytes {at} to {at + size}, but has {self.length}")
        if at + size <= len(self._head):
            return self._head[at : at + size]
        if at >= self._tail_at:
            return self._tail[at - self._tail_at :][:size]
        return self._read(at, size)

    def _read(self, at: int, size: int) -> bytes:
        block = bytearray(size)
        read_exactly(self.descriptor, memoryview(block), self.start + at, self.where)
        return bytes(block)

    def _bad(self, what: str) -> DataError:
        return DataError(f"{self.where}: {what}")


def find_tensor(archive: Archive, tensor: Tensor, where: str) -> StoredTensor:
    """Where the numbers of a tensor lie in the file. Raises DataError where they are not one block of bf16,
    fp16 or fp32 numbers, all there."""
    dtype = _DTYPES.get(tensor.storage.kind)
    if dtype is None:
        raise DataError(
            f"{where}: numbers of {tensor.storage.kind} are not supported; supported: bf16, fp16, fp32"
        )
    steps = contiguous(tensor.shape)
    if any(
        size > 1 and step != own for size, step, own in zip(tensor.shape, tensor.stride, steps, strict=True)
    ):
        raise DataError(
            f"{where}: shape {list(tensor.shape)} with strides {list(tensor.stride)} is not contiguous"
        )
    offset, size = archive.locate(f"data/{tensor.storage.key}")
    last = tensor.offset + math.prod(tensor.shape)
    if last > tensor.storage.numel or tensor.storage.numel * ITEM_BYTES[dtype] > size:
        raise DataError(
            f"{where}: {last} numbers are needed, record data/{tensor.storage.key} has {size} bytes"
        )
    return StoredTensor(dtype, tensor.shape, offset + tensor.offset * ITEM_BYTES[dtype])


def read_tensor_archive(descriptor: int, start: int, length: int, where: str) -> StoredTensor:
    """The one tensor in a zip (a chunk of a distributed checkpoint). Raises DataError, SecurityRefusal."""
    archive = Archive(descriptor, start, length, where)
    archive.check_byte_order()
    tensor = _read_tensor(archive.read("data.pkl"), where)
    return find_tensor(archive, tensor, where)


def _read_tensor(content: bytes, where: str) -> Tensor:
    try:
        tensor = _parse_tensor(content)
    except SyneError as error:
        raise type(error)(f"{where}: {error}") from None
    if not isinstance(tensor, Tensor):
        raise DataError(f"{where}: holds something other than a tensor")
    return tensor


@lru_cache(maxsize=512)
def _parse_tensor(content: bytes) -> Any:
    """Chunks of one shape have the same pickle, byte for byte."""
    return read_pickle(content, TENSOR_NAMES, "data.pkl")


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a tensor that lies row after row."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


@dataclass(frozen=True)
class PlannedArchive:
    """A zip to be written."""

    fixed: list[tuple[int, bytes]]
    """(offset, bytes): everything but the tensor's numbers."""
    data: int
    """Offset of the numbers; 0 where there are none."""
    size: int


def plan_tensor_archive(dtype: str, shape: tuple[int, ...]) -> PlannedArchive:
    """What ``torch.save`` writes for a tensor, with a hole for its numbers.

    Their CRC-32 is left at zero, since it is not known before they are: torch's reader does not check it
    (``torch.serialization.set_crc32_options(False)`` leaves it out for speed), other programs do.
    """
    numel = math.prod(shape)
    storage = Persistent(("storage", Global("torch", _STORAGES[dtype]), "0", "cpu", numel))
    hooks = Call(Global("collections", "OrderedDict"))
    rebuild = Global("torch._utils", "_rebuild_tensor_v2")
    described = write_pickle(Call(rebuild, (storage, 0, shape, contiguous(shape), False, hooks)))
    return _plan_zip(
        [("data.pkl", described), *_BYTE_ORDER, ("data/0", numel * ITEM_BYTES[dtype]), *_VERSION]
    )


def object_archive(value: Any) -> bytes:
    """What ``torch.save`` writes for a value without tensors (see :func:`dcp_pickle.write_pickle`)."""
    plan = _plan_zip([("data.pkl", write_pickle(value)), *_BYTE_ORDER, *_VERSION])
    return b"".join(content for _, content in plan.fixed)


_BYTE_ORDER = (("byteorder", b"little"),)
_VERSION = (("version", b"3\n"),)
_NEEDED_VERSION = 20


def _plan_zip(records: list[tuple[str, bytes | int]]) -> PlannedArchive:
    """Uncompressed records one after the other; a number stands for a hole of so many bytes."""
    fixed: list[tuple[int, bytes]] = []
    directory = b""
    at = data = 0
    for name, content in records:
        path = f"archive/{name}".encode()
        hole = isinstance(content, int)
        size = content if isinstance(content, int) else len(content)
        crc = 0 if isinstance(content, int) else zlib.crc32(content)
        # torch pads with an extra field of kind "FB", so that numbers can be mapped into memory
        room = -(at + _LOCAL.size + len(path) + 4) % ALIGNMENT if hole else 0
        extra = struct.pack("<2sH", b"FB", room) + b"Z" * room if hole else b""
        common = (_UTF8, 0, 0, _JANUARY_1980, crc, size, size, len(path), len(extra))
        header = _LOCAL.pack(b"PK\3\4", _NEEDED_VERSION, *common) + path + extra
        directory += (
            _CENTRAL.pack(b"PK\1\2", _NEEDED_VERSION, _NEEDED_VERSION, *common[:-1], 0, 0, 0, 0, 0, at) + path
        )
        fixed.append((at, header if isinstance(content, int) else header + content))
        at += len(header)
        if hole:
            data = at
        at += size
    end = _END.pack(b"PK\5\6", 0, 0, len(records), len(records), len(directory), at, 0)
    fixed.append((at, directory + end))
    return PlannedArchive(fixed, data, at + len(directory) + len(end))
