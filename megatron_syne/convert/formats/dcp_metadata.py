"""``.metadata`` of a distributed checkpoint: which tensors it holds, in which chunks, and where those lie.

A pickle of ``torch.distributed.checkpoint.metadata.Metadata``, read as plain data and written by hand. No torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_syne.convert.files import open_inside
from megatron_syne.convert.formats.dcp_pickle import Call, Global, Items, Object, write_pickle
from megatron_syne.convert.formats.pickles import METADATA_NAMES, Inert, read_pickle
from megatron_syne.convert.numbers import TORCH_NAMES
from megatron_syne.errors import DataError

METADATA = ".metadata"
_LIMIT_BYTES = 2**30
_DCP = "torch.distributed.checkpoint."
_DTYPES = {f"torch.{name}": dtype for dtype, name in TORCH_NAMES.items()}

Extent = tuple[int, ...]


@dataclass(frozen=True)
class Slice:
    """Bytes of a file: a zip of torch's that holds one chunk or object."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor."""

    offsets: Extent
    sizes: Extent
    slice: Slice


@dataclass
class DistributedTensor:
    """A tensor as the checkpoint describes it."""

    dtype: str
    """As safetensors names it; torch's own name where it is not one of ours."""
    shape: Extent
    chunks: list[Chunk]


@dataclass
class Metadata:
    """Contents of ``.metadata``."""

    tensors: dict[str, DistributedTensor] = field(default_factory=dict)
    objects: dict[str, Slice] = field(default_factory=dict)
    """Pickled values that are no tensors; never opened."""


def read_metadata(folder: Path) -> Metadata:
    """The metadata of a distributed checkpoint. Raises MissingInput, DataError, SecurityRefusal.

    Only what it says of itself is checked here: boxes within their tensors, a place for each. Names of files
    are as they stand; they are opened through ``files.open_inside`` alone.
    """
    where = str(folder / METADATA)
    with os.fdopen(open_inside(folder, METADATA), "rb") as stream:
        content = stream.read(_LIMIT_BYTES + 1)
    if len(content) > _LIMIT_BYTES:
        raise DataError(f"{where}: larger than {_LIMIT_BYTES} bytes, which no checkpoint's metadata is")
    raw = read_pickle(content, METADATA_NAMES, where)
    try:
        return _metadata(raw)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{where}: not the metadata of a distributed checkpoint ({type(error).__name__}: {str(error)[:200]})"
        ) from None


def write_metadata(metadata: Metadata) -> bytes:
    """Bytes of ``.metadata``, as torch's ``FileSystemWriter`` makes them."""
    state: dict[str, Any] = {}
    storage: list[tuple[Any, Any]] = []
    for name, tensor in metadata.tensors.items():
        chunks = []
        for chunk in tensor.chunks:
            offsets, sizes = _size(chunk.offsets), _size(chunk.sizes)
            chunks.append(_object("metadata", "ChunkStorageMetadata", offsets=offsets, sizes=sizes))
            storage.append((_index(name, offsets), _storage_info(chunk.slice)))
        properties = Object(Global(_DCP + "metadata", "TensorProperties"), _properties(tensor.dtype))
        shape = _size(tensor.shape)
        state[name] = _object(
            "metadata", "TensorStorageMetadata", properties=properties, size=shape, chunks=chunks
        )
    for name, stored in metadata.objects.items():
        state[name] = _object("metadata", "BytesStorageMetadata")
        storage.append((_index(name, None), _storage_info(stored)))
    meta = _object("metadata", "StorageMeta", checkpoint_id=None, save_id=None, load_id=None, modules=[])
    fields = {"state_dict_metadata": state, "planner_data": None, "storage_data": Items(storage)}
    return write_pickle(_object("metadata", "Metadata", **fields, storage_meta=meta, version="1.0.0"))


def _object(module: str, name: str, **fields: Any) -> Object:
    return Object(Global(_DCP + module, name), fields)


def _size(extent: Extent) -> Call:
    return Call(Global("torch", "Size"), (extent,))


def _index(name: str, offsets: Call | None) -> Object:
    return _object("metadata", "MetadataIndex", fqn=name, index=None, offset=offsets)


def _storage_info(stored: Slice) -> Object:
    place = {"relative_path": stored.file, "offset": stored.offset, "length": stored.length}
    return _object("filesystem", "_StorageInfo", **place)


def _properties(dtype: str) -> tuple[Any, ...]:
    """State of ``TensorProperties``: dtype, layout, requires_grad, memory format (contiguous), pin_memory."""
    layout = Call(Global("torch.serialization", "_get_layout"), ("torch.strided",))
    memory_format = Call(Global(_DCP + "metadata", "_MEM_FORMAT_ENCODING"), (0,))
    return (Global("torch", TORCH_NAMES[dtype]), layout, False, memory_format, False)


def _metadata(raw: Any) -> Metadata:
    """The plain form. Raises ValueError and the like where it is something else."""
    if not _is(raw, "metadata.Metadata"):
        raise ValueError("holds something else")
    slices: dict[tuple[str, Extent | None], Slice] = {}
    for index, info in raw.field("storage_data").items():
        if not (_is(index, "metadata.MetadataIndex") and _is(info, "filesystem._StorageInfo")):
            raise ValueError("storage_data holds something else")
        offset = index.state.get("offset")
        key = (_text(index.field("fqn")), None if offset is None else _extent(offset))
        if key in slices:
            raise ValueError(f"{key[0]}: {key[1]} is stored twice")
        if info.state.get("transform_descriptors"):
            raise ValueError(f"{key[0]}: is stored transformed, which is not supported")
        offset, length = _extent((info.field("offset"), info.field("length")))
        slices[key] = Slice(_text(info.field("relative_path")), offset, length)
    found = Metadata()
    for name, described in raw.field("state_dict_metadata").items():
        if _is(described, "metadata.TensorStorageMetadata"):
            found.tensors[_text(name)] = _tensor(name, described, slices)
        elif _is(described, "metadata.BytesStorageMetadata"):
            found.objects[_text(name)] = slices[name, None]
        else:
            raise ValueError(f"{name}: neither a tensor nor an object")
    return found


def _tensor(name: str, described: Inert, slices: dict[tuple[str, Extent | None], Slice]) -> DistributedTensor:
    shape = _extent(described.field("size"))
    dtype = described.field("properties").state[0].origin
    boxes: dict[Extent, Extent] = {}
    for chunk in described.field("chunks"):
        offsets, sizes = _extent(chunk.field("offsets")), _extent(chunk.field("sizes"))
        if boxes.setdefault(offsets, sizes) != sizes:
            raise ValueError(f"{name}: two chunks at {offsets}")
        fits = len(offsets) == len(sizes) == len(shape)
        if not fits or any(a + b > c for a, b, c in zip(offsets, sizes, shape, strict=True)):
            raise ValueError(f"{name}: chunk {sizes} at {offsets} is not within {shape}")
    chunks = [Chunk(offsets, sizes, slices[name, offsets]) for offsets, sizes in boxes.items()]
    return DistributedTensor(_DTYPES.get(dtype, dtype), shape, chunks)


def _is(value: Any, name: str) -> bool:
    return isinstance(value, Inert) and value.origin == _DCP + name


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"a name of type {type(value).__name__}")
    return value


def _extent(value: Any) -> Extent:
    if not isinstance(value, tuple) or not all(type(x) is int and 0 <= x < 2**62 for x in value):
        raise ValueError(f"sizes or offsets {str(value)[:80]}")
    return value
