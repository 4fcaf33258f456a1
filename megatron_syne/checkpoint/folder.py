"""The folder of a checkpoint: what makes it complete, and which one is the newest.

A checkpoint is written into ``iter_0000100.tmp`` and renamed to ``iter_0000100`` once every file is on disk
and listed, with its size, in ``manifest.json``. So a folder with the final name is whole, or was damaged
later, which the sizes show. Nothing points at the newest one: the folder names say it. No torch.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

from megatron_syne.errors import DataError, SecurityRefusal

FORMAT = {"format": "megatron_syne.checkpoint", "version": 1}
MANIFEST = "manifest.json"
_NAME = re.compile(r"iter_(\d{7,})")
logger = logging.getLogger(__name__)

# All that torch's and megatron-core's writers put into the pickled ``.metadata``, name by name: whole modules
# would let functions in, and some of those load other files.
_DCP = "torch.distributed.checkpoint."
_ALLOWED = {
    *((_DCP + "metadata", name) for name in (
        "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata",
        "ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
    )),
    *((_DCP + "planner", name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    (_DCP + "filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    *(("torch", name) for name in (
        "float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool",
    )),
}  # fmt: skip


def checkpoint_path(root: Path, step: int) -> Path:
    """Folder of the checkpoint after ``step`` iterations."""
    return root / f"iter_{step:07d}"


def step_of(path: Path) -> int:
    """Iteration in a checkpoint folder's name; -1 where the name is not one."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def is_checkpoint(path: Path) -> bool:
    """Whether a folder looks like a checkpoint of this stack (it may still turn out damaged)."""
    return (path / MANIFEST).is_file() and (path / ".metadata").exists()


def seal(folder: Path, content: dict[str, Any]) -> None:
    """Sync every file of a finished temporary folder to disk and write its manifest last."""
    sizes = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        _sync(file)
        sizes[file.relative_to(folder).as_posix()] = file.stat().st_size
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({**FORMAT, **content, "files": sizes}, indent=1) + "\n")
    _sync(manifest)
    _sync(folder)


def publish(temporary: Path, final: Path) -> None:
    """Give a sealed folder its final name; from here on it is *the* checkpoint."""
    if final.exists():  # the same step saved again: the newer replaces the older
        shutil.rmtree(final)
    temporary.rename(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Manifest of a whole checkpoint; DataError names the file that is missing, short or unexpected."""
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_text())
        files = dict(manifest["files"])
    except FileNotFoundError:
        raise DataError(f"{file} is missing: {folder} is not a complete checkpoint of this stack") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: not a checkpoint manifest ({error})") from None
    if (manifest.get("format"), manifest.get("version")) != (FORMAT["format"], FORMAT["version"]):
        raise DataError(
            f"{file}: format {manifest.get('format')!r} version {manifest.get('version')!r}, "
            f"expected {FORMAT['format']!r} version {FORMAT['version']}"
        )
    present = {
        p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file() or p.is_symlink()
    }
    present.pop(MANIFEST, None)
    for name, size in files.items():
        path = present.pop(name, None)
        if path is None or path.is_symlink():
            raise DataError(f"{folder}: {name} is missing, expected {size} bytes; the checkpoint is damaged")
        if path.stat().st_size != size:
            raise DataError(
                f"{path}: {path.stat().st_size} bytes, expected {size}; the checkpoint is damaged"
            )
    if present:
        raise DataError(f"{folder}: {sorted(present)[0]} does not belong to the checkpoint; remove it")
    return manifest


def read_run(path: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint: counters, model configuration, ledger of the data, layout."""
    values: dict[str, Any] = json.loads((path / "state.json").read_text())
    return values


def checkpoint_folders(root: Path) -> list[Path]:
    """Folders with a checkpoint's name below ``root``, oldest first, whole or damaged."""
    return sorted((p for p in root.glob("iter_*") if step_of(p) >= 0), key=step_of)


def newest(root: Path) -> Path | None:
    """Newest whole checkpoint below ``root``, or None where there is none at all.

    A damaged one is passed over with a warning that names it; if all are damaged, DataError: a run never
    starts again from step 0 in silence.
    """
    damaged = []
    for folder in reversed(checkpoint_folders(root)):
        try:
            read_manifest(folder)
        except DataError as error:
            damaged.append(str(error))
            logger.warning("passing over a damaged checkpoint: %s", error)
            continue
        return folder
    if damaged:
        raise DataError(
            f"{root}: none of {len(damaged)} checkpoints is usable; the newest: {damaged[0]}. "
            "Restore one, or move them away to start afresh"
        )
    return None


def clean(root: Path, keep_latest: int) -> None:
    """Remove leftovers of interrupted saves, and all but the newest ``keep_latest`` checkpoints (0 = all)."""
    for leftover in root.glob("iter_*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    whole = checkpoint_folders(root)
    for folder in whole[:-keep_latest] if keep_latest else []:
        shutil.rmtree(folder, ignore_errors=True)


class _AllowList(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise SecurityRefusal(
                f"holds {module}.{name}, which has no place in a checkpoint's metadata; the file was not loaded"
            )
        return super().find_class(module, name)


def read_metadata(folder: Path) -> Any:
    """torch's checkpoint ``Metadata``, unpickled against an allow-list; SecurityRefusal for anything else.

    Also called before megatron-core loads a checkpoint, since the engine itself unpickles this file freely.
    """
    file = folder / ".metadata"
    try:
        with file.open("rb") as stream:
            metadata = _AllowList(stream).load()
        names = {info.relative_path for info in metadata.storage_data.values()}
    except FileNotFoundError:
        raise DataError(f"{file} is missing: not a torch_dist checkpoint") from None
    except SecurityRefusal as refusal:
        raise SecurityRefusal(f"{file} {refusal}") from None
    except Exception as error:
        raise DataError(f"{file}: not readable as checkpoint metadata ({error})") from None
    for name in names:
        if name != os.path.basename(name) or name.startswith("."):
            raise SecurityRefusal(f"{file} points to {name!r}, outside the checkpoint; it was not opened")
    return metadata
