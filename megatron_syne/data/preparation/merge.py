"""The shards of a preparation, concatenated to the very files that one run would have given."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_syne.data.documents.atomic import Outputs
from megatron_syne.data.preparation.counts import manifest_bytes
from megatron_syne.data.preparation.job import shard_prefix
from megatron_syne.data.tokens.fields import HEADER_BYTES, NumberWriter
from megatron_syne.data.tokens.indexed import IDX_HEADER_BYTES, IndexedWriter
from megatron_syne.data.tokens.manifest import read_manifest
from megatron_syne.errors import DataError, MissingInput

_PIECE = 1 << 20
_SHARD = re.compile(r"\.shard-(\d{5})-of-(\d{5})\.json")


def merge(
    prefix: str | Path,
    shards: int | None = None,
    keep_shards: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Merge all shards of ``prefix``, check every byte of them on the way, remove them; returns the manifest.

    Raises MissingInput where a shard (of ``shards``, if given) is not finished, DataError where they differ in
    inputs, options or tokenizer or are damaged, CannotCreate. What was merged before is left alone. Killed at any
    moment it is done by giving it again: ``PREFIX.merging`` says how far it was.
    """
    prefix = str(prefix)
    mark = _Mark(prefix)
    if (left := mark.merged()) is not None:
        _remove(left)
        mark.clear()
        return read_manifest(Path(f"{prefix}.json"))
    names = _find(prefix, shards)
    if not names:
        if os.path.exists(f"{prefix}.json"):
            if say is not None:
                say(f"{prefix}: merged before; nothing to do")
            return read_manifest(Path(f"{prefix}.json"))
        raise MissingInput(
            f"{prefix}: no shards here (expected {shard_prefix(prefix, 0, shards or 1)}.json ...)"
        )
    manifests = [read_manifest(Path(f"{name}.json")) for name in names]
    _check_alike(names, manifests)
    with Outputs(overwrite=overwrite or mark.exists()) as outputs:
        merged = _concatenate(prefix, names, manifests, outputs)
        seal = outputs.create(f"{prefix}.json", seal=True)
        merged["sources"] = _join_sources([one for manifest in manifests for one in manifest["sources"]])
        if merged["counts"]["documents"] == 0:
            raise DataError(f"{prefix}: no document is left of {merged['counts']['lines']} lines")
        seal.write(manifest_bytes(merged))
        mark.set([])
        outputs.publish()
    if not keep_shards:
        endings = [".json", ".bin", ".idx", ".quarantine.jsonl"]
        endings += [f".{field}.npy" for field in merged.get("fields", {})]
        left = [name + ending for ending in endings for name in names]
        mark.set(left)
        _remove(left)
    mark.clear()
    return merged


class _Mark:
    """``PREFIX.merging``: there from before the files get their names until the shards are gone."""

    def __init__(self, prefix: str) -> None:
        self._path = Path(f"{prefix}.merging")
        self._folder = self._path.parent

    def exists(self) -> bool:
        """Whether a merge was killed here."""
        return self._path.exists()

    def merged(self) -> list[str] | None:
        """Files of shards still to be removed, where everything else was done; else None."""
        try:
            names = json.loads(self._path.read_bytes() or b"[]")
        except (FileNotFoundError, ValueError):  # a kill while it was written: before anything was removed
            return None
        known = re.compile(re.escape(self._path.stem) + r"\.shard-\d{5}-of-\d{5}\.[\w.-]+")
        good = isinstance(names, list) and all(
            isinstance(name, str) and known.fullmatch(name) for name in names
        )
        if not good:
            raise DataError(f"{self._path}: is not what a merge leaves; remove it and merge again")
        return [str(self._folder / name) for name in names] or None

    def set(self, left: list[str]) -> None:
        """Say that files get their names now (``left`` empty), or which files are still to be removed."""
        with open(self._path, "wb") as stream:
            stream.write(json.dumps([os.path.basename(name) for name in left]).encode())
            stream.flush()
            os.fsync(stream.fileno())

    def clear(self) -> None:
        """Everything is done."""
        self._path.unlink(missing_ok=True)


def _remove(files: list[str]) -> None:
    for file in files:
        Path(file).unlink(missing_ok=True)


def _find(prefix: str, shards: int | None) -> list[str]:
    """Prefixes of all shards, in order; empty where there are none at all."""
    found: dict[int, set[int]] = {}
    for file in glob.glob(f"{glob.escape(prefix)}.shard-*-of-*.json"):
        if match := _SHARD.fullmatch(file[len(prefix) :]):
            found.setdefault(int(match[2]), set()).add(int(match[1]))
    if shards is None and len(found) > 1:
        raise DataError(f"{prefix}: shards of {sorted(found)} lie here; say which with --shards")
    count = shards if shards is not None else next(iter(found), 0)
    here = found.get(count, set())
    if not here:
        return []
    if missing := sorted(set(range(count)) - here):
        numbers = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        raise MissingInput(
            f"{prefix}: {len(missing)} of {count} shards are not finished: {numbers}; "
            f"run them with --shard {missing[0]}/{count} and so on"
        )
    return [shard_prefix(prefix, index, count) for index in range(count)]


def _check_alike(names: list[str], manifests: list[dict[str, Any]]) -> None:
    for index, (name, manifest) in enumerate(zip(names, manifests, strict=True)):
        shard = manifest.get("shard")
        if not isinstance(shard, dict) or (shard.get("index"), shard.get("count")) != (index, len(names)):
            raise DataError(f"{name}.json: is not shard {index} of {len(names)}, but {shard!r}")
        if shard.get("request") != manifests[0]["shard"]["request"]:
            raise DataError(
                f"{name}.json: was made from other inputs, with other options or with another tokenizer than "
                f"{names[0]}; make it again with --overwrite"
            )


def _concatenate(
    prefix: str, names: list[str], manifests: list[dict[str, Any]], outputs: Outputs
) -> dict[str, Any]:
    """Write everything but the seal; returns the manifest, its ``sources`` still to do."""
    first = manifests[0]
    writer = IndexedWriter(
        outputs.create(f"{prefix}.bin"), outputs.create(f"{prefix}.idx"), np.dtype(first["dtype"])
    )
    columns = {
        field: NumberWriter(outputs.create(f"{prefix}.{field}.npy")) for field in first.get("fields", {})
    }
    quarantine = outputs.create(f"{prefix}.quarantine.jsonl", optional=True)
    for name, manifest in zip(names, manifests, strict=True):
        counts, files = manifest["counts"], manifest["files"]
        for piece in _checked(f"{name}.bin", files["bin"]):
            writer.add_tokens(piece)
        lengths = (IDX_HEADER_BYTES, IDX_HEADER_BYTES + 4 * counts["documents"])
        for piece in _checked(f"{name}.idx", files["idx"], lengths):
            writer.add_lengths(np.frombuffer(piece, dtype="<i4"))
        for field, column in columns.items():
            described, size = manifest["fields"][field], HEADER_BYTES + 8 * counts["documents"]
            for piece in _checked(f"{name}.{field}.npy", described, (HEADER_BYTES, size)):
                column.add(np.frombuffer(piece, dtype="<f8"))
        _copy_quarantine(name, counts["dropped"]["malformed"], quarantine)
    merged = {key: value for key, value in first.items() if key != "shard"}
    merged["max_token_id"] = max(manifest["max_token_id"] for manifest in manifests)
    merged["counts"] = _add_up([manifest["counts"] for manifest in manifests])
    merged["files"] = writer.finish()
    if columns:
        merged["fields"] = {field: column.finish() for field, column in columns.items()}
    return merged


def _checked(path: str, described: dict[str, Any], span: tuple[int, int] | None = None) -> Iterator[bytes]:
    """Bytes of a file (of ``span``), held to its size and SHA-256."""
    digest, at = hashlib.sha256(), 0
    begin, end = span if span is not None else (0, described["bytes"])
    try:
        with open(path, "rb") as stream:
            whole = os.fstat(stream.fileno()).st_size == described["bytes"]
            for wanted, stop in ((False, begin), (True, end), (False, described["bytes"])):
                while whole and (piece := stream.read(min(_PIECE, stop - at))):
                    digest.update(piece)
                    at += len(piece)
                    if wanted:
                        yield piece
    except FileNotFoundError:
        raise MissingInput(f"{path}: no such file; make this shard again with --overwrite") from None
    if not whole or digest.hexdigest() != described["sha256"]:
        raise DataError(
            f"{path}: is not what its manifest describes: damaged; make this shard again with --overwrite"
        )


def _copy_quarantine(name: str, malformed: int, out: BinaryIO) -> None:
    path, lines = f"{name}.quarantine.jsonl", 0
    if os.path.exists(path):
        with open(path, "rb") as stream:
            while piece := stream.read(_PIECE):
                lines += piece.count(b"\n")
                out.write(piece)
    if lines != malformed:
        raise DataError(f"{path}: {lines} lines, but the manifest counts {malformed} malformed ones")


def _add_up(counts: list[Any]) -> Any:
    """Sums of nested counts."""
    if isinstance(counts[0], dict):
        return {key: _add_up([one[key] for one in counts]) for key in counts[0]}
    return sum(counts)


def _join_sources(sources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Files read in parts as one again, read once more and held to the digest of each part (DataError)."""
    joined: list[dict[str, Any]] = []
    index = 0
    while index < len(sources):
        file = sources[index]["file"]
        if "start" not in sources[index]:
            joined.append(sources[index])
            index += 1
            continue
        whole, at = hashlib.sha256(), 0
        try:
            with open(file, "rb") as stream:
                while index < len(sources) and sources[index]["file"] == file:
                    part, digest, left = sources[index], hashlib.sha256(), sources[index]["bytes"]
                    while piece := stream.read(min(_PIECE, left)):
                        digest.update(piece)
                        whole.update(piece)
                        left -= len(piece)
                    if part["start"] != at or digest.hexdigest() != part["sha256"]:
                        raise DataError(
                            f"{file}: bytes {part['start']} on are not what the shards read: changed since"
                        )
                    at += part["bytes"]
                    index += 1
                if stream.read(1):
                    raise DataError(
                        f"{file}: is longer than the {at} bytes that the shards read: changed since"
                    )
        except OSError as error:
            raise MissingInput(f"{file}: is needed to check the shards: {error.strerror}") from None
        joined.append({"file": file, "bytes": at, "sha256": whole.hexdigest()})
    return joined
