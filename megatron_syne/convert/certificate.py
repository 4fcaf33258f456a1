"""``certificate.json``: what was converted from what, by hash, and the check of it from the files alone.

Of shards it holds: the source's files and tensors, each shard file, and for every tensor in it the rectangles
of source tensors that it is made of and its padding. :func:`verify` hashes the files, puts every source tensor
together again from the shards and compares; the source itself is not needed, but can be checked as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_syne import __version__
from megatron_syne.convert.files import (
    Progress,
    quiet,
    read_json_inside,
    sha256_inside,
)
from megatron_syne.convert.pieces import Entry, Kind, Piece, local_shape, matrix, pieces
from megatron_syne.convert.safetensors_io import DTYPES, TensorFile, tensor_sha256
from megatron_syne.convert.shards_io import WEIGHTS, Layout, open_shards, rank_folder, read_manifest
from megatron_syne.convert.table import hf_tensors
from megatron_syne.errors import DataError

CERTIFICATE = "certificate.json"
FORMAT = "megatron_syne.certificate"
VERSION = 1


@dataclass(frozen=True)
class Verified:
    """What a verification went through."""

    kind: str
    files: int
    tensors: int
    size_bytes: int
    fingerprint: str


def new_certificate(kind: str, **parts: Any) -> dict[str, Any]:
    """A certificate of ``kind`` (``shards`` or ``hf``) with the given parts."""
    tool = f"megatron_syne {__version__}"
    return {"format": FORMAT, "version": VERSION, "tool": tool, "kind": kind, **parts}


def read_certificate(folder: Path) -> dict[str, Any]:
    """The certificate of a folder. Raises MissingInput, or DataError where it is not one."""
    raw = read_json_inside(folder, CERTIFICATE)
    where = str(folder / CERTIFICATE)
    if raw.get("format") != FORMAT or raw.get("version") != VERSION:
        raise DataError(
            f"{where}: format {raw.get('format')!r} version {raw.get('version')!r}; "
            f"this program reads {FORMAT!r} version {VERSION}"
        )
    try:
        good = raw["kind"] in ("hf", "shards")
        good &= all({"dtype", "shape", "sha256"} <= set(tensor) for tensor in raw["tensors"].values())
        files = raw["files"] | (raw["source"]["files"] if raw["kind"] == "shards" else {})
        good &= all(isinstance(sha256, str) for sha256 in files.values())
        if raw["kind"] == "shards":
            good &= all(isinstance(rank, dict) for rank in raw["shards"].values())
            good &= isinstance(raw["ignored"], list)
    except (KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise DataError(
            f"{where}: malformed: expected kind, files, tensors; of shards source, shards, ignored"
        )
    return raw


def weights_fingerprint(tensors: Mapping[str, Mapping[str, Any]]) -> str:
    """One hash over all Hugging Face tensors: the same however they are cut and stored."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor['dtype']} {tensor['shape']} {tensor['sha256']}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def describe_shard(entry: Entry, layout: Layout, tp_rank: int, sha256: str) -> dict[str, Any]:
    """How one tensor of a shard stands in the certificate: its hash, its pieces as text, its padding rows."""
    rows = local_shape(entry, layout.model, layout.tp_size)[0]
    own = pieces(entry, layout.model, tp_rank, layout.tp_size)
    filled = max((p.at[0] + p.rows[1] - p.rows[0] for p in own), default=0)
    return {
        "sha256": sha256,
        "pieces": [str(piece) for piece in own],
        "padding_rows": [filled, rows] if filled < rows else None,
    }


def verify(folder: Path, source: Path | None = None, progress: Progress = quiet) -> Verified:
    """Check a folder of shards or an exported Hugging Face folder against its certificate.

    With ``source`` the files that the shards were made from are hashed as well. Raises DataError that names
    the first difference.
    """
    certificate = read_certificate(folder)
    sizes, hashes = _check_files(folder, certificate["files"], progress)
    if certificate["kind"] == "shards":
        _check_shards(folder, certificate, hashes, progress)
    else:
        found = {name: sha for tensors in hashes.values() for name, sha in tensors.items()}
        recorded = {name: tensor["sha256"] for name, tensor in certificate["tensors"].items()}
        _compare(f"{folder}: tensors", recorded, found)
    if source is not None and certificate["kind"] == "shards":
        for name, recorded_hash in certificate["source"]["files"].items():
            if sha256_inside(source, name) != recorded_hash:
                raise DataError(f"{source / name}: is not the file that {folder} was made from")
    return Verified(
        kind=certificate["kind"],
        files=len(certificate["files"]),
        tensors=len(certificate["tensors"]),
        size_bytes=sizes,
        fingerprint=weights_fingerprint(certificate["tensors"]),
    )


def _check_files(
    folder: Path, files: Mapping[str, str], progress: Progress
) -> tuple[int, dict[str, dict[str, str]]]:
    """Hash every file; total size of the weights, and the tensors' hashes of each weight file."""
    opened = {n: TensorFile(folder, *n.split("/")) for n in files if n.endswith(".safetensors")}
    total = sum(file.size for file in opened.values())
    done, hashes = 0, {}

    def count(size: int) -> None:
        nonlocal done
        done += size
        progress("hashing", done, total)

    for name, recorded in sorted(files.items()):
        if name in opened:
            found, hashes[name] = opened[name].hash(count)
            opened[name].close()
        else:
            found = sha256_inside(folder, *name.split("/"))
        if found != recorded:
            raise DataError(f"{folder / name}: differs from the certificate: sha256 {found}, was {recorded}")
    return total, hashes


def _check_shards(
    folder: Path, certificate: dict[str, Any], hashes: dict[str, dict[str, str]], progress: Progress
) -> None:
    layout = read_manifest(folder)
    store = open_shards(folder, layout)
    recorded, tensors = certificate["shards"], certificate["tensors"]
    for tp_rank, pp_rank in layout.ranks():
        rank = rank_folder(tp_rank, pp_rank)
        found = hashes.get(f"{rank}/{WEIGHTS}", {})
        expected = {
            entry.megatron: describe_shard(entry, layout, tp_rank, found.get(entry.megatron, ""))
            for entry in layout.stage(pp_rank)
        }
        _compare(f"{folder / rank}: tensors", recorded.get(rank, {}), expected)
        for entry in layout.stage(pp_rank):  # of replicas the store reads the first only
            if entry.kind is Kind.DIRECT:
                (name,) = entry.hf
                if found[entry.megatron] != tensors.get(name, {}).get("sha256"):
                    raise DataError(f"{folder / rank}: {entry.megatron} is not the source's {name}")
        _check_padding(folder / rank, expected)
    shapes = hf_tensors(layout.model)
    _compare(f"{folder}: tensors of the source", dict.fromkeys(tensors, 0), dict.fromkeys(shapes, 0))
    for index, (name, shape) in enumerate(shapes.items(), 1):
        rows, cols = matrix(shape)
        whole = [Piece(name, (0, rows), (0, cols), (0, 0))]
        if tensor_sha256(store.read(shape, whole, store.dtype(name))) != tensors[name]["sha256"]:
            raise DataError(f"{folder}: {name}, put together from the shards, is not the source's")
        progress("putting together", index, len(shapes))
    for file in store.files():
        file.close()


def _check_padding(rank: Path, shards: Mapping[str, Any]) -> None:
    file = TensorFile(rank, WEIGHTS)
    for name, shard in shards.items():
        if shard["padding_rows"] is not None:
            start, stop = shard["padding_rows"]
            info = file.tensors[name]
            rest = torch.empty((stop - start, matrix(info.shape)[1]), dtype=DTYPES[info.dtype])
            file.read_into(rest, name, (start, stop), (0, rest.shape[1]))
            if rest.count_nonzero():
                raise DataError(f"{rank}: {name}: rows {start} to {stop} are padding, but not zero")
    file.close()


def _compare(what: str, recorded: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    for name in sorted(set(recorded) | set(found)):
        if name not in recorded or name not in found:
            raise DataError(f"{what}: {name} is {'not in the certificate' if name in found else 'not there'}")
        if recorded[name] != found[name]:
            raise DataError(f"{what}: {name} differs from the certificate")
