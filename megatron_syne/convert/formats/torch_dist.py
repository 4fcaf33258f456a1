"""``torch_dist``: megatron-core's distributed checkpoint, opened without torch; ``dcp_plan`` plans one.

.metadata         a pickle: every tensor as one global array, its chunks, and the slice of a file for each
__R_I.distcp      one zip of torch's after another, each a chunk of a tensor or a pickled object
metadata.json     {"sharded_backend": "torch_dist", ...}
common.pt         what is not distributed (arguments, counters); never read
hf/               config.json, tokenizer and licence (in checkpoints of this program)
weights.json      model and formats (where this program converted)
state.json, manifest.json    of a run's own training checkpoint

Whatever TP, PP and VPP it was written with, a parameter is one array here, under Transformer Engine's name; those
of the layers are stacked along a first axis, or carry the layer's number where layers may differ.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_syne.config.schema import ModelConfig
from megatron_syne.convert.files import check_plain_name, exists_inside, read_json_inside
from megatron_syne.convert.formats.dcp_archive import StoredTensor, read_tensor_archive
from megatron_syne.convert.formats.dcp_blocks import (
    Block,
    block_places,
    check_replicas,
    check_whole,
    file_overlaps,
    stored_dtypes,
)
from megatron_syne.convert.formats.dcp_folder import (
    checkpoint_folder,
    close_files,
    model_of,
    open_files,
    same_model,
)
from megatron_syne.convert.formats.dcp_metadata import (
    METADATA,
    Chunk,
    DistributedTensor,
    Metadata,
    read_metadata,
)
from megatron_syne.convert.formats.dcp_names import Parameter, common_prefix, find_parameter, parameter_names
from megatron_syne.convert.formats.dcp_plan import FORMAT, MARKER, VERSION, plan_torch_dist
from megatron_syne.convert.formats.hf import listed
from megatron_syne.convert.numbers import ITEM_BYTES
from megatron_syne.convert.pieces import Entry, local_shape, matrix
from megatron_syne.convert.streams import Place, StoredWeights
from megatron_syne.convert.table import entries, hf_tensors, table_of
from megatron_syne.errors import DataError

__all__ = ["open_torch_dist", "plan_torch_dist"]

_BACKEND = "metadata.json"
_RUN, _MANIFEST = "state.json", "manifest.json"
# Tensors that are no weights (pickled objects are none either).
_IGNORED = re.compile(
    r"(optimizer|chained_\d+|opt_param_scheduler|rng_state|rerun_state_machine_state)[./].*"
)

_Named = tuple[str, DistributedTensor, Parameter]


def open_torch_dist(folder: Path, hf_config: Path | None = None) -> StoredWeights:
    """The weights in a distributed checkpoint of ours, of Megatron-LM or of Megatron-Bridge.

    ``folder``: the checkpoint, or one that holds ``iter_*`` folders. ``hf_config``: folder with ``config.json``
    where the checkpoint has none. Raises MissingInput, DataError (all missing, unexpected and unfit tensors at
    once), SecurityRefusal, ConfigError (a ``hf_config`` too many).
    """
    folder = checkpoint_folder(folder, lambda path: exists_inside(path, METADATA))
    _check_backend(folder)
    model, config, artifacts = model_of(folder, hf_config)
    model, stated = _own_statements(folder, model)
    metadata = read_metadata(folder)
    named, ignored = _name_all(metadata, model, folder)
    files = {chunk.slice.file for _, tensor, _ in named for chunk in tensor.chunks}
    for name in files:
        check_plain_name(name, str(folder / METADATA))
    descriptors = open_files(folder, files)
    try:
        found = _Collected(folder, model, descriptors)
        for one in named:
            found.add(*one)
        check_whole(folder, model, found.places, file_overlaps(found.slices))
        dtypes = stored_dtypes(model, found.places, stated)
        wrong = [f"{n}: {d}, {MARKER} gives {stated[n]}" for n, d in dtypes.items() if stated.get(n, d) != d]
        if wrong:
            raise DataError(listed(f"{folder}: tensors are not in the formats stated", wrong))
        weights = StoredWeights(
            kind="torch_dist",
            folder=folder,
            model=model,
            config=config,
            artifacts_dir=artifacts,
            dtypes=dtypes,
            shapes=hf_tensors(model),
            places=found.places,
            replicas=found.replicas,
            descriptors=descriptors,
            ignored=ignored,
        )
        check_replicas(weights)
    except BaseException:
        close_files(descriptors)
        raise
    return weights


def _check_backend(folder: Path) -> None:
    if not exists_inside(folder, _BACKEND):
        return  # torch's own writer makes none
    backend = read_json_inside(folder, _BACKEND).get("sharded_backend")
    if backend != "torch_dist":
        raise DataError(
            f"{folder / _BACKEND}: sharded_backend {backend!r} is not supported; supported: 'torch_dist'. "
            f"Save it again with --ckpt-format torch_dist"
        )


def _own_statements(folder: Path, model: ModelConfig) -> tuple[ModelConfig, dict[str, str]]:
    """What a checkpoint of this program says of itself: the model with its padding rule, and the formats of the
    Hugging Face tensors (empty where it does not say). Raises DataError where it contradicts itself."""
    if exists_inside(folder, MARKER):
        where = str(folder / MARKER)
        raw = read_json_inside(folder, MARKER)
        if raw.get("format") != FORMAT or raw.get("version") != VERSION:
            raise DataError(
                f"{where}: format {raw.get('format')!r} version {raw.get('version')!r}; this program reads "
                f"{FORMAT!r} version {VERSION}; convert the source again"
            )
        names, other = hf_tensors(model), raw.get("other_dtypes")
        if not isinstance(other, dict):
            raise DataError(f"{where}: other_dtypes: expected an object")
        stated: dict[str, Any] = dict.fromkeys(names, raw.get("dtype")) | other
        wrong = [f"{n}: {d!r}" for n, d in stated.items() if n not in names or d not in ITEM_BYTES]
        if wrong:
            raise DataError(listed(f"{where}: unknown tensors or formats", wrong))
        return same_model(model, raw.get("model"), where), stated
    if exists_inside(folder, _RUN):
        _check_sizes(folder)
        where = str(folder / _RUN)
        return same_model(model, read_json_inside(folder, _RUN).get("model"), where), {}
    return model, {}


def _check_sizes(folder: Path) -> None:
    """A training checkpoint lists its files with their sizes, last of all."""
    sizes = read_json_inside(folder, _MANIFEST).get("files")
    if not isinstance(sizes, dict):
        raise DataError(f"{folder / _MANIFEST}: files: expected an object")
    wrong = []
    for name, size in sizes.items():
        if name == METADATA or (isinstance(name, str) and name.endswith(".distcp") and "/" not in name):
            found = os.stat(folder / name).st_size if exists_inside(folder, name) else "no such file"
            if found != size:
                wrong.append(f"{name}: {found}, expected {size} bytes")
    if wrong:
        raise DataError(listed(f"{folder}: the checkpoint is damaged", wrong))


def _name_all(metadata: Metadata, model: ModelConfig, folder: Path) -> tuple[list[_Named], list[str]]:
    """The tensors of the model, and what is left out by group and number. Raises DataError that lists all
    missing, unexpected and unfit ones."""
    title = f"{folder}: the tensors do not fit the model's configuration"
    prefix = common_prefix(metadata.tensors)
    if prefix is None:
        some = ", ".join(sorted(metadata.tensors)[:8]) or "none at all"
        raise DataError(f"{title}: not one embedding.word_embeddings.weight; tensors: {some}")
    known, suffixes = parameter_names(model), (*table_of(model).ignored_suffixes, "._extra_state")
    named: list[_Named] = []
    left_out = ["_extra_state" if "._extra_state" in name else name for name in metadata.objects]
    problems: list[str] = []
    for name, tensor in metadata.tensors.items():
        plain = name.removeprefix(prefix) if name.startswith(prefix) else ""
        parameter = find_parameter(plain, known, model)
        if parameter is not None:
            named.append((name, tensor, parameter))
            problem = parameter.shape_problem(tensor, model)
            if problem is None and tensor.dtype not in ITEM_BYTES:
                problem = f"format {tensor.dtype} is not supported; supported: {', '.join(ITEM_BYTES)}"
            problems += [f"{name}: {problem}"] if problem else []
        elif _IGNORED.fullmatch(name) or name.endswith(suffixes):
            left_out.append(name)
        else:
            problems.append(f"{name}: not a tensor of this model; it would be dropped")
    have = {e.megatron for _, _, p in named if not p.copy for e in p.entries(model)}
    problems += [f"{prefix}{e.te or e.megatron}: missing" for e in entries(model) if e.megatron not in have]
    if problems:
        raise DataError(listed(title, problems))
    groups = [re.split(r"[./]", name)[0] for name in left_out]
    return named, [f"{group} ({groups.count(group)})" for group in sorted(set(groups))]


@dataclass
class _Collected:
    """Places of all tensors, as they are found."""

    folder: Path
    model: ModelConfig
    descriptors: dict[str, int]
    places: dict[str, list[Place]] = field(default_factory=dict)
    replicas: dict[str, list[Place]] = field(default_factory=dict)
    slices: list[tuple[str, int, int, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.places = {name: [] for name in hf_tensors(self.model)}

    def add(self, name: str, tensor: DistributedTensor, parameter: Parameter) -> None:
        """Find the numbers of each chunk in its file. Raises DataError, SecurityRefusal."""
        target = self.replicas if parameter.copy else self.places
        whole = parameter.entries(self.model)
        for chunk in tensor.chunks:
            stored = chunk.slice
            self.slices.append((stored.file, stored.offset, stored.length, name))
            where = f"{self.folder / stored.file}: {name}: chunk at {list(chunk.offsets)}"
            descriptor = self.descriptors[stored.file]
            if stored.offset + stored.length > os.fstat(descriptor).st_size:
                raise DataError(f"{where}: lies beyond the end of the file; is it cut short?")
            found = read_tensor_archive(descriptor, stored.offset, stored.length, where)
            if (found.dtype, found.shape) != (tensor.dtype, chunk.sizes):
                raise DataError(
                    f"{where}: {found.dtype} {list(found.shape)}, {METADATA} gives {tensor.dtype} "
                    f"{list(chunk.sizes)}"
                )
            for entry, block in self._blocks(name, chunk, parameter, whole, found):
                for place in block_places(entry, self.model, block):
                    target.setdefault(place.piece.source, []).append(place)

    def _blocks(
        self, name: str, chunk: Chunk, parameter: Parameter, whole: list[Entry], found: StoredTensor
    ) -> Iterator[tuple[Entry, Block]]:
        """The matrix of each layer in a chunk."""
        offsets, sizes = chunk.offsets, chunk.sizes
        first, layers = (offsets[0], sizes[0]) if parameter.stacked else (0, 1)
        if parameter.stacked:
            offsets, sizes = offsets[1:], sizes[1:]
        high, wide = matrix(sizes)
        top, left = offsets[0], offsets[1] if len(offsets) > 1 else 0
        if parameter.half:
            top += local_shape(whole[0], self.model, 1)[0] // 2
        for index in range(layers):
            at = found.offset + index * high * wide * ITEM_BYTES[found.dtype]
            block = Block(chunk.slice.file, at, found.dtype, (top, top + high), (left, left + wide), name)
            yield whole[first + index], block
