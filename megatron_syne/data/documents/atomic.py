"""Files that appear together, complete, or not at all.

Each file is written as ``<name>.tmp`` beside its final place, locked while it is written (a second run for
the same name is refused; what a killed run left is taken over), flushed to disk and renamed. A *seal* (the
manifest) is removed before and put back after all others, so a seal always describes what lies beside it.
What a killed run left can be gone on with: a file created with ``keep`` still holds it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from megatron_syne.errors import DISK_ERRNOS, CannotCreate, SecurityRefusal

_NO_LOCKS_HERE = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass
class _Output:
    final: Path
    temporary: Path
    stream: BinaryIO
    seal: bool
    optional: bool
    scratch: bool


class Outputs:
    """A set of output files: ``create`` all, write, ``publish``; leaving without that discards them."""

    def __init__(self, overwrite: bool = False) -> None:
        self.overwrite = overwrite
        """Replace files that exist."""
        self.keep_partial = False
        """Leave the ``.tmp`` files where they are when the work ends without ``publish``."""
        self._outputs: list[_Output] = []

    def __enter__(self) -> Outputs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for output in self._outputs:
            if not self.keep_partial:
                output.temporary.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a full disk, met again while flushing
                output.stream.close()
        self._outputs = []

    def create(
        self,
        path: str | Path,
        *,
        seal: bool = False,
        optional: bool = False,
        keep: bool = False,
        scratch: bool = False,
    ) -> BinaryIO:
        """Stream (to write and to read back) of a new file that will be ``path``.

        An ``optional`` one is published only if not empty, a ``scratch`` one never. With ``keep`` what a killed
        run left in the ``.tmp`` is still there, and the stream stands at its beginning.
        Raises CannotCreate where ``path`` exists (and ``overwrite`` is off) or another run is writing it.
        """
        final = Path(path)
        temporary = final.with_name(final.name + ".tmp")
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            stream = _claim(temporary, empty=not keep)
        except OSError as error:
            if error.errno in DISK_ERRNOS:
                raise
            raise CannotCreate(f"{temporary}: cannot be created: {error.strerror}") from None
        self._outputs.append(_Output(final, temporary, stream, seal, optional, scratch))
        # looked at only now that the name is ours: a run that finished a moment ago is seen
        if os.path.lexists(final) and not scratch and (not self.overwrite or final.is_dir()):
            raise CannotCreate(f"{final}: exists already; choose another output prefix or pass --overwrite")
        return stream

    def flush(self) -> None:
        """Put every file on the disk, as yet under its temporary name."""
        for output in self._outputs:
            output.stream.flush()
            os.fsync(output.stream.fileno())

    def publish(self) -> None:
        """Flush, fsync and rename every file; seals last."""
        self.flush()
        for output in self._outputs:
            if output.seal:
                output.final.unlink(missing_ok=True)
        folders = {output.final.parent for output in self._outputs}
        _sync_folders(folders)
        for output in sorted(self._outputs, key=lambda one: (one.scratch, one.seal)):
            if output.scratch:
                output.temporary.unlink()
            elif output.optional and output.stream.tell() == 0:
                output.final.unlink(missing_ok=True)
                output.temporary.unlink()
            else:
                if output.seal:
                    _sync_folders(folders)
                os.replace(output.temporary, output.final)
        _sync_folders(folders)
        for output in self._outputs:
            output.stream.close()  # lets the locks go
        self._outputs = []


def _claim(temporary: Path, empty: bool) -> BinaryIO:
    """Open and lock a temporary file, and empty it; only one process at a time gets it."""
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(temporary, flags, 0o666)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_nlink > 1:
                raise SecurityRefusal(
                    f"{temporary}: exists and is not a plain file of this user; remove it and start again"
                )
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CannotCreate(f"{temporary}: another run is writing this output now") from None
            except OSError as error:
                if error.errno not in _NO_LOCKS_HERE:
                    raise
            try:
                ours = os.stat(temporary, follow_symlinks=False).st_ino == status.st_ino
            except FileNotFoundError:
                ours = False
            if ours:
                if empty:
                    os.ftruncate(descriptor, 0)
                return os.fdopen(descriptor, "r+b", buffering=1 << 20)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its owner renamed it between our open and our lock: that is its output now


def _sync_folders(folders: set[Path]) -> None:
    for folder in folders:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
