"""Pickles read as plain data: nothing that a pickle names is imported, called or built.

torch's checkpoints are pickles: ``.metadata`` of a distributed checkpoint, ``data.pkl`` inside each of torch's
zip files. What a class or function would have made is an :class:`Inert` object here that only keeps the
name, the arguments and the state. Only names on an exact list are let through; any other one is refused, and
so are the opcodes that torch's writers do not use. No torch.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from megatron_syne.errors import DataError, SecurityRefusal, SyneError

Names = frozenset[tuple[str, str]]
"""(module, name) that a pickle may mention."""
_MOST_AXES = 64


class Inert:
    """What would have been an object of the class, or the result of the function, ``origin``."""

    origin: ClassVar[str] = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        self = super().__new__(cls)
        self.args, self.state = args, kwargs or None
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def field(self, name: str) -> Any:
        """A field of a pickled dataclass. Raises KeyError, TypeError where there is none."""
        return self.state[name]

    def __repr__(self) -> str:
        return f"<{self.origin}>"


class _Dict(dict[Any, Any]):
    """``OrderedDict`` and ``defaultdict``: the entries, which are set one by one; not the factory."""

    def __init__(self, *made_with: Any) -> None:
        super().__init__()
        if any(isinstance(one, list | tuple | dict) for one in made_with):
            raise ValueError("a dictionary that is made with its entries")

    def __setstate__(self, state: Any) -> None:
        """Attributes (``_metadata`` of a state dict) are left out."""


@dataclass(frozen=True)
class Storage:
    """Numbers that lie outside the pickle, in the record ``data/<key>`` of its zip file."""

    key: str
    kind: str
    """torch's class: ``torch.BFloat16Storage``."""
    numel: int


@dataclass(frozen=True)
class Tensor:
    """A tensor, not yet read: a view of a storage (offset and strides in elements)."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _size(values: Any) -> tuple[Any, ...]:
    """``torch.Size``."""
    if not isinstance(values, tuple) or len(values) > _MOST_AXES:
        raise ValueError("a torch.Size that is none")
    return values


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Tensor:
    """``torch._utils._rebuild_tensor_v2``."""
    numbers = (offset, *_size(shape), *_size(stride))
    if not isinstance(storage, Storage) or len(shape) != len(stride):
        raise ValueError("a tensor without a storage, or with strides that do not fit its shape")
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"a tensor with offset, shape and stride {numbers}")
    return Tensor(storage, offset, shape, stride)


def _parameter(tensor: Any, *rest: Any) -> Any:
    """``torch._utils._rebuild_parameter``."""
    return tensor


_MADE_PLAIN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dict,
    ("collections", "defaultdict"): _Dict,
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
}


@cache
def _stand_in(module: str, name: str) -> type[Inert]:
    return type(name, (Inert,), {"origin": f"{module}.{name}"})


def _key(value: Any, depth: int = 0) -> Any:
    """A dictionary's key, if it is a plain one: hashing tuples of tuples of tuples may take for ever."""
    if isinstance(value, tuple):
        if depth == 3 or len(value) > 64:
            raise ValueError("a key that is a deep or long tuple")
        for part in value:
            _key(part, depth + 1)
    elif not isinstance(value, str | int | float | bytes | Inert | type | None):
        raise ValueError(f"a key of type {type(value).__name__}")
    return value


# The opcodes of pickle protocols 2 to 4 that torch's writers produce; not among them: persistent ids as text,
# the extension registry, sets, out-of-band buffers and everything of protocols 0 and 1 that has a later form.
_OPCODES = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK),
    *(pickle.MEMOIZE, pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BINFLOAT),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.LONG4),
    *(pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8),
    *(pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.NEWOBJ, pickle.NEWOBJ_EX),
    pickle.BINPERSID,
)


def _set_items(reader: Any) -> None:
    items = reader.pop_mark()
    target = reader.stack[-1]
    if not isinstance(target, dict) or len(items) % 2:
        raise ValueError("items set in what is not a dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[_key(key)] = value


def _set_item(reader: Any) -> None:
    value, key = reader.stack.pop(), reader.stack.pop()
    target = reader.stack[-1]
    if not isinstance(target, dict):
        raise ValueError("an item set in what is not a dictionary")
    target[_key(key)] = value


def _build(reader: Any) -> None:
    """State goes to stand-ins only; Python's own BUILD would set any attribute of anything, the functions of
    this module included."""
    state = reader.stack.pop()
    target = reader.stack[-1]
    if not isinstance(target, Inert | _Dict):
        raise ValueError(f"a state for {type(target).__name__}")
    target.__setstate__(state)


class _Reader(pickle._Unpickler):
    """The unpickler in Python, whose opcodes can be chosen: the one in C takes gigabytes for a memo index out
    of a file, and calls what it is given."""

    dispatch: ClassVar[dict[int, Any]] = {
        **{code[0]: pickle._Unpickler.dispatch[code[0]] for code in _OPCODES},
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        pickle.BUILD[0]: _build,
    }

    def __init__(self, content: bytes, allowed: Names) -> None:
        super().__init__(io.BytesIO(content))
        self.allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise SecurityRefusal(
                f"holds {module}.{name}, which has no place in a checkpoint; it was not loaded"
            )
        return _MADE_PLAIN.get((module, name)) or _stand_in(module, name)

    def persistent_load(self, pid: Any) -> Storage:
        """torch's reference to the numbers of a tensor: ``("storage", class, key, device, numel)``."""
        word, kind, key, _, numel = pid
        if word != "storage" or not (isinstance(kind, type) and issubclass(kind, Inert)):
            raise ValueError(f"a reference to {word!r}")
        if not (
            isinstance(key, str) and key.isascii() and key.isdigit() and type(numel) is int and numel >= 0
        ):
            raise ValueError(f"a storage with key {key!r} and {numel!r} elements")
        return Storage(key, kind.origin, numel)


def read_pickle(content: bytes, allowed: Names, where: str) -> Any:
    """The object in a pickle, made of plain values, :class:`Inert` and :class:`Tensor` objects.

    Raises SecurityRefusal that names what is not in ``allowed``, DataError for a damaged pickle; ``where``
    stands before both.
    """
    try:
        return _Reader(content, allowed).load()
    except SecurityRefusal as refusal:
        raise SecurityRefusal(f"{where}: {refusal}") from None
    except SyneError:
        raise
    except Exception as error:  # damaged bytes raise nearly anything
        what = f"{type(error).__name__}: {error}"
        raise DataError(f"{where}: not readable as a pickle of torch's ({what[:200]})") from None


def _names(module: str, *names: str) -> Names:
    return frozenset((module, name) for name in names)


_DTYPES = _names(
    "torch", "float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool",
    "float8_e4m3fn", "float8_e5m2",
)  # fmt: skip
_DCP = "torch.distributed.checkpoint."

METADATA_NAMES: Names = (
    _DTYPES
    | _names(
        _DCP + "metadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata",
        "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
    )
    | _names(_DCP + "planner", "SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")
    | _names(_DCP + "filesystem", "_StorageInfo", "_StoragePrefix")
    | _names("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata", "MCoreSavePlan")
    | _names("torch", "Size")
    | _names("torch.serialization", "_get_layout")
    | _names("collections", "OrderedDict")
    | _names("pathlib", "PosixPath", "PurePosixPath")
)  # fmt: skip
"""What torch's and megatron-core's writers put into ``.metadata``."""

TENSOR_NAMES: Names = (
    _names("torch._utils", "_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_parameter_with_state")
    | _names(
        "torch", "FloatStorage", "DoubleStorage", "HalfStorage", "BFloat16Storage", "LongStorage", "IntStorage",
        "ShortStorage", "CharStorage", "ByteStorage", "BoolStorage",
    )
    | _names("collections", "OrderedDict")
)  # fmt: skip
"""What one tensor saved by ``torch.save`` needs."""

LEGACY_NAMES: Names = (
    TENSOR_NAMES
    | _DTYPES
    | _names("torch", "Size", "device")
    | _names("torch.serialization", "_get_layout")
    | _names("collections", "defaultdict")
    | _names("argparse", "Namespace")
    | _names("types", "SimpleNamespace")
    | _names("pathlib", "PosixPath")
    | _names("signal", "Signals")
    | _names("_io", "BytesIO")
    | _names("_codecs", "encode")  # bytes, as protocol 2 writes them
    | _names("__builtin__", "set", "bytearray", "dict", "list", "int")
    | _names("numpy", "ndarray", "dtype")
    | _names("numpy.core.multiarray", "_reconstruct", "scalar")
    | _names("numpy._core.multiarray", "_reconstruct", "scalar")
    | _names("numpy.dtypes", "UInt32DType")
    | _names("megatron.core.enums", "ModelType", "Fp8Recipe", "Fp4Recipe")
    | _names(
        "megatron.core.transformer.enums", "AttnBackend", "AttnMaskType", "AttnType", "LayerType", "ModelType",
        "CudaGraphScope", "CudaGraphModule",
    )
    | _names("megatron.core.optimizer.optimizer_config", "OptimizerConfig")
    | _names("megatron.core.rerun_state_machine", "RerunDiagnostic", "RerunMode", "RerunState")
)  # fmt: skip
"""What Megatron-LM puts into ``model_optim_rng.pt``: arguments, random states, optimizer state (see also
``megatron.core.safe_globals``)."""
