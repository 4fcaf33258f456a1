"""Pickles that name torch's classes, written without importing them.

Python's own pickler looks up every class that it writes; here the few opcodes that are needed are put down by
hand, in protocol 2, as ``torch.save`` does.
"""

from __future__ import annotations

import pickle
import struct
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Global:
    """A class, function or constant by its name."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """The result of calling ``function`` with ``args``."""

    function: Global
    args: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Object:
    """An object of a class, made without its constructor, with a state (fields, or what its
    ``__setstate__`` takes)."""

    kind: Global
    state: Any


@dataclass(frozen=True)
class Persistent:
    """A reference that the reader's ``persistent_load`` resolves."""

    id: tuple[Any, ...]


@dataclass(frozen=True)
class Items:
    """A dictionary whose keys are objects."""

    pairs: list[tuple[Any, Any]]


def write_pickle(value: Any) -> bytes:
    """Bytes of a value made of None, bool, int, float, str, tuple, list, dict and the classes of this module."""
    writer = _Writer()
    writer.put(value)
    return pickle.PROTO + b"\2" + b"".join(writer.parts) + pickle.STOP


class _Writer:
    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.memo: dict[str | Global, int] = {}

    def put(self, value: Any) -> None:
        add = self.parts.append
        if value is None or isinstance(value, bool):
            add({None: pickle.NONE, True: pickle.NEWTRUE, False: pickle.NEWFALSE}[value])
        elif isinstance(value, int):
            add(_integer(value))
        elif isinstance(value, float):
            add(pickle.BINFLOAT + struct.pack(">d", value))
        elif isinstance(value, str | Global):
            self._named(value)
        elif isinstance(value, tuple):
            self._tuple(value)
        elif isinstance(value, list):
            add(pickle.EMPTY_LIST + pickle.MARK)
            for item in value:
                self.put(item)
            add(pickle.APPENDS)
        elif isinstance(value, dict | Items):
            add(pickle.EMPTY_DICT + pickle.MARK)
            for key, item in value.pairs if isinstance(value, Items) else value.items():
                self.put(key)
                self.put(item)
            add(pickle.SETITEMS)
        elif isinstance(value, Call):
            self.put(value.function)
            self._tuple(value.args)
            add(pickle.REDUCE)
        elif isinstance(value, Object):
            self.put(value.kind)
            add(pickle.EMPTY_TUPLE + pickle.NEWOBJ)
            self.put(value.state)
            add(pickle.BUILD)
        elif isinstance(value, Persistent):
            self._tuple(value.id)
            add(pickle.BINPERSID)
        else:
            raise TypeError(f"cannot be pickled here: {type(value)}")

    def _tuple(self, values: tuple[Any, ...]) -> None:
        self.parts.append(pickle.MARK)
        for value in values:
            self.put(value)
        self.parts.append(pickle.TUPLE)

    def _named(self, value: str | Global) -> None:
        """A name once, afterwards its number."""
        if value in self.memo:
            self.parts.append(pickle.LONG_BINGET + struct.pack("<I", self.memo[value]))
            return
        if isinstance(value, str):
            text = value.encode("utf-8", "surrogatepass")
            self.parts.append(pickle.BINUNICODE + struct.pack("<I", len(text)) + text)
        else:
            self.parts.append(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
        self.memo[value] = len(self.memo)
        self.parts.append(pickle.LONG_BINPUT + struct.pack("<I", self.memo[value]))


def _integer(value: int) -> bytes:
    if 0 <= value < 2**8:
        return pickle.BININT1 + bytes([value])
    if -(2**31) <= value < 2**31:
        return pickle.BININT + struct.pack("<i", value)
    return (
        pickle.LONG1
        + bytes([(size := value.bit_length() // 8 + 1)])
        + value.to_bytes(size, "little", signed=True)
    )
