"""The ``.json`` beside token files: what it must hold, read with every used field checked."""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path
from typing import Any

from megatron_syne.errors import DataError, MissingInput

MANIFEST_FORMAT = "megatron_syne.tokens"
MANIFEST_VERSION = 1

_BLOCK = 1 << 20
_MAX_MANIFEST_BYTES = 1 << 26


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


_FIELDS: dict[str, type] = {
    "dtype": str,
    "max_token_id": int,
    "counts.documents": int,
    "counts.tokens": int,
    "tokenizer.vocab_size": int,
    "tokenizer.fingerprint": str,
    "files.bin.bytes": int,
    "files.bin.sha256": str,
    "files.idx.bytes": int,
    "files.idx.sha256": str,
}


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, with the fields that are used checked for presence and type (MissingInput, DataError)."""
    require_file(path, "the preparation did not finish, or another tool made these files; prepare them again")
    if (size := path.stat().st_size) > _MAX_MANIFEST_BYTES:
        raise DataError(f"{path}: {size} bytes is no manifest (limit {_MAX_MANIFEST_BYTES})")
    try:
        manifest = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        raise DataError(f"{path}: not a manifest of prepared tokens (format {MANIFEST_FORMAT!r} expected)")
    if manifest.get("version") != MANIFEST_VERSION:
        raise DataError(
            f"{path}: version {manifest.get('version')!r}; this program reads {MANIFEST_VERSION}; "
            f"prepare it again"
        )
    for field, kind in _FIELDS.items():
        value: Any = manifest
        for part in field.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if type(value) is not kind:
            raise DataError(f"{path}: field {field} must be a {kind.__name__}, found {value!r}")
    return manifest


def require_file(path: Path, remedy: str) -> None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise MissingInput(f"{path}: {error.strerror}; {remedy}") from None
    if not stat.S_ISREG(mode):
        raise DataError(f"{path}: not a regular file")
