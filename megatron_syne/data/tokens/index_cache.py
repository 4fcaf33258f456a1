"""What is worked out from an index once and read by many: orders of documents, subsets, packed bins, checks.

An entry is one file, named by a digest of all that decides its content. It appears whole or not at all, and
of several processes that want it one makes it while the others wait, whichever machines they run on. Layout,
little-endian::

    8 bytes    "SYNEDIX1"
    uint64     bytes of the description
    uint64     bytes of the checksums
    32 bytes   SHA-256 of description and checksums
    JSON       description: kind, key, facts, arrays (name, type, size)
    uint32[]   CRC-32 of every 1,024 bytes of each array
    arrays     one after another

Description and checksums are verified when an entry is opened, an array's bytes each time they are read: a
truncated or altered file is noticed, told in a warning and made again. Read with ``pread``: an I/O fault is an
error and not a signal, and 100 million documents cost a rank next to no memory.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import socket
import struct
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_syne.errors import CannotCreate

logger = logging.getLogger(__name__)

_MAGIC = b"SYNEDIX1"
_HEADER = struct.Struct("<8sQQ32s")
_CHUNK = 1024
_BLOCK = 1 << 20
_TYPES = ("<u4", "<i4", "<i8")
_MOST_DESCRIPTION_BYTES = 1 << 24
_LONGEST_WAIT_SECONDS = 900.0  # for a builder that hangs, or a lock that a dead machine left on a file server
_NO_LOCKS_HERE = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class DamagedEntry(Exception):
    """Bytes of an entry are not those that were written."""


class CachedArray:
    """An array of an entry, in memory."""

    def __init__(self, values: NDArray[Any]) -> None:
        self.size = int(values.size)
        self._values = values

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Values ``start`` to ``stop`` (exclusive, within the array); DamagedEntry, OSError."""
        return self._values[start:stop]

    def whole(self) -> NDArray[Any]:
        """All values, in memory."""
        return self._values


class _FileArray(CachedArray):
    """An array at a byte of its entry's file; every read is held to the checksums."""

    def __init__(
        self, file: OpenFile, offset: int, size: int, dtype: np.dtype[Any], checksums: NDArray[np.uint32]
    ) -> None:
        self.size = size
        self._file, self._offset, self._dtype, self._checksums = file, offset, dtype, checksums

    def read(self, start: int, stop: int) -> NDArray[Any]:
        width = self._dtype.itemsize
        first, last = start * width // _CHUNK, -(-stop * width // _CHUNK)
        begin, end = first * _CHUNK, min(last * _CHUNK, self.size * width)
        data = _read_exactly(self._file.descriptor, self._offset + begin, end - begin)
        if last - first == 1:  # what reading a sample comes to: numpy would cost more than the checksum
            right = zlib.crc32(data) == self._checksums[first]
        else:
            right = np.array_equal(_checksums(data), self._checksums[first:last])
        if not right:
            raise DamagedEntry(f"checksum of bytes {self._offset + begin} to {self._offset + end}")
        return np.frombuffer(data, self._dtype, stop - start, start * width - begin)

    def whole(self) -> NDArray[Any]:
        values = np.empty(self.size, self._dtype)
        step = _BLOCK // self._dtype.itemsize
        for start in range(0, self.size, step):
            stop = min(start + step, self.size)
            values[start:stop] = self.read(start, stop)
        return values


class OpenFile:
    """A file open for reading, closed when it is no longer used."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@dataclass
class Entry:
    """Numbers and arrays that belong together. What makes one gives ``facts`` and ``arrays``."""

    facts: dict[str, Any]
    arrays: dict[str, CachedArray] = field(default_factory=dict)
    path: Path | None = None
    """Its file, where it has one."""
    inode: int = 0


class IndexCache:
    """Entries in a folder; without one (``None``) each is made when asked for and held by the caller alone."""

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder)

    def hold(self, kind: str, key: dict[str, Any], make: Callable[[], Entry]) -> HeldEntry:
        """The entry of a key (plain JSON values): opened, or made by ``make`` and published.

        Raises CannotCreate where it has to be made and the folder cannot be written, OSError for a full disk,
        and what ``make`` raises.
        """
        return HeldEntry(self, kind, key, make)

    def entry(self, kind: str, key: dict[str, Any], make: Callable[[], Entry]) -> Entry:
        """As :meth:`hold`, for an entry that is read at once and whose arrays are not."""
        if self.folder is None:
            return make()
        text = json.dumps([kind, key], sort_keys=True)
        path = self.folder / f"{kind}-{hashlib.sha256(text.encode('utf-8')).hexdigest()[:40]}"
        while True:
            found = _open_or_remove(path, text)
            if found is not None:
                return found
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                _make_alone(path, text, make)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
                    raise CannotCreate(
                        f"index cache {self.folder}: {path.name} has to be made and cannot be written "
                        f"({error.strerror}); name a writable folder in data.index_cache"
                    ) from None
                raise

    def discard(self, entry: Entry, why: object) -> None:
        """Take a damaged entry away, unless it has been made anew meanwhile; ask for it again after this."""
        if entry.path is None:
            raise AssertionError(f"an entry in memory cannot be damaged: {why}")
        logger.warning("index cache: %s is damaged (%s); it is made again", entry.path, why)
        with contextlib.suppress(FileNotFoundError):
            if entry.path.stat().st_ino == entry.inode:
                entry.path.unlink()


class HeldEntry:
    """An open entry; where its arrays turn out damaged when they are read, it is made again."""

    def __init__(self, cache: IndexCache, kind: str, key: dict[str, Any], make: Callable[[], Entry]) -> None:
        self._cache, self._asked = cache, (kind, key, make)
        self._entry = cache.entry(*self._asked)

    @property
    def facts(self) -> dict[str, Any]:
        """Numbers of the entry."""
        return self._entry.facts

    def size(self, name: str) -> int:
        """Values of an array."""
        return self._entry.arrays[name].size

    def read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Values ``start`` to ``stop`` of an array."""
        try:
            return self._entry.arrays[name].read(start, stop)
        except DamagedEntry as error:
            self._renew(error)
        return self._entry.arrays[name].read(start, stop)

    def whole(self, name: str) -> NDArray[Any]:
        """An array, in memory."""
        try:
            return self._entry.arrays[name].whole()
        except DamagedEntry as error:
            self._renew(error)
        return self._entry.arrays[name].whole()

    def _renew(self, error: DamagedEntry) -> None:
        self._cache.discard(self._entry, error)
        self._entry = self._cache.entry(*self._asked)


def _open_or_remove(path: Path, text: str) -> Entry | None:
    """The entry; None where there is no file, or one that was damaged and is now removed."""
    try:
        file = OpenFile(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:
        raise CannotCreate(f"index cache: {path} cannot be opened: {error.strerror}; remove it") from None
    inode = os.fstat(file.descriptor).st_ino
    try:
        return _read_entry(path, file, text)
    except DamagedEntry as error:
        IndexCache(path.parent).discard(Entry({}, {}, path, inode), error)
        return None


def _read_entry(path: Path, file: OpenFile, text: str) -> Entry:
    status = os.fstat(file.descriptor)
    header = _read_exactly(file.descriptor, 0, _HEADER.size)
    magic, length, sums_length, digest = _HEADER.unpack(header)
    at = _HEADER.size + length + sums_length
    if magic != _MAGIC or length > _MOST_DESCRIPTION_BYTES or at > status.st_size:
        raise DamagedEntry("not an entry of this version, or truncated")
    raw = _read_exactly(file.descriptor, _HEADER.size, length)
    sums = _read_exactly(file.descriptor, _HEADER.size + length, sums_length)
    if hashlib.sha256(raw + sums).digest() != digest:
        raise DamagedEntry("checksum of its description")
    description = json.loads(raw)
    if description["key"] != text:
        raise DamagedEntry("it belongs to another name")
    facts = description["facts"]
    arrays = [(name, np.dtype(kind), int(size)) for name, kind, size in description["arrays"]]
    counts = [-(-size * dtype.itemsize // _CHUNK) for _, dtype, size in arrays]
    expected = at + sum(size * dtype.itemsize for _, dtype, size in arrays)
    if status.st_size != expected:
        raise DamagedEntry(f"{status.st_size} bytes, expected {expected}")
    checksums = np.frombuffer(sums, "<u4")
    entry, used = Entry(facts, {}, path, status.st_ino), 0
    for (name, dtype, size), count in zip(arrays, counts, strict=True):
        entry.arrays[name] = _FileArray(file, at, size, dtype, checksums[used : used + count])
        at, used = at + size * dtype.itemsize, used + count
    return entry


def _read_exactly(descriptor: int, offset: int, count: int) -> bytes:
    data = os.pread(descriptor, count, offset)
    if len(data) == count:
        return data
    parts, offset, count = [data], offset + len(data), count - len(data)
    while count:
        data = os.pread(descriptor, count, offset)
        if not data:
            raise DamagedEntry("truncated")
        parts.append(data)
        offset, count = offset + len(data), count - len(data)
    return b"".join(parts)


def _checksums(data: bytes | memoryview) -> NDArray[np.uint32]:
    view = memoryview(data)
    return np.array([zlib.crc32(view[at : at + _CHUNK]) for at in range(0, len(view), _CHUNK)], "<u4")


def _make_alone(path: Path, text: str, make: Callable[[], Entry]) -> None:
    """Make and publish an entry, or wait until another process has. What a killed one left is taken over."""
    temporary = path.with_name(path.name + ".building")
    give_up = time.monotonic() + _LONGEST_WAIT_SECONDS
    pause = 0.01
    while True:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with os.fdopen(descriptor, "r+b") as stream:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < give_up:
                    time.sleep(pause)
                    pause = min(2 * pause, 0.5)
                    if path.exists():
                        return
                    continue
                break
            except OSError as error:
                if error.errno not in _NO_LOCKS_HERE:
                    raise
                break
            # The lock is on the file, not on its name: its last owner may have published it under our hands
            try:
                ours = os.stat(temporary, follow_symlinks=False).st_ino == os.fstat(descriptor).st_ino
            except FileNotFoundError:
                ours = False
            if not ours:
                if path.exists():
                    return
                continue
            if path.exists():
                temporary.unlink()
                return
            stream.truncate()
            _publish(stream, temporary, path, text, make)
            return
    # No locks here, or one that is never let go: several may build, each its own file, all of the same bytes
    own = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.building")
    with open(own, "w+b") as stream:
        _publish(stream, own, path, text, make)


def _publish(stream: BinaryIO, temporary: Path, path: Path, text: str, make: Callable[[], Entry]) -> None:
    """Make an entry, write it to an open, empty file and give it its name; on an error the file goes."""
    try:
        entry = make()
        arrays, sums = [], []
        for array in entry.arrays.values():
            values = np.ascontiguousarray(array.whole())
            assert values.dtype.str in _TYPES, values.dtype
            arrays.append(values)
            sums.append(_checksums(values.view(np.uint8).data))
        description = {
            "key": text,
            "facts": entry.facts,
            "arrays": [[name, a.dtype.str, a.size] for name, a in zip(entry.arrays, arrays, strict=True)],
        }
        raw, checksums = json.dumps(description).encode("utf-8"), b"".join(part.tobytes() for part in sums)
        digest = hashlib.sha256(raw + checksums).digest()
        stream.write(_HEADER.pack(_MAGIC, len(raw), len(checksums), digest) + raw + checksums)
        for part in arrays:
            stream.write(part.data)
        stream.flush()
        os.fsync(stream.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
