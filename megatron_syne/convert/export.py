"""Megatron weights to a Hugging Face folder, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_syne.config.schema import ModelConfig
from megatron_syne.convert.certificate import CERTIFICATE, new_certificate
from megatron_syne.convert.files import (
    Progress,
    check_output,
    check_space,
    exists_inside,
    new_folder,
    quiet,
    read_json_inside,
    sha256_inside,
    write_json,
)
from megatron_syne.convert.hf_io import INDEX, copy_artifacts, parse_size, plan_shards, write_weights
from megatron_syne.convert.pieces import Kind, hf_shapes, matrix, pieces
from megatron_syne.convert.safetensors_io import TensorSpec
from megatron_syne.convert.source import WeightSource
from megatron_syne.convert.table import entries
from megatron_syne.errors import ConfigError, DataError
from megatron_syne.models.hf_config import hf_config_from_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEFAULT_SHARD_SIZE = "5GB"


def export_hf(
    read_full: Callable[[str], torch.Tensor],
    model: ModelConfig,
    artifacts_dir: str | Path | None,
    out_dir: str | Path,
    dtype: torch.dtype | Callable[[str], torch.dtype],
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    *,
    tokenizer_dir: str | Path | None = None,
    source_dir: str | Path | None = None,
    origin: dict[str, Any] | None = None,
    progress: Progress = quiet,
) -> Path:
    """Write a Hugging Face folder; its path.

    ``read_full(name)`` gives a whole parameter (TP = 1; the vocabulary may be padded further) by its
    local-spec name with a global layer number. ``dtype`` is one format for all, or a function of the Hugging
    Face name. ``artifacts_dir`` gives ``config.json`` to start from, generation config, tokenizer, licence;
    ``tokenizer_dir`` other tokenizer files. ``source_dir`` is what must not be written into (not given:
    ``artifacts_dir``), ``origin`` goes into the certificate. Memory: one parameter.
    Raises CannotCreate (output), ConfigError, DataError (a parameter of the wrong shape), IOFault.
    """
    out_dir = Path(out_dir)
    artifacts = None if artifacts_dir is None else Path(artifacts_dir)
    tokenizer = None if tokenizer_dir is None else Path(tokenizer_dir)
    protected = artifacts if source_dir is None else Path(source_dir)
    target = check_output(out_dir, protected, overwrite, ("config.json", CERTIFICATE))
    slicer = _Slicer(read_full, model)
    specs = [
        TensorSpec(name, dtype if isinstance(dtype, torch.dtype) else dtype(name), shape)
        for name, shape in slicer.shapes.items()
    ]
    shards = plan_shards(specs, parse_size(max_shard_size))
    total = sum(spec.size_bytes for spec in specs)
    check_space(target.parent, total)
    base = None
    if artifacts is not None and exists_inside(artifacts, "config.json"):
        base = read_json_inside(artifacts, "config.json")
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        progress("writing", done, total)

    with new_folder(target) as scratch:
        written = write_weights(scratch, shards, slicer.read, count)
        write_json(scratch / "config.json", hf_config_from_model(model, _config_dtype(specs), base=base))
        copied = ["config.json"] + ([INDEX] if len(shards) > 1 else [])
        for folder in (tokenizer, artifacts):  # the first that has a file gives it
            if folder is not None:
                copied += copy_artifacts(folder, scratch, skip=tuple(copied))
        files = written["files"] | {name: sha256_inside(scratch, name) for name in copied}
        origin = origin or {}
        write_json(
            scratch / CERTIFICATE,
            new_certificate("hf", files=files, tensors=written["tensors"], origin=origin),
        )
    return target


def export_shards(
    source: WeightSource,
    out_dir: str | Path,
    dtype: str | None = None,
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    progress: Progress = quiet,
) -> Path:
    """Shards (or any open source) to a Hugging Face folder. ``dtype`` None keeps the format of each tensor,
    and the tensors bit for bit; otherwise ``fp32``, ``bf16`` or ``fp16``."""
    return export_hf(
        lambda name: source.parameter(name, 0, 1),
        source.model,
        source.artifacts_dir,
        out_dir,
        source.store.dtype if dtype is None else torch_dtype(dtype),
        max_shard_size,
        overwrite,
        source_dir=source.folder,
        origin={"kind": source.kind, "fingerprint": source.fingerprint},
        progress=progress,
    )


def torch_dtype(name: str) -> torch.dtype:
    """``fp32``, ``bf16`` or ``fp16`` as torch has it. Raises ConfigError for another name."""
    if name not in DTYPES:
        raise ConfigError(f"dtype: {name!r} is unknown; known: {', '.join(DTYPES)}")
    return DTYPES[name]


class _Slicer:
    """Cuts Hugging Face tensors out of whole Megatron parameters: the pieces of TP = 1, read backwards."""

    def __init__(self, read_full: Callable[[str], torch.Tensor], model: ModelConfig) -> None:
        self.read_full, self.model = read_full, model
        self.entry_of = {name: entry for entry in entries(model) for name in entry.hf}
        self.shapes = {n: s for entry in entries(model) for n, s in hf_shapes(entry, model).items()}
        self._last: tuple[str, torch.Tensor] | None = None  # q, k and v come out of one parameter

    def read(self, spec: TensorSpec) -> torch.Tensor:
        """One Hugging Face tensor in the format of its spec. Raises DataError where the parameter does not
        have the model's shape, or where its values do not fit the format."""
        entry = self.entry_of[spec.name]
        if self._last is None or self._last[0] != entry.megatron:
            self._last = None  # let go of the one before the next is read
            self._last = (entry.megatron, self.read_full(entry.megatron))
        full = self._last[1]
        own = pieces(entry, self.model, 0, 1)
        rows = max(p.at[0] + p.rows[1] - p.rows[0] for p in own)
        width = own[0].cols[1]
        padded = entry.kind is Kind.VOCABULARY and len(full) > rows
        if matrix(tuple(full.shape)) != (rows, width) and not (padded and full.shape[1] == width):
            raise DataError(f"{entry.megatron}: shape {list(full.shape)}, the model gives {[rows, width]}")
        full = full.reshape(full.shape[0], -1)
        out = torch.empty(matrix(spec.shape), dtype=spec.dtype)
        for piece in own:
            if piece.source == spec.name:
                height = piece.rows[1] - piece.rows[0]
                out[slice(*piece.rows), slice(*piece.cols)] = full[piece.at[0] : piece.at[0] + height]
        if spec.dtype is torch.float16 and not out.isfinite().all():
            raise DataError(f"{spec.name}: has values that fp16 cannot hold; export as bf16 or fp32")
        return out.view(spec.shape)


def _config_dtype(specs: list[TensorSpec]) -> str:
    """Torch's name of the format that most of the weights have."""
    sizes: dict[torch.dtype, int] = {}
    for spec in specs:
        sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.size_bytes
    return str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch.")
