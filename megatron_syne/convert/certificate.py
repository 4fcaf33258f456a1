"""``certificate.json``: what was converted from what, by hash, and the check of it from the files alone.

Of every Hugging Face tensor it holds the BLAKE3 of its bytes as a reader of the folder gets them; of every
file which rectangles of which tensors lie in it, and the hash of all its other bytes; of the source each
file's SHA-256, as the Hugging Face hub shows it, and what the source's own certificate says of its source.
:func:`verify` derives all of it from the files again; the source is not needed, but can be checked as well.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from blake3 import blake3

from megatron_syne import __version__
from megatron_syne.convert.files import (
    Progress,
    exists_inside,
    open_inside,
    quiet,
    read_exactly,
    read_json_inside,
)
from megatron_syne.convert.numbers import ITEM_BYTES
from megatron_syne.convert.pieces import matrix
from megatron_syne.convert.slices import end_of, free_spans, places_by_file, slices
from megatron_syne.convert.streams import Place, StoredWeights, Weights
from megatron_syne.convert.tiles import (
    HASH_BLOCK_BYTES,
    Buffers,
    Count,
    hash_spans,
    hash_tensor,
    large_first,
    sha256_file,
)
from megatron_syne.convert.workers import Task, job_count, work
from megatron_syne.errors import DataError

CERTIFICATE = "certificate.json"
SUMS = "SHA256SUMS"
"""Of a release: SHA-256 of every other file, as ``sha256sum -c`` reads it."""
FORMAT = "megatron_syne.certificate"
VERSION = 2
KINDS = ("hf", "shards", "torch_dist")

Hashes = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Verified:
    """What a verification went through."""

    kind: str
    files: int
    tensors: int
    size_bytes: int
    fingerprint: str
    notes: list[str] = field(default_factory=list)
    """What a reader should know: tensors whose format is not the source's, a source that was not compared."""


def new_certificate(kind: str, **parts: Any) -> dict[str, Any]:
    """A certificate of a folder of ``kind`` with the given parts."""
    tool = f"megatron_syne {__version__}"
    return {"format": FORMAT, "version": VERSION, "tool": tool, "kind": kind, **parts}


def read_certificate(folder: Path) -> dict[str, Any]:
    """The certificate of a folder. Raises MissingInput, or DataError where it is not one of this version."""
    raw = read_json_inside(folder, CERTIFICATE)
    where = str(folder / CERTIFICATE)
    if raw.get("format") != FORMAT or raw.get("version") != VERSION:
        older = raw.get("format") == FORMAT and raw.get("version") == 1
        raise DataError(
            f"{where}: format {raw.get('format')!r} version {raw.get('version')!r}; this program reads "
            f"{FORMAT!r} version {VERSION}" + ("; convert the source again" if older else "")
        )
    try:
        source = raw["source"]
        good = raw["kind"] in KINDS and isinstance(raw["tool"], str)
        good &= isinstance(raw["ignored"], list) and isinstance(raw["layout"], dict)
        good &= all(_has(t, dtype=str, shape=list, blake3=str) for t in raw["tensors"].values())
        good &= all(_has(f, size=int, rest=str) for f in raw["files"].values())
        good &= all(_has(d, size=int, sha256=str) for d in raw["documents"].values())
        good &= all(
            _has(f, size=int, sha256=str) or _has(f, size=int, rest=str) for f in source["files"].values()
        )
        good &= all(
            _has(p, pieces=list) and "padding_rows" in p
            for parameters in raw["slices"].values()
            for p in parameters.values()
        )
    except (KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise DataError(
            f"{where}: malformed: expected kind, tool, source, layout, tensors, slices, files, documents, "
            f"ignored as megatron_syne writes them"
        )
    return raw


def _has(entry: Mapping[str, Any], **types: type) -> bool:
    return all(type(entry.get(key)) is kind for key, kind in types.items())


def weights_fingerprint(tensors: Mapping[str, Mapping[str, Any]]) -> str:
    """One hash over all Hugging Face tensors: the same however they are cut and stored."""
    digest = blake3()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor['dtype']} {list(tensor['shape'])} {tensor['blake3']}\n".encode())
    return f"blake3:{digest.hexdigest()}"


def verify(folder: Path, source: Path | None = None, jobs: int = 0, progress: Progress = quiet) -> Verified:
    """Check a folder against its certificate, all of it derived from the files again.

    With ``source``, a folder of weights in any format, the certificate's source files and tensors are compared
    with it. Raises MissingInput, SecurityRefusal, and DataError that names the first difference.
    """
    from megatron_syne.convert.formats.detect import open_weights  # which reads certificates itself

    folder = Path(folder)
    certificate = read_certificate(folder)
    _check_listing(folder, certificate)
    _check_documents(folder, certificate["documents"])
    if exists_inside(folder, SUMS):
        _check_sums(folder, {*certificate["files"], *certificate["documents"], CERTIFICATE})
    weights = open_weights(folder)
    try:
        _check_plan(folder, certificate, weights)
        read = _verify_bytes(folder, certificate, weights, jobs, progress)
    finally:
        weights.close()
    notes = [] if source is None else _verify_source(folder, certificate, Path(source), jobs, progress)
    return Verified(
        kind=certificate["kind"],
        files=len(certificate["files"]) + len(certificate["documents"]),
        tensors=len(certificate["tensors"]),
        size_bytes=read,
        fingerprint=weights_fingerprint(certificate["tensors"]),
        notes=notes,
    )


def _check_listing(folder: Path, certificate: dict[str, Any]) -> None:
    listed = {*certificate["files"], *certificate["documents"], CERTIFICATE}
    if exists_inside(folder, SUMS):
        listed.add(SUMS)
    found = set()
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        found |= {(Path(parent) / name).relative_to(folder).as_posix() for name in (*names, *links)}
    for name in sorted(listed - found):
        raise DataError(f"{folder / name}: missing, but the certificate lists it")
    for name in sorted(found - listed):
        raise DataError(f"{folder / name}: not in the certificate; the conversion did not write it")


def _check_sums(folder: Path, names: set[str]) -> None:
    """Check a release's ``SHA256SUMS``, which is made after the certificate and so not in it."""
    recorded: dict[str, str] = {}
    with os.fdopen(open_inside(folder, SUMS), "rb") as stream:
        for number, line in enumerate(stream.read(2**20).decode(errors="replace").splitlines(), 1):
            match = re.fullmatch(r"([0-9a-f]{64})  (.+)", line)
            if match is None:
                raise DataError(f"{folder / SUMS}:{number}: not a line of sha256sum: {line[:80]!r}")
            recorded[match[2]] = match[1]
    _compare(f"{folder / SUMS}: files", dict.fromkeys(recorded, 0), dict.fromkeys(names, 0))
    for name, expected in recorded.items():
        with os.fdopen(open_inside(folder, *name.split("/")), "rb") as stream:
            found = hashlib.sha256()
            while block := stream.read(HASH_BLOCK_BYTES):
                found.update(block)
        _compare(f"{folder / name}", {SUMS: expected}, {SUMS: found.hexdigest()})


def _check_documents(folder: Path, documents: Mapping[str, dict[str, Any]]) -> None:
    for name, recorded in sorted(documents.items()):
        path = folder / name
        with os.fdopen(open_inside(folder, *name.split("/")), "rb") as stream:
            size, content = 0, hashlib.sha256()
            while block := stream.read(HASH_BLOCK_BYTES):
                content.update(block)
                size += len(block)
        _compare(str(path), recorded, {"size": size, "sha256": content.hexdigest()})


def _check_plan(folder: Path, certificate: dict[str, Any], weights: StoredWeights) -> None:
    """Kind, names, formats, shapes, file sizes and slices, before any weight is read."""
    _compare(f"{folder}: kind", {"": certificate["kind"]}, {"": weights.kind})
    tensors, files = certificate["tensors"], certificate["files"]
    _compare(f"{folder}: dtype", {n: t["dtype"] for n, t in tensors.items()}, weights.dtypes)
    shapes = {name: list(shape) for name, shape in weights.shapes.items()}
    _compare(f"{folder}: shape", {n: t["shape"] for n, t in tensors.items()}, shapes)
    sizes = {name: os.fstat(descriptor).st_size for name, descriptor in weights.descriptors.items()}
    _compare(f"{folder}: size", {n: f["size"] for n, f in files.items()}, sizes)
    recorded = certificate["slices"]
    by_file = places_by_file(_all_places(weights))
    starts = {file: sorted(p.rows_at(p.piece.rows)[0] for p in own) for file, own in by_file.items()}

    def padding(file: str, last: Place) -> list[int] | None:
        """The recorded padding, if it goes from the last piece to no further than what comes next, in zeros."""
        entry = recorded.get(file, {}).get(last.parameter, {}).get("padding_rows")
        if entry is None:
            return None
        filled, end = end_of(last)
        stride = last.columns * ITEM_BYTES[last.dtype]
        room = min((start for start in starts[file] if start >= end), default=sizes[file]) - end
        if not (isinstance(entry, list) and len(entry) == 2 and all(type(x) is int for x in entry)):
            raise DataError(
                f"{folder / CERTIFICATE}: padding_rows of {last.parameter}: expected [start, stop]"
            )
        if entry[0] != filled or not filled < entry[1] <= filled + room // stride:
            return [filled, filled]
        stop = end + (entry[1] - filled) * stride
        for at in range(end, stop, HASH_BLOCK_BYTES):
            block = bytearray(min(HASH_BLOCK_BYTES, stop - at))
            read_exactly(weights.descriptors[file], memoryview(block), at, str(folder / file))
            if any(block):
                raise DataError(f"{folder / file}: {last.parameter}: rows {entry} are padding, but not zero")
        return entry

    found = slices(_all_places(weights), padding)
    _compare(f"{folder}: slices", dict.fromkeys(recorded, 0), dict.fromkeys(found, 0))
    for file in sorted(found):
        _compare(f"{folder / file}: slices", recorded[file], found[file])


def _all_places(weights: StoredWeights) -> list[Place]:
    return [p for source in (weights.places, weights.replicas) for own in source.values() for p in own]


def _verify_bytes(
    folder: Path, certificate: dict[str, Any], weights: StoredWeights, jobs: int, progress: Progress
) -> int:
    """Hash every tensor and the rest of every file, and compare; bytes of the files."""
    tensors: dict[str, str] = {}
    rest: dict[str, str] = {}

    def hash_one(name: str, buffers: Buffers, count: Count) -> None:
        dtype = weights.dtypes[name]
        also = [p for p in weights.places[name] if p.dtype != dtype or p.shift]
        tensors[name] = hash_tensor(
            weights, name, dtype, [*also, *weights.replicas.get(name, ())], buffers, count
        )

    def hash_rest(file: str, own: list[Place], buffers: Buffers, count: Count) -> None:
        descriptor = weights.descriptors[file]
        gaps = free_spans(os.fstat(descriptor).st_size, own)
        rest[file] = hash_spans(descriptor, gaps, blake3(), str(folder / file), buffers, count)

    by_file = places_by_file(_all_places(weights))
    tasks: list[Task] = [partial(hash_one, name) for name in large_first(weights)]
    tasks += [partial(hash_rest, file, by_file.get(file, [])) for file in weights.descriptors]
    total = sum(file["size"] for file in certificate["files"].values())
    work([tasks], job_count(jobs), lambda done: progress("verifying", min(done, total), total))
    for name, recorded in certificate["tensors"].items():
        if tensors[name] != recorded["blake3"]:
            files = ", ".join(sorted({place.file for place in weights.places[name]}))
            raise DataError(
                f"{folder}: {name} (in {files}) is not what the certificate says: blake3 {tensors[name]}, "
                f"recorded {recorded['blake3']}"
            )
    for file, entry in certificate["files"].items():
        if rest[file] != entry["rest"]:
            raise DataError(
                f"{folder / file}: its bytes beside the tensors (header, padding) are not what the certificate says"
            )
    progress("verifying", total, total)
    return int(total)


def _verify_source(
    folder: Path, certificate: dict[str, Any], source: Path, jobs: int, progress: Progress
) -> list[str]:
    """Compare with a folder that should be what the certificate's was made from, at one remove or more; notes."""
    from megatron_syne.convert.formats.detect import open_weights

    weights = open_weights(source)
    try:
        paths, tensors = weights.files(), certificate["tensors"]
        origin, changed_by, rounded = _origin(certificate["source"], set(paths))
        missing = [name for name in origin["files"] if name not in paths]
        if missing:
            raise DataError(
                f"{source}: {missing[0]} is not there, but {folder} was made from a file of that name"
            )
        notes = []
        names: list[str] = []
        if changed_by:
            notes.append(f"{changed_by} changed the weights: of {source} the files alone are compared")
        else:
            shapes = {name: list(shape) for name, shape in weights.shapes.items()}
            _compare(f"{source}: shape", {name: t["shape"] for name, t in tensors.items()}, shapes)
            names = [name for name in large_first(weights) if name not in rounded]
            notes += _format_changes(weights, tensors)
            if rounded:
                notes.append(
                    f"{len(rounded)} tensors were rounded, less 1 in fp32: {', '.join(sorted(rounded))}"
                )
        hashes: dict[str, str] = {}
        found: Hashes = {}

        def hash_file(name: str, buffers: Buffers, count: Count) -> None:
            found[name] = sha256_file(paths[name], buffers, count)

        def hash_one(name: str, buffers: Buffers, count: Count) -> None:
            hashes[name] = hash_tensor(weights, name, tensors[name]["dtype"], [], buffers, count)

        flat = [name for name, entry in origin["files"].items() if "sha256" in entry]
        files: list[Task] = [partial(hash_file, name) for name in flat]
        todo: list[Task] = [partial(hash_one, name) for name in names]
        total = sum(paths[name].stat().st_size for name in flat)
        total += sum(matrix(weights.shapes[n])[0] * weights.row_bytes(n) for n in names)
        work([files, todo], job_count(jobs), lambda done: progress("source", min(done, total), total))
        where = f"is not the file that {folder} was made from"
        for name in flat:
            _compare(f"{source / name} {where}", dict(origin["files"][name]), found[name])
        if weights.certificate is not None:  # its tensors are compared below, so this covers the files
            for name in set(origin["files"]) - set(flat):
                entry = weights.certificate["files"].get(name, {})
                _compare(f"{source / name} {where}", dict(origin["files"][name]), entry)
        for name in tensors:
            if name in hashes and hashes[name] != tensors[name]["blake3"]:
                raise DataError(f"{source}: {name} is not the tensor that {folder} holds")
        progress("source", total, total)
        return notes
    finally:
        weights.close()


def _origin(source: dict[str, Any], names: set[str]) -> tuple[dict[str, Any], str, set[str]]:
    """The source, or the source's own and so on, that has all its files among ``names`` (the first of all where
    none has); from there on, the kind of an operation that changed the weights, and the tensors that did not
    keep every bit."""
    changed_by, rounded, step = "", set(), source
    while isinstance(step, dict):
        kind = str(step.get("kind"))
        changed_by = changed_by or ("" if kind in (*KINDS, "megatron_pt") else kind)
        rounded |= {str(name) for name in step.get("rounded") or ()}
        files = step.get("files")
        if isinstance(files, dict) and files and set(files) <= names:
            return step, changed_by, rounded
        step = step.get("certificate")  # type: ignore[assignment]
    return source, changed_by, rounded


def _format_changes(weights: Weights, tensors: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One note for each pair of formats between which tensors were converted."""
    pairs: dict[str, int] = {}
    for name, tensor in tensors.items():
        if weights.dtypes[name] != tensor["dtype"]:
            pair = f"{weights.dtypes[name]} to {tensor['dtype']}"
            pairs[pair] = pairs.get(pair, 0) + 1
    return [f"{number} tensors were converted from {pair}" for pair, number in sorted(pairs.items())]


def _compare(what: str, recorded: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    for name in [*recorded, *(name for name in found if name not in recorded)]:
        where = f"{what}: {name}" if name else what
        if name not in recorded or name not in found:
            raise DataError(f"{where} is {'not in the certificate' if name in found else 'not there'}")
        if recorded[name] != found[name]:
            raise DataError(f"{where} is {found[name]}, the certificate says {recorded[name]}")
