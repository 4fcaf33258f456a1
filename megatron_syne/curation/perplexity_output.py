"""An output that grows part by part and can be gone on with after a kill, to the same bytes.

Beside ``OUTPUT`` lie ``OUTPUT.partial``, what is written so far, and ``OUTPUT.journal``: first which work it is,
then one line per finished part with the sizes and hashes up to it. Going on keeps the parts that are whole and
cuts off the rest. When all is there, the output takes its name and the journal goes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from megatron_syne.errors import CannotCreate, DataError

_BLOCK = 1 << 20
_NO_LOCKS_HERE = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class GrowingOutput:
    """The output of one piece of work, locked by this process.

    ``work``: plain JSON that says which work it is; what another left is not gone on with. Raises CannotCreate
    where ``path`` exists, cannot be made, is being written, or a partial output of other work lies there.
    """

    def __init__(self, path: str | Path, work: dict[str, Any], overwrite: bool = False) -> None:
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.journal = self.path.with_name(self.path.name + ".journal")
        self._overwrite = overwrite
        self._refuse_existing()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._journal = _locked(self.journal)
        except OSError as error:
            raise CannotCreate(f"{self.journal}: cannot be created: {error.strerror}") from None
        self._digest = hashlib.sha256()
        self._bytes = 0
        self.states: list[dict[str, Any]] = []
        """What :meth:`add` was given with each part, those before a kill included."""
        try:
            self._refuse_existing()  # again, now that the name is ours: a run that finished a moment ago is seen
            self._stream = self._go_on(work)
        except BaseException:
            self._journal.close()
            raise

    def __enter__(self) -> GrowingOutput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # a full disk, met again
            self._stream.close()
        if not self.states and error is not None:  # there is nothing to go on from
            self.partial.unlink(missing_ok=True)
            self.journal.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._journal.close()

    def add(self, data: bytes, state: dict[str, Any]) -> None:
        """Append a part; ``state`` (plain JSON) is what to go on from after it."""
        self._stream.write(data)
        self._stream.flush()
        self._digest.update(data)
        self._bytes += len(data)
        entry = {"bytes": self._bytes, "sha256": self._digest.hexdigest(), "state": state}
        self._journal.write(json.dumps(entry).encode() + b"\n")
        self._journal.flush()
        self.states.append(json.loads(json.dumps(state)))

    def publish(self) -> None:
        """Flush to disk and give the output its name."""
        os.fsync(self._stream.fileno())
        os.replace(self.partial, self.path)
        self.journal.unlink()
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _refuse_existing(self) -> None:
        if os.path.lexists(self.path) and (not self._overwrite or self.path.is_dir()):
            raise CannotCreate(f"{self.path}: exists already; choose another output or pass --overwrite")

    def _go_on(self, work: dict[str, Any]) -> BinaryIO:
        self._journal.seek(0)
        first, *lines = self._journal.read().split(b"\n")
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        stream = os.fdopen(os.open(self.partial, flags, 0o666), "r+b")
        before = _entry(first)
        kept = self._whole_parts(stream, [_entry(line) for line in lines]) if before else []
        if kept and before.get("work") != work:
            stream.close()
            changed = [key for key in work if before.get("work", {}).get(key) != work[key]]
            raise CannotCreate(
                f"{self.partial}: was begun with other options or inputs ({', '.join(changed)}); repeat that "
                f"command to go on, or remove it and {self.journal} to begin anew"
            )
        # written anew, so that a line cut short by the kill does not stay
        self._journal.seek(0)
        self._journal.truncate()
        for entry in [{"work": work}, *kept]:
            self._journal.write(json.dumps(entry).encode() + b"\n")
        self._journal.flush()
        self.states = [entry["state"] for entry in kept]
        stream.seek(self._bytes)
        stream.truncate()
        return stream

    def _whole_parts(self, stream: BinaryIO, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Entries up to the last one whose bytes are all there and as they were written."""
        whole: list[dict[str, Any]] = []
        for entry in entries:
            digest, at = self._digest.copy(), self._bytes
            while "bytes" in entry and at < entry["bytes"]:
                block = stream.read(min(_BLOCK, entry["bytes"] - at))
                if not block:
                    break
                digest.update(block)
                at += len(block)
            if at != entry.get("bytes") or digest.hexdigest() != entry.get("sha256"):
                break
            self._digest, self._bytes = digest, at
            whole.append(entry)
        return whole


class InputSoFar:
    """SHA-256 over the lines read so far: whether going on meets the same input."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, raw: bytes) -> None:
        """One more line."""
        self._digest.update(raw)

    def check(self, expected: str, where: str) -> None:
        """DataError where the lines up to ``where`` are not those of the earlier run."""
        if self.hexdigest() != expected:
            raise DataError(
                f"{where}: the input up to here has changed since this output was begun; remove the .partial and "
                f".journal files beside the output to begin anew"
            )

    def hexdigest(self) -> str:
        """Of what was added."""
        return self._digest.hexdigest()


def _locked(path: Path) -> BinaryIO:
    """The file, opened for reading and writing and locked by this process."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    stream = os.fdopen(os.open(path, flags, 0o666), "r+b")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        raise CannotCreate(f"{path}: another run is writing this output now") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:
            raise
    return stream


def _entry(line: bytes) -> dict[str, Any]:
    """A line of the journal; empty where a kill has cut it short."""
    with contextlib.suppress(ValueError):
        entry = json.loads(line)
        if isinstance(entry, dict):
            return entry
    return {}
