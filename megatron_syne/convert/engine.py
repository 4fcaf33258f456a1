"""The one engine of every conversion: bytes from any weights to any target, hashed as they pass.

Tensors pass through memory tile by tile (``tiles``), each tile hashed and written to every place that it has
in the target. A source file that holds whole tensors is read once, from end to end, for them and for its own
SHA-256 (``lanes``); one that holds parts is hashed beside. The output grows in a scratch folder and takes its
name when all of it is on the disk (``journal``).
"""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from megatron_syne.convert.certificate import (
    CERTIFICATE,
    new_certificate,
)
from megatron_syne.convert.feeder import Feeder
from megatron_syne.convert.files import (
    Progress,
    check_output,
    check_plain_name,
    check_space,
    quiet,
    sync_folder,
    write_json,
)
from megatron_syne.convert.journal import OUTPUT, Workplace, partial_folder, tidy, workplace
from megatron_syne.convert.lanes import feed_only, read_file, whole_tensor_files
from megatron_syne.convert.numbers import ITEM_BYTES
from megatron_syne.convert.outfile import STAGES_BYTES, OutFile
from megatron_syne.convert.pieces import Span, matrix
from megatron_syne.convert.resume import plan_identity, read_back
from megatron_syne.convert.slices import (
    check_places,
    free_spans,
    places_by_file,
    planned_padding,
    rest_hash,
    slices,
)
from megatron_syne.convert.streams import Place, StoredWeights, Target, TargetFile, Weights
from megatron_syne.convert.tiles import (
    HASH_BLOCK_BYTES,
    TILE_BYTES,
    Buffers,
    Count,
    large_first,
    sha256_file,
    write_tensor,
)
from megatron_syne.convert.workers import Task, job_count, work
from megatron_syne.errors import DataError


@dataclass(frozen=True)
class Estimate:
    """What a conversion will take."""

    read_bytes: int
    """Tensors, and once more for their SHA-256 the source's files that do not hold whole tensors (from the page
    cache, mostly)."""
    write_bytes: int
    files: int
    memory_bytes: int
    """Above what the interpreter and its modules take."""


def estimate(weights: Weights, target: Target, jobs: int = 0) -> Estimate:
    """Bytes read and written, files, and memory of a conversion, without doing any of it."""
    tensors = sum(matrix(shape)[0] * weights.row_bytes(name) for name, shape in weights.shapes.items())
    once = whole_tensor_files(weights)
    again = {} if _certified(weights, target) else weights.files()
    widest = max((weights.row_bytes(name) for name in weights.shapes), default=0)
    converted = any(
        place.shift or len({place.dtype, target.dtypes[name], weights.dtypes[name]}) > 1
        for name, places in target.places.items()
        for place in places
    )
    tile = max(TILE_BYTES, widest)
    each = (_PLAIN_TILES + (_CONVERSION_TILES if converted else 0)) * tile + STAGES_BYTES + HASH_BLOCK_BYTES
    return Estimate(
        read_bytes=tensors + sum(path.stat().st_size for name, path in again.items() if name not in once),
        write_bytes=target.size_bytes,
        files=len(target.files) + len(target.documents) + 1,
        memory_bytes=job_count(jobs) * each + _FIXED_BYTES,
    )


_PLAIN_TILES = (
    7  # the tile, those on their way to SHA-256, stored rows that one is put together from, one read back
)
_CONVERSION_TILES = 6  # of smaller ones: values, their bits, the rounding's intermediate results
_FIXED_BYTES = 24 * 2**20  # plan, certificate, stacks of threads


def convert(
    weights: Weights,
    target: Target,
    out_dir: Path,
    *,
    overwrite: bool = False,
    jobs: int = 0,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Write ``weights`` as ``target`` says to the folder ``out_dir``; the certificate that now lies in it.

    The folders of the source are never written into; ``overwrite`` replaces a folder that this program wrote.
    ``jobs`` threads, 0: two for each usable processor.
    The folder is complete or absent at every moment; what an interrupted run has finished is read back and
    kept by the next. Raises CannotCreate (output), DataError (source or values), IOFault (disk),
    StoppedCleanly (SIGINT, SIGTERM).
    """
    out_dir = Path(out_dir)
    tidy(out_dir.parent.resolve() / out_dir.name)
    for folder in weights.folders():
        check_output(out_dir, folder, overwrite, (CERTIFICATE,))
    goal = check_output(out_dir, None, overwrite, (CERTIFICATE,))
    check_places(weights, target)
    source = weights.identity()
    _allow_open_files(2 * len(target.files))
    check_space(goal.parent, target.size_bytes - _held_bytes(partial_folder(goal) / OUTPUT))
    with _sigterm_as_interrupt(), workplace(goal, plan_identity(target, source)) as place:
        certificate = _fill(weights, target, place, job_count(jobs), progress)
        if weights.identity() != source:
            raise DataError(
                f"{goal}: the source changed while it was read; nothing was published. Convert again when it rests"
            )
        check_output(out_dir, None, overwrite, (CERTIFICATE,))  # another run may have been faster
        place.publish()
    return certificate


def _fill(
    weights: Weights, target: Target, place: Workplace, jobs: int, progress: Progress
) -> dict[str, Any]:
    """Everything in the output folder, on the disk; the certificate."""
    by_file = places_by_file(p for places in target.places.values() for p in places)
    gaps = {file.path: free_spans(file.size, by_file.get(file.path, [])) for file in target.files}
    files: dict[str, OutFile] = {}
    try:
        for file in target.files:
            files[file.path] = _open_new(place.output, file.path)
            _write_rest(files[file.path], file, gaps[file.path], place.resumed)
        tensors, source = _move(weights, target, place, files, jobs, progress)
        for out in files.values():
            _sync(out, place)
    finally:
        for out in files.values():
            out.close()
    for name, content in target.documents.items():
        out = _open_new(place.output, name)
        try:
            os.ftruncate(out.descriptor, 0)
            out.write(memoryview(content), 0)
            _sync(out, place)
        finally:
            out.close()
    certificate = new_certificate(
        target.kind,
        source={**weights.describe(), **source},
        layout=target.layout,
        tensors={
            name: {"dtype": target.dtypes[name], "shape": list(shape), "blake3": tensors[name]}
            for name, shape in weights.shapes.items()
        },
        slices=slices(
            (p for places in target.places.values() for p in places), planned_padding(target.files, gaps)
        ),
        files={
            file.path: {"size": file.size, "rest": rest_hash(file, gaps[file.path])} for file in target.files
        },
        documents={
            name: {"size": len(content), "sha256": sha256(content).hexdigest()}
            for name, content in target.documents.items()
        },
        ignored=list(getattr(weights, "ignored", [])),
    )
    (place.output / CERTIFICATE).unlink(missing_ok=True)
    write_json(place.output / CERTIFICATE, certificate)
    _remove_strangers(place.output, {*files, *target.documents, CERTIFICATE})
    return certificate


def _move(
    weights: Weights,
    target: Target,
    place: Workplace,
    files: Mapping[str, OutFile],
    jobs: int,
    progress: Progress,
) -> tuple[dict[str, str], dict[str, Any]]:
    """Write every tensor, hash every source file; the tensors' hashes, and what is now known of the source:
    ``files`` with size and hash, and ``rounded``, the tensors that did not keep every bit, if there are any."""
    rounded: list[str] = []
    done: dict[str, str] = {}
    if place.resumed:
        done = read_back(weights, target, place, files, jobs, progress)
    certified = _certified(weights, target)
    tensors, paths = dict(done), {} if certified else weights.files()
    sources = {
        name: {"size": paths[name].stat().st_size, "sha256": digest}
        for name, digest in place.finished.get("file", {}).items()
        if name in paths
    }

    def move_one(name: str, buffers: Buffers, count: Count, feeder: Feeder | None = None) -> None:
        if name in tensors and feeder is not None:
            feed_only(weights, name, buffers, count, feeder)
            return
        tensors[name], exact = write_tensor(weights, target, name, files, buffers, count, feeder)
        if not exact:
            rounded.append(name)
        place.note("tensor", name, tensors[name])

    def hash_one(name: str, buffers: Buffers, count: Count) -> None:
        if name in lanes:
            assert isinstance(weights, StoredWeights)
            found = read_file(weights, name, lanes[name], move_one, buffers, count)
        else:
            found = sha256_file(paths[name], buffers, lambda _: count(0))
        sources[name] = found
        place.note("file", name, found["sha256"])

    def written(name: str) -> int:
        return sum(_bytes_of(p) for p in target.places[name])

    total = sum(map(written, target.places))
    before = sum(map(written, done))
    unhashed = [name for name in paths if name not in sources]
    lanes = {file: own for file, own in whole_tensor_files(weights).items() if file in unhashed}
    on_the_way = {place.piece.source for own in lanes.values() for place in own}
    hashing: list[Task] = [partial(hash_one, name) for name in unhashed]
    moving: list[Task] = [
        partial(move_one, name)
        for name in large_first(weights)
        if name not in done and name not in on_the_way
    ]
    work([hashing, moving], jobs, lambda size: progress("writing", before + size, total))
    progress("writing", total, total)
    if certified:
        for name, known in certified["tensors"].items():
            if tensors[name] != known["blake3"] and name not in rounded:
                raise DataError(
                    f"{weights.folders()[0]}: {name} is not what {CERTIFICATE} there says; the files are damaged. "
                    f"Convert from another copy, or remove {CERTIFICATE} to take them as they are"
                )
        sources = certified["files"]
    found: dict[str, Any] = {"files": dict(sorted(sources.items()))}
    return tensors, found | ({"rounded": sorted(rounded)} if rounded else {})


def _certified(weights: Weights, target: Target) -> dict[str, Any] | None:
    """The certificate of a source whose tensors keep their format: they are hashed on their way, and so checked
    against it, which makes hashes of the source's files superfluous."""
    if isinstance(weights, StoredWeights) and target.dtypes == weights.dtypes:
        return weights.certificate
    return None


def _open_new(folder: Path, name: str) -> OutFile:
    """A file in the output, made where it is missing; links are not followed."""
    parts = [check_plain_name(part, str(folder)) for part in name.split("/")]
    path = folder.joinpath(*parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    return OutFile(path)


def _sync(out: OutFile, place: Workplace) -> None:
    """Bring a file to the disk."""
    try:
        os.fsync(out.descriptor)
    except OSError:
        place.forget()
        raise


def _write_rest(out: OutFile, file: TargetFile, gaps: list[Span], resumed: bool) -> None:
    """Give the file its size, its headers, and zeros elsewhere (a new file has them)."""
    os.ftruncate(out.descriptor, file.size)
    if resumed:
        zeros = memoryview(bytes(HASH_BLOCK_BYTES))
        for start, stop in gaps:
            for at in range(start, stop, len(zeros)):
                out.write(zeros[: stop - at], at)
    for offset, content in file.fixed:
        out.write(memoryview(content), offset)


def _bytes_of(place: Place) -> int:
    rows, cols = place.piece.rows, place.piece.cols
    return (rows[1] - rows[0]) * (cols[1] - cols[0]) * ITEM_BYTES[place.dtype]


def _allow_open_files(number: int) -> None:
    """Raise this process's limit, as far as it may itself, by ``number``: many ranks are many files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = len(os.listdir("/proc/self/fd")) + number + 64
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _held_bytes(folder: Path) -> int:
    """Disk space that an earlier run's files take."""
    found = 0
    for parent, _, names in os.walk(folder):
        found += sum(512 * os.lstat(os.path.join(parent, name)).st_blocks for name in names)
    return found


def _remove_strangers(folder: Path, names: set[str]) -> None:
    """Nothing lies in the output but what was written; every folder's entries are brought to the disk."""
    for parent, _, found in os.walk(folder, topdown=False):
        for name in found:
            path = Path(parent) / name
            if path.relative_to(folder).as_posix() not in names:
                path.unlink()
        sync_folder(Path(parent))


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM, where the program has no handler of its own, interrupts as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    ):
        yield
        return
    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
