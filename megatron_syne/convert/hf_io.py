"""A Hugging Face folder: read with every check made before the first weight, written as a stream."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_syne.config.schema import ModelConfig
from megatron_syne.convert.files import (
    BLOCK_BYTES,
    check_plain_name,
    copy_inside,
    exists_inside,
    read_json_inside,
    write_json,
)
from megatron_syne.convert.llama import EMBEDDING, IGNORED_SUFFIXES, OUTPUT
from megatron_syne.convert.pieces import Piece, matrix
from megatron_syne.convert.safetensors_io import (
    DTYPES,
    NAMES,
    TensorFile,
    TensorInfo,
    TensorSpec,
    TensorWriter,
)
from megatron_syne.convert.store import Store, Stored
from megatron_syne.convert.table import hf_tensors
from megatron_syne.errors import ConfigError, DataError, MissingInput, SecurityRefusal

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

# What travels with the weights from import to export. The licence must: Meta's terms ask for it.
ARTIFACTS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "LICENSE",
    "LICENSE.txt",
    "USE_POLICY.md",
    "NOTICE",
)


class HFWeights:
    """The weights of a Hugging Face folder, checked against the model. Raises MissingInput, DataError (all
    problems with the tensors at once), SecurityRefusal (pickles, names and links that lead outside)."""

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        self.folder = folder
        self.files: list[TensorFile] = []
        found, problems = self._open(folder)
        wanted = hf_tensors(model)
        self.ignored = sorted(name for name in found if name.endswith(IGNORED_SUFFIXES))
        (embedding,), (head,) = EMBEDDING.hf, OUTPUT.hf
        if model.share_embeddings_and_output_weights and head in found and embedding in found:
            self.ignored.append(head)
            problems += _tied_copy_problems(found[embedding], embedding, found[head], head)
        extra = sorted(set(found) - set(wanted) - set(self.ignored))
        problems += [f"{name}: missing" for name in wanted if name not in found]
        problems += [f"{name}: not a tensor of this model; it would be dropped" for name in extra]
        for name in wanted:
            if name in found:
                problems += _tensor_problems(name, found[name].tensors[name], wanted[name])
        if problems:
            raise DataError(_list(f"{folder}: the tensors do not fit config.json", problems))
        self.tensors: dict[str, TensorInfo] = {name: found[name].tensors[name] for name in wanted}
        self.store = Store(Stored(found[name], name, _whole(name, wanted[name])) for name in wanted)

    def _open(self, folder: Path) -> tuple[dict[str, TensorFile], list[str]]:
        """Tensor name to its open file, and what is wrong between index and files."""
        single, index = exists_inside(folder, SINGLE), exists_inside(folder, INDEX)
        if single and index:
            raise DataError(
                f"{folder}: holds both {SINGLE} and {INDEX}, and readers differ in which they take; "
                f"remove the one that is out of date"
            )
        if single:
            file = self._file(SINGLE)
            return dict.fromkeys(file.tensors, file), []
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
            raise MissingInput(_list(f"{where}: names files that are not there", absent))
        found: dict[str, TensorFile] = {}
        problems = []
        for name, tensors in sorted(by_file.items()):
            file = self._file(name)
            problems += [
                f"{t}: the index says {name}, which lacks it" for t in tensors if t not in file.tensors
            ]
            problems += [f"{t}: in {name} but not in the index" for t in set(file.tensors) - set(tensors)]
            found |= dict.fromkeys((t for t in tensors if t in file.tensors), file)
        return found, problems

    def _file(self, name: str) -> TensorFile:
        self.files.append(TensorFile(self.folder, name))
        return self.files[-1]


def copy_artifacts(folder: Path, target: Path, skip: tuple[str, ...] = ()) -> list[str]:
    """Copy tokenizer, configurations and licence; the names copied."""
    names = [name for name in ARTIFACTS if name not in skip and exists_inside(folder, name)]
    for name in names:
        copy_inside(folder, name, target / name)
    return names


def check_artifacts(folder: Path) -> None:
    """Raises SecurityRefusal where the tokenizer wants to bring code, DataError where its JSON is broken."""
    for name in ("tokenizer_config.json", "generation_config.json"):
        if exists_inside(folder, name) and read_json_inside(folder, name).get("auto_map") is not None:
            raise SecurityRefusal(
                f"{folder / name}: auto_map asks to run code that comes with the model; this is never done. "
                f"Remove the key if the standard tokenizer classes read these files"
            )


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


def plan_shards(specs: list[TensorSpec], max_shard_size: int) -> dict[str, list[TensorSpec]]:
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


def write_weights(
    folder: Path,
    shards: Mapping[str, list[TensorSpec]],
    read: Callable[[TensorSpec], torch.Tensor],
    progress: Callable[[int], None],
) -> dict[str, Any]:
    """Write the weight files and their index; returns ``{"files": {name: sha256}, "tensors": {...}}``.

    One tensor is held at a time; ``progress`` gets the bytes of each.
    """
    files: dict[str, str] = {}
    tensors: dict[str, dict[str, Any]] = {}
    for name, specs in shards.items():
        writer = TensorWriter(folder / name, specs, {"format": "pt"})
        try:
            for spec in specs:
                writer.write(spec.name, read(spec))
                progress(spec.size_bytes)
            files[name] = writer.finish()
        finally:
            writer.close()
        tensors |= {spec.name: describe_tensor(spec, writer.hashes[spec.name]) for spec in specs}
    if len(shards) > 1:
        total = sum(spec.size_bytes for specs in shards.values() for spec in specs)
        weight_map = {spec.name: name for name, specs in shards.items() for spec in specs}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return {"files": files, "tensors": tensors}


def describe_tensor(spec: TensorSpec, sha256: str) -> dict[str, Any]:
    """How a tensor stands in a certificate."""
    return {"dtype": NAMES[spec.dtype], "shape": list(spec.shape), "sha256": sha256}


def _whole(name: str, shape: tuple[int, ...]) -> Piece:
    rows, cols = matrix(shape)
    return Piece(name, (0, rows), (0, cols), (0, 0))


def _tensor_problems(name: str, info: TensorInfo, shape: tuple[int, ...]) -> list[str]:
    problems = []
    if info.shape != shape:
        problems.append(f"{name}: shape {list(info.shape)}, config.json gives {list(shape)}")
    if info.dtype not in DTYPES:
        problems.append(f"{name}: format {info.dtype} is not supported; supported: {', '.join(DTYPES)}")
    return problems


def _tied_copy_problems(a: TensorFile, a_name: str, b: TensorFile, b_name: str) -> list[str]:
    """Some tools write the tied output layer as well. Dropping it is right only if it is the same tensor."""
    first, second = a.tensors[a_name], b.tensors[b_name]
    same = (first.dtype, first.shape) == (second.dtype, second.shape) and first.dtype in DTYPES
    if same and len(first.shape) == 2:
        rows, cols = first.shape
        step = max(1, BLOCK_BYTES // max(1, cols * 4))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            blocks = []
            for file, name in ((a, a_name), (b, b_name)):
                block = torch.empty((stop - start, cols), dtype=DTYPES[first.dtype])
                file.read_into(block, name, (start, stop), (0, cols))
                blocks.append(block.view(torch.uint8))
            same = same and torch.equal(*blocks)
    if same:
        return []
    return [
        f"{b_name}: config.json says it is tied to {a_name}, but the two differ; "
        f"set tie_word_embeddings to false if the model was trained with two"
    ]


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


def _list(title: str, problems: list[str], limit: int = 100) -> str:
    shown = problems[:limit]
    if len(problems) > limit:
        shown.append(f"... and {len(problems) - limit} more")
    return "\n  ".join([f"{title} ({len(problems)}):", *shown])
