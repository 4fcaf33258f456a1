"""A Hugging Face folder: opened with every check made before the first weight, and planned as a target."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from megatron_syne.convert.files import (
    BLOCK_BYTES,
    check_plain_name,
    exists_inside,
    open_inside,
    read_exactly,
    read_json_inside,
)
from megatron_syne.convert.formats.documents import CONFIG, carried, check_artifacts, hf_config, json_document
from megatron_syne.convert.formats.safetensors import TensorInfo, TensorSpec, build_header, read_header
from megatron_syne.convert.numbers import ITEM_BYTES
from megatron_syne.convert.pieces import Piece, matrix
from megatron_syne.convert.streams import Place, StoredWeights, Target, TargetFile, Weights
from megatron_syne.convert.table import hf_tensors, table_of
from megatron_syne.errors import ConfigError, DataError, MissingInput, SecurityRefusal
from megatron_syne.models.hf_config import model_config_from_hf

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
DEFAULT_SHARD_SIZE = "5GB"

_Found = dict[str, tuple[str, TensorInfo]]  # tensor name to its file and header entry


def open_hf(folder: Path) -> StoredWeights:
    """The weights of a Hugging Face folder, checked against its ``config.json``.

    Raises MissingInput, DataError (all problems with the tensors at once), SecurityRefusal (pickles, code,
    names and links that lead outside).
    """
    config = read_json_inside(folder, CONFIG)
    model = model_config_from_hf(config, str(folder / CONFIG))
    check_artifacts(folder, model)
    descriptors: dict[str, int] = {}
    try:
        found, problems = _open_files(folder, descriptors)
        wanted = hf_tensors(model)
        table = table_of(model)
        ignored = sorted(name for name in found if name.endswith(table.ignored_suffixes))
        (embedding,), (head,) = table.embedding.hf, table.output.hf
        tied_copy = model.share_embeddings_and_output_weights and head in found and embedding in found
        if tied_copy:
            ignored.append(head)
            if not _same_bytes(found[embedding], found[head], descriptors, folder):
                problems.append(
                    f"{head}: config.json says it is tied to {embedding}, but the two differ; "
                    f"set tie_word_embeddings to false if the model was trained with two"
                )
        extra = sorted(set(found) - set(wanted) - set(ignored))
        problems += [f"{name}: missing" for name in wanted if name not in found]
        problems += [f"{name}: not a tensor of this model; it would be dropped" for name in extra]
        for name in wanted:
            if name in found:
                problems += _tensor_problems(name, found[name][1], wanted[name])
        if problems:
            raise DataError(listed(f"{folder}: the tensors do not fit config.json", problems))
    except BaseException:
        for descriptor in descriptors.values():
            os.close(descriptor)
        raise
    return StoredWeights(
        kind="hf",
        folder=folder,
        model=model,
        config=config,
        artifacts_dir=folder,
        dtypes={name: found[name][1].dtype for name in wanted},
        shapes=wanted,
        places={name: [_whole(name, *found[name])] for name in wanted},
        replicas={embedding: [_whole(embedding, *found[head], parameter=head)]} if tied_copy else {},
        descriptors=descriptors,
        ignored=ignored,
    )


def plan_hf(
    weights: Weights,
    *,
    dtype: str | None = None,
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
    tokenizer_dir: Path | None = None,
) -> Target:
    """A Hugging Face folder of the weights; ``dtype`` (``BF16``, ``F16``, ``F32``) None keeps each tensor's.

    Files are filled in the model's order up to ``max_shard_size``; a larger tensor gets one of its own.
    ``tokenizer_dir``: a tokenizer to go before the source's. Raises ConfigError for an option, DataError or
    SecurityRefusal for an artifact.
    """
    dtypes = target_dtypes(weights, dtype)
    specs = [TensorSpec(name, dtypes[name], weights.shapes[name]) for name in weights.shapes]
    shards = _fill_files(specs, parse_size(max_shard_size))
    files: list[TargetFile] = []
    places: dict[str, list[Place]] = {}
    for name, group in shards.items():
        header, infos, size = build_header(group, {"format": "pt"})
        files.append(TargetFile(name, size, [(0, header)]))
        places |= {tensor: [_whole(tensor, name, info)] for tensor, info in infos.items()}
    documents = carried(weights, tokenizer_dir) | {CONFIG: json_document(hf_config(weights, dtypes))}
    if len(shards) > 1:
        total = sum(spec.size_bytes for spec in specs)
        weight_map = {spec.name: name for name, group in shards.items() for spec in group}
        documents[INDEX] = json_document({"metadata": {"total_size": total}, "weight_map": weight_map})
    return Target("hf", weights.model, dtypes, files, places, documents)


def target_dtypes(weights: Weights, dtype: str | None) -> dict[str, str]:
    """Format of every tensor in a target: its own, or ``dtype`` for all. Raises ConfigError for an unknown
    one."""
    if dtype is None:
        return dict(weights.dtypes)
    if dtype not in ITEM_BYTES:
        raise ConfigError(f"dtype: {dtype!r} is unknown; known: {', '.join(ITEM_BYTES)}")
    return dict.fromkeys(weights.dtypes, dtype)


def parse_size(text: str | int) -> int:
    """Bytes of ``5GB``, ``500MB``, ``1GiB`` or a plain number. Raises ConfigError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", str(text).strip(), re.IGNORECASE)
    size = 0
    if match:
        power = " KMGT".index(match[2].upper() or " ")
        size = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if size <= 0:
        raise ConfigError(f"max_shard_size: {text!r} is not a size; write for example 5GB, 500MB or 1GiB")
    return size


def listed(title: str, problems: list[str], limit: int = 100) -> str:
    """All problems under one title, one to a line."""
    shown = problems[:limit]
    if len(problems) > limit:
        shown.append(f"... and {len(problems) - limit} more")
    return "\n  ".join([f"{title} ({len(problems)}):", *shown])


def _open_files(folder: Path, descriptors: dict[str, int]) -> tuple[_Found, list[str]]:
    """Every tensor and its file, and what is wrong between index and files; fills ``descriptors``."""
    single, index = exists_inside(folder, SINGLE), exists_inside(folder, INDEX)
    if single and index:
        raise DataError(
            f"{folder}: holds both {SINGLE} and {INDEX}, and readers differ in which they take; "
            f"remove the one that is out of date"
        )
    if single:
        tensors = _open_file(folder, SINGLE, descriptors)
        return {tensor: (SINGLE, info) for tensor, info in tensors.items()}, []
    if not index:
        _refuse_without_weights(folder)
    where = str(folder / INDEX)
    weight_map = read_json_inside(folder, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError(f"{where}: expected an object weight_map (tensor name to file name)")
    by_file: dict[str, list[str]] = {}
    for tensor, name in weight_map.items():
        by_file.setdefault(check_plain_name(name, where), []).append(tensor)
    for name in by_file:
        if not name.endswith(".safetensors"):
            _refuse_pickle(folder / name)
    absent = [name for name in sorted(by_file) if not exists_inside(folder, name)]
    if absent:
        raise MissingInput(listed(f"{where}: names files that are not there", absent))
    found: _Found = {}
    problems = []
    for name, announced in sorted(by_file.items()):
        tensors = _open_file(folder, name, descriptors)
        problems += [f"{t}: the index says {name}, which lacks it" for t in announced if t not in tensors]
        problems += [f"{t}: in {name} but not in the index" for t in sorted(set(tensors) - set(announced))]
        found |= {t: (name, tensors[t]) for t in announced if t in tensors}
    return found, problems


def _open_file(folder: Path, name: str, descriptors: dict[str, int]) -> dict[str, TensorInfo]:
    descriptors[name] = open_inside(folder, name)
    return read_header(descriptors[name], str(folder / name))


def _whole(tensor: str, file: str, info: TensorInfo, parameter: str | None = None) -> Place:
    rows, columns = matrix(info.shape)
    piece = Piece(tensor, (0, rows), (0, columns), (0, 0))
    return Place(file, info.start, columns, info.dtype, piece, parameter=parameter or tensor)


def _tensor_problems(name: str, info: TensorInfo, shape: tuple[int, ...]) -> list[str]:
    problems = []
    if info.shape != shape:
        problems.append(f"{name}: shape {list(info.shape)}, config.json gives {list(shape)}")
    if info.dtype not in ITEM_BYTES:
        problems.append(f"{name}: format {info.dtype} is not supported; supported: {', '.join(ITEM_BYTES)}")
    return problems


def _same_bytes(
    a: tuple[str, TensorInfo], b: tuple[str, TensorInfo], descriptors: dict[str, int], folder: Path
) -> bool:
    """Some tools write the tied output layer as well. Dropping it is right only if it is the same tensor."""
    (a_file, first), (b_file, second) = a, b
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    size = first.stop - first.start
    blocks = np.empty((2, min(BLOCK_BYTES, size)), np.uint8)
    for at in range(0, size, BLOCK_BYTES):
        part = blocks[:, : min(BLOCK_BYTES, size - at)]
        for row, file, info in ((part[0], a_file, first), (part[1], b_file, second)):
            view: Any = row
            read_exactly(descriptors[file], memoryview(view), info.start + at, str(folder / file))
        if not np.array_equal(part[0], part[1]):
            return False
    return True


def _fill_files(specs: list[TensorSpec], max_shard_size: int) -> dict[str, list[TensorSpec]]:
    """File name to its tensors: filled in order, a tensor above the limit gets a file of its own."""
    groups: list[list[TensorSpec]] = [[]]
    used = 0
    for spec in specs:
        if groups[-1] and used + spec.size_bytes > max_shard_size:
            groups.append([])
            used = 0
        groups[-1].append(spec)
        used += spec.size_bytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    count = len(groups)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _refuse_without_weights(folder: Path) -> None:
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    for name in names:
        if name.endswith(PICKLES):
            _refuse_pickle(folder / name)
    raise MissingInput(f"{folder}: no weights: looked for {SINGLE} and {INDEX}")


def _refuse_pickle(path: Path) -> None:
    raise SecurityRefusal(
        f"{path}: a pickle can run code when it is opened; it is never read. Get the safetensors files of "
        f"this model, or convert it on a machine that you can afford to lose"
    )
