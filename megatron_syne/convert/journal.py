"""Where a conversion is made before it takes its name, and what of it is known to be finished.

``.NAME.partial`` beside the output holds ``lock``, ``journal.jsonl`` and the growing folder ``output``. The
journal's first line says which conversion it is; every other names a finished tensor or source file and its
hash. It is not trusted: what it calls finished is read back and hashed before it is kept (engine), so that
it needs no fsync, and damage to a folder that lay there for a week is found.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_syne.convert.files import sync_folder
from megatron_syne.errors import CannotCreate, IOFault, StoppedCleanly, SyneError

LOCK = "lock"
JOURNAL = "journal.jsonl"
OUTPUT = "output"
_OLD = "old"


class Workplace:
    """The scratch folder of one conversion, locked by this process."""

    def __init__(self, goal: Path, identity: str) -> None:
        """Take the lock; keep what an earlier run of the same ``identity`` left, remove any other's.

        Raises CannotCreate where the folder cannot be made or another process works in it.
        """
        self.goal = goal
        self.folder = partial_folder(goal)
        self.output = self.folder / OUTPUT
        self.published = False
        self._lock = _lock(self.folder, goal)
        self.finished = _read_journal(self.folder / JOURNAL, identity)
        """What an earlier run noted, by kind and name: ``{"tensor": {name: hash}, "file": {...}}``."""
        self.resumed = bool(self.finished) and self.output.is_dir()
        if not self.resumed:
            self.finished = {}
            for name in (JOURNAL, OUTPUT):
                _remove(self.folder / name)
        self.output.mkdir(exist_ok=True)
        self._journal = os.open(
            self.folder / JOURNAL, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
        )
        # a line that was cut off by a kill must not swallow the next one
        self._append("" if not self.resumed else "\n", {} if self.resumed else {"identity": identity})

    def note(self, kind: str, name: str, digest: str) -> None:
        """Record something as finished. Safe from several threads: one write, appended."""
        self._append("", {"kind": kind, "name": name, "hash": digest})

    def publish(self) -> None:
        """Give the output its name, in the place of an older one; then nothing of the scratch folder stays."""
        old = self.folder / _OLD
        _remove(old)
        if os.path.lexists(self.goal):
            os.rename(self.goal, old)
        try:
            os.rename(self.output, self.goal)
        except OSError:
            if old.exists():
                os.rename(old, self.goal)
            raise
        self.published = True
        sync_folder(self.goal.parent)
        self.discard()

    def discard(self) -> None:
        """Remove the scratch folder."""
        _discard(self.folder)

    def forget(self) -> None:
        """Have the next run begin anew: after a failed fsync the page cache shows what the disk does not hold."""
        _remove(self.folder / JOURNAL)

    def close(self) -> None:
        """Let go of the lock."""
        os.close(self._journal)
        os.close(self._lock)

    def _append(self, before: str, entry: dict[str, Any]) -> None:
        line = before + (json.dumps(entry) + "\n" if entry else "")
        if line:
            os.write(self._journal, line.encode())


def partial_folder(goal: Path) -> Path:
    """The scratch folder beside the output ``goal``."""
    return goal.with_name(f".{goal.name}.partial")


@contextmanager
def workplace(goal: Path, identity: str) -> Iterator[Workplace]:
    """A :class:`Workplace` for the block.

    A fault of the disk (IOFault) and an interruption (StoppedCleanly) keep what is finished and say that the
    same command goes on; any other error removes it.
    """
    place = Workplace(goal, identity)
    kept = f"what is finished is kept in {place.folder}: the same command goes on from there"
    try:
        yield place
    except KeyboardInterrupt:
        if place.published:  # too late to stop it
            place.discard()
            return
        raise StoppedCleanly(f"{goal}: interrupted; {kept} (or remove that folder)") from None
    except (IOFault, StoppedCleanly):
        raise
    except OSError as error:
        what = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
        raise IOFault(f"{goal}: {what}; {kept}; to give up, remove that folder") from error
    except BaseException:
        place.discard()
        raise
    finally:
        place.close()


def tidy(goal: Path) -> None:
    """Undo or finish what a kill cut short while an output was given its name: an older output that had been
    moved aside comes back, and the scratch folder of a conversion that is complete goes."""
    folder = partial_folder(goal)
    if not folder.is_dir() or folder.is_symlink():
        return
    try:
        lock = _lock(folder, goal)
    except SyneError:  # in use, or not ours: who wants to work in it is told so
        return
    try:
        if (folder / _OLD).is_dir() and not os.path.lexists(goal):
            os.rename(folder / _OLD, goal)
        if goal.is_dir() and not (folder / OUTPUT).exists():
            _discard(folder)
    finally:
        os.close(lock)


def _discard(folder: Path) -> None:
    """Remove a scratch folder; the lock file goes last, while it is still held."""
    for name in (OUTPUT, JOURNAL, _OLD, LOCK):
        with contextlib.suppress(OSError):
            _remove(folder / name)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _lock(folder: Path, goal: Path) -> int:
    """Make the scratch folder where it is missing, and take its lock; the descriptor that holds it."""
    while True:
        try:
            with contextlib.suppress(FileExistsError):
                folder.mkdir(mode=0o700)
            status = folder.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
                raise CannotCreate(
                    f"{folder}: is in the way: not a folder that only this user can write to; remove it"
                )
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(folder / LOCK, flags, 0o600)
        except FileNotFoundError:
            if not goal.parent.is_dir():
                raise CannotCreate(f"{goal}: cannot be made: no folder {goal.parent}") from None
            continue  # the run before has just removed it
        except OSError as error:
            raise CannotCreate(f"{goal}: cannot be made: {error.strerror} ({goal.parent})") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise CannotCreate(
                f"{goal}: another conversion (pid {holder or 'not known yet'}) is writing it; wait for it"
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise CannotCreate(f"{folder / LOCK}: cannot be locked: {error.strerror}") from None
        try:
            current = os.stat(folder / LOCK).st_ino == os.fstat(descriptor).st_ino
        except FileNotFoundError:
            current = False
        if current:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            return descriptor
        os.close(descriptor)  # removed between open and lock by the run that held it


def _read_journal(path: Path, identity: str) -> dict[str, dict[str, str]]:
    """What the journal calls finished; empty where there is none or it is another conversion's. Lines that a
    kill or a power failure has mangled are passed over."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return {}
    entries = []
    for line in lines:
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict):
                entries.append(entry)
    if not entries or entries[0] != {"identity": identity}:
        return {}
    found: dict[str, dict[str, str]] = {"tensor": {}, "file": {}}
    for entry in entries[1:]:
        kind, name, digest = (entry.get(key) for key in ("kind", "name", "hash"))
        if kind in found and isinstance(name, str) and isinstance(digest, str):
            found[kind][name] = digest
    return found


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
