"""Files at the edge: nothing outside the given folder is opened, nothing half-written is left.

Names out of index and manifest files come from strangers, so they are opened through
:func:`open_inside` only.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_syne.errors import CannotCreate, DataError, IOFault, MissingInput, SecurityRefusal
from megatron_syne.models.json_file import JSON_LIMIT_BYTES, parse_json

BLOCK_BYTES = 8 * 2**20

Progress = Callable[[str, int, int], None]
"""Called as ``progress(what, bytes_done, bytes_total)``."""


def quiet(what: str, done: int, total: int) -> None:
    """A :data:`Progress` that shows nothing."""


def check_plain_name(name: Any, where: str) -> str:
    """The name, if it is a plain file name; SecurityRefusal for anything that could lead elsewhere."""
    plain = isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")
    if not plain:
        raise SecurityRefusal(f"{where}: {name!r} is not a plain file name inside its folder; refused")
    return str(name)


def open_inside(folder: Path, *names: str) -> int:
    """A read-only descriptor of a regular file inside ``folder``; the caller closes it.

    Raises MissingInput where there is none, SecurityRefusal for a name or a link that leads outside and for
    anything that is not a regular file (a FIFO would block, a device never ends). The one link out that is
    followed is that of the Hugging Face cache, from a snapshot to a blob of the same repository.
    """
    path = folder.joinpath(*(check_plain_name(name, str(folder)) for name in names))
    root, real = os.path.realpath(folder), os.path.realpath(path)
    if os.path.commonpath([root, real]) != root and not _is_hub_blob(root, real):
        raise SecurityRefusal(
            f"{path}: is a link that leads out of its folder (to {real}); refused. "
            f"Copy the folder with its links resolved: cp -rL"
        )
    try:
        descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise MissingInput(f"{path}: no such file") from None
    except PermissionError:
        raise MissingInput(f"{path}: not readable by this user") from None
    except OSError as error:  # ELOOP, ENXIO: a link swapped in, a socket
        raise SecurityRefusal(f"{path}: cannot be opened as a regular file ({error.strerror})") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise SecurityRefusal(f"{path}: not a regular file; refused")
    return descriptor


def _is_hub_blob(root: str, real: str) -> bool:
    """Whether ``real`` is a blob of the Hugging Face cache and ``root`` a snapshot of the same repository.

    There ``models--ORG--NAME/snapshots/REVISION/x`` is a link to ``../../blobs/HASH``, and nothing else is let
    through: both paths are free of links already, so a blob that is itself a link elsewhere is not one.
    """
    snapshots, blobs = os.path.dirname(root), os.path.dirname(real)
    repository = os.path.dirname(snapshots)
    return (
        os.path.basename(snapshots) == "snapshots"
        and os.path.basename(repository).startswith("models--")
        and blobs == os.path.join(repository, "blobs")
        and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", os.path.basename(real)) is not None
    )


def read_json_inside(folder: Path, *names: str) -> dict[str, Any]:
    """The JSON object in a file inside ``folder``; errors as :func:`open_inside`, and DataError."""
    with os.fdopen(open_inside(folder, *names), "rb") as stream:
        return parse_json(stream.read(JSON_LIMIT_BYTES + 1), str(folder.joinpath(*names)))


def exists_inside(folder: Path, name: str) -> bool:
    """Whether the folder has an entry of that name (a dangling link counts, so that opening it complains)."""
    return os.path.lexists(folder / name)


def read_exactly(descriptor: int, view: memoryview, offset: int, where: str) -> None:
    """Fill ``view`` from ``offset`` of a file. Raises DataError where the file ends before."""
    done = 0
    while done < len(view):  # one call moves 2 GiB at most
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise DataError(f"{where}: ends at byte {offset + done}, {len(view) - done} bytes too early")
        done += count


def write_json(path: Path, value: Any) -> None:
    """Write a new JSON file (sorted keys, two spaces, as transformers does) and bring it to the disk."""
    with path.open("x", encoding="utf-8") as stream:
        json.dump(value, stream, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())


def check_output(out_dir: Path, source: Path | None, overwrite: bool, marks: tuple[str, ...]) -> Path:
    """Where the output will really lie; CannotCreate where it may not be made.

    With ``overwrite`` an existing folder is replaced, but only one that this program wrote (it holds all of
    ``marks``), and never one that is, holds, or lies in the source.
    """
    target = out_dir.parent.resolve() / out_dir.name
    if out_dir.name in ("", ".."):
        raise CannotCreate(f"{out_dir}: give the folder a name")
    if source is not None:
        origin, real = source.resolve(), target.resolve()
        if real == origin or real.is_relative_to(origin) or origin.is_relative_to(real):
            raise CannotCreate(
                f"{out_dir}: is, holds or lies inside the source {source}; the source is never written to. "
                f"Choose a folder elsewhere"
            )
    if os.path.lexists(target):
        if not overwrite:
            raise CannotCreate(f"{out_dir}: exists already; remove it or choose another folder")
        if target.is_symlink() or not all((target / mark).is_file() for mark in marks):
            raise CannotCreate(
                f"{out_dir}: exists and was not written by this program (it lacks {' or '.join(marks)}), "
                f"so it is not overwritten; remove it by hand or choose another folder"
            )
    return target


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary sibling of ``target`` that takes its name when the block ends well, and vanishes otherwise.

    ``target`` is from :func:`check_output`; an existing one is replaced. Raises CannotCreate where the parent
    folder is missing or not writable.
    """
    mark = secrets.token_hex(4)
    scratch = target.with_name(f".{target.name}.{mark}.partial")
    try:
        scratch.mkdir()
    except OSError as error:
        raise CannotCreate(f"{target}: cannot be made: {error.strerror} ({target.parent})") from None
    try:
        yield scratch
        for folder, _, _ in os.walk(scratch):
            sync_folder(Path(folder))
        old = target.with_name(f".{target.name}.{mark}.old")
        if os.path.lexists(target):
            os.rename(target, old)
        try:
            os.rename(scratch, target)
        except OSError as error:
            raise CannotCreate(f"{target}: cannot be made: {error.strerror}") from None
        sync_folder(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_space(parent: Path, needed: int) -> None:
    """Raises IOFault where the disk under ``parent`` has less than ``needed`` bytes free."""
    try:
        free = shutil.disk_usage(parent).free
    except OSError:
        return  # the parent is missing: making the folder says so
    if free < needed:
        raise IOFault(f"{parent}: {needed:,} bytes are needed, {free:,} are free; nothing was written")


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
