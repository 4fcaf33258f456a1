"""A folder of TP/PP shards: written for one layout, read for any.

manifest.json                     format, layout, layers per chunk, model, formats of the tensors
mp_rank_TT_PPP/model.safetensors  all parameters of one model-parallel rank (local-spec names, layers
                                  numbered over the whole model, all virtual chunks in one file)
hf/                               config.json, generation config, tokenizer, licence of the source
certificate.json                  hashes of source and shards
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_syne.config.schema import ModelConfig, ParallelConfig
from megatron_syne.convert.files import open_inside, read_json_inside
from megatron_syne.convert.formats.documents import (
    CONFIG,
    HF_FOLDER,
    check_artifacts,
    hf_folder,
    json_document,
    main_dtype,
)
from megatron_syne.convert.formats.hf import listed, target_dtypes
from megatron_syne.convert.formats.safetensors import TensorSpec, build_header, read_header
from megatron_syne.convert.numbers import ITEM_BYTES
from megatron_syne.convert.pieces import Entry, Kind, local_shape, matrix, pieces
from megatron_syne.convert.streams import Place, StoredWeights, Target, TargetFile, Weights
from megatron_syne.convert.table import hf_tensors, stage_entries
from megatron_syne.errors import ConfigError, DataError
from megatron_syne.models.config import model_differences, padded_vocab_size
from megatron_syne.models.family import completed
from megatron_syne.models.hf_config import model_config_from_hf
from megatron_syne.parallel.topology import chunk_layers

FORMAT = "megatron_syne.shards"
VERSION = 2
MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"

_LAYOUT_FIELDS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "pipeline_model_parallel_layout",
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a model is cut into files."""

    model: ModelConfig
    parallel: ParallelConfig
    chunks: list[list[list[int]]]
    """Global layer numbers, ``chunks[pp_rank][vp_stage]``."""

    @property
    def tp_size(self) -> int:
        """Tensor-parallel size."""
        return self.parallel.tensor_model_parallel_size

    def stage(self, pp_rank: int) -> list[Entry]:
        """Entries that the ranks of a pipeline stage hold."""
        return stage_entries(self.model, self.chunks, pp_rank)

    def ranks(self) -> Iterator[tuple[int, int]]:
        """``(tp_rank, pp_rank)`` of every file."""
        return ((tp, pp) for pp in range(len(self.chunks)) for tp in range(self.tp_size))

    def describe(self) -> dict[str, Any]:
        """The layout as it stands in manifest and certificate: options, layers of each chunk, padding."""
        return {
            "parallel": {name: getattr(self.parallel, name) for name in _LAYOUT_FIELDS},
            "layers": self.chunks,
            "padded_vocab_size": padded_vocab_size(self.model, self.tp_size),
        }


def make_layout(model: ModelConfig, parallel: ParallelConfig) -> Layout:
    """The layout of a resolved model. Raises ConfigError where it cannot be cut so."""
    assert model.num_layers is not None, "resolve_model first"
    for name in _LAYOUT_FIELDS[:3]:
        size = getattr(parallel, name)
        if size is not None and (type(size) is not int or size < 1):
            raise ConfigError(f"parallel.{name}: {size!r} must be a whole number from 1 on")
    multiple = model.make_vocab_size_divisible_by
    if type(multiple) is not int or multiple < 1:
        raise ConfigError(
            f"model.make_vocab_size_divisible_by: {multiple!r} must be a whole number from 1 on"
        )
    layout = Layout(model, parallel, chunk_layers(parallel, model.num_layers))
    for entry in layout.stage(0):
        pieces(entry, model, 0, layout.tp_size)  # refuses a TP size that does not suit the model
    return layout


def plan_shards(
    weights: Weights,
    parallel: ParallelConfig,
    *,
    make_vocab_size_divisible_by: int = 1,
    dtype: str | None = None,
) -> Target:
    """Shards of the weights, whatever they lie in; ``dtype`` (``BF16``, ``F16``, ``F32``) None keeps each
    tensor's.

    Raises ConfigError (layout, option), DataError that lists the tensors that become one parameter but differ
    in format, DataError or SecurityRefusal for an artifact.
    """
    model = dataclasses.replace(weights.model, make_vocab_size_divisible_by=make_vocab_size_divisible_by)
    layout = make_layout(model, parallel)
    dtypes = target_dtypes(weights, dtype)
    files: list[TargetFile] = []
    places: dict[str, list[Place]] = {name: [] for name in weights.shapes}
    for pp_rank in range(len(layout.chunks)):
        entries = layout.stage(pp_rank)
        stored = parameter_dtypes(entries, dtypes)
        shapes = {entry.megatron: local_shape(entry, model, layout.tp_size) for entry in entries}
        specs = [TensorSpec(name, stored[name], shape) for name, shape in shapes.items()]
        for tp_rank in range(layout.tp_size):
            path = shard_file(tp_rank, pp_rank)
            metadata = {"format": "pt", "tp_rank": str(tp_rank), "pp_rank": str(pp_rank)}
            header, infos, size = build_header(specs, metadata)
            files.append(TargetFile(path, size, [(0, header)]))
            for entry in entries:
                info = infos[entry.megatron]
                for place in _places(entry, layout, tp_rank, path, info.start, info.dtype):
                    places[place.piece.source].append(place)
    documents = hf_folder(weights, dtypes)
    documents[MANIFEST] = json_document(_manifest(layout, weights, dtypes))
    return Target("shards", model, dtypes, files, places, documents, layout.describe())


def open_shards(folder: Path) -> StoredWeights:
    """A folder of shards, checked against its manifest.

    Raises MissingInput, DataError (all problems with the tensors of a file at once), SecurityRefusal.
    """
    layout, config, dtypes = _read_manifest(folder)
    shapes = hf_tensors(layout.model)
    places: dict[str, list[Place]] = {name: [] for name in shapes}
    replicas: dict[str, list[Place]] = {}
    descriptors: dict[str, int] = {}
    try:
        for pp_rank in range(len(layout.chunks)):
            entries = {entry.megatron: entry for entry in layout.stage(pp_rank)}
            stored = parameter_dtypes(list(entries.values()), dtypes)
            local = {
                name: local_shape(entry, layout.model, layout.tp_size) for name, entry in entries.items()
            }
            for tp_rank in range(layout.tp_size):
                path = shard_file(tp_rank, pp_rank)
                descriptors[path] = open_inside(folder, *path.split("/"))
                tensors = read_header(descriptors[path], str(folder / path))
                problems = [f"{name}: missing" for name in entries if name not in tensors]
                problems += [f"{name}: unexpected" for name in tensors if name not in entries]
                for name, entry in entries.items():
                    if name not in tensors:
                        continue
                    info = tensors[name]
                    if (info.dtype, info.shape) != (stored[name], local[name]):
                        problems.append(
                            f"{name}: {info.dtype} {list(info.shape)}, the manifest gives "
                            f"{stored[name]} {list(local[name])}"
                        )
                    again = entry.kind is Kind.DIRECT and tp_rank > 0
                    for place in _places(entry, layout, tp_rank, path, info.start, info.dtype):
                        (replicas if again else places).setdefault(place.piece.source, []).append(place)
                if problems:
                    raise DataError(listed(f"{folder / path}: does not fit the manifest", problems))
    except BaseException:
        for descriptor in descriptors.values():
            os.close(descriptor)
        raise
    return StoredWeights(
        kind="shards",
        folder=folder,
        model=layout.model,
        config=config,
        artifacts_dir=folder / HF_FOLDER,
        dtypes=dtypes,
        shapes=shapes,
        places=places,
        replicas=replicas,
        descriptors=descriptors,
        layout=layout,
    )


def shard_file(tp_rank: int, pp_rank: int) -> str:
    """File of one model-parallel rank, in Megatron's way of naming."""
    return f"mp_rank_{tp_rank:02d}_{pp_rank:03d}/{WEIGHTS}"


def parameter_dtypes(entries: list[Entry], dtypes: dict[str, str]) -> dict[str, str]:
    """Format of every Megatron parameter, from those of the Hugging Face tensors that it is made of.

    Shifted ones are kept in fp32. Raises DataError that lists where the tensors of one parameter differ.
    """
    problems = []
    for entry in entries:
        if len({dtypes[tensor] for tensor in entry.hf}) > 1:
            formats = ", ".join(f"{tensor} {dtypes[tensor]}" for tensor in entry.hf)
            problems.append(f"{entry.megatron}: {formats}")
    if problems:
        title = "tensors that become one parameter differ in format; choose one format for all (dtype)"
        raise DataError(listed(title, problems))
    return {entry.megatron: "F32" if entry.shift else dtypes[next(iter(entry.hf))] for entry in entries}


def _places(entry: Entry, layout: Layout, tp_rank: int, path: str, start: int, dtype: str) -> Iterator[Place]:
    """Where the pieces of one rank's parameter lie; ``start`` is its first byte in the file."""
    columns = matrix(local_shape(entry, layout.model, layout.tp_size))[1]
    for piece in pieces(entry, layout.model, tp_rank, layout.tp_size):
        yield Place(path, start, columns, dtype, piece, entry.shift, entry.megatron)


def _manifest(layout: Layout, weights: Weights, dtypes: dict[str, str]) -> dict[str, Any]:
    model = dataclasses.asdict(layout.model)
    del model["hf_path"], model["preset"]
    dtype = main_dtype(weights, dtypes)
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "dtype": dtype,
        "other_dtypes": {name: other for name, other in dtypes.items() if other != dtype},
        **layout.describe(),
    }


def _read_manifest(folder: Path) -> tuple[Layout, dict[str, Any], dict[str, str]]:
    """Layout, contents of ``hf/config.json``, format of every Hugging Face tensor. Raises DataError where the
    manifest is not what this version writes, or contradicts itself or the configuration."""
    where = str(folder / MANIFEST)
    raw = read_json_inside(folder, MANIFEST)
    if raw.get("format") != FORMAT or raw.get("version") != VERSION:
        raise DataError(
            f"{where}: format {raw.get('format')!r} version {raw.get('version')!r}; this program reads "
            f"{FORMAT!r} version {VERSION}; convert the source again"
        )
    config = read_json_inside(folder, HF_FOLDER, CONFIG)
    source = model_config_from_hf(config, str(folder / HF_FOLDER / CONFIG))
    check_artifacts(folder / HF_FOLDER, source)
    try:
        model, parallel = completed(ModelConfig(**raw["model"])), ParallelConfig(**raw["parallel"])
        different = model_differences(model, source)
        if different:
            raise DataError(f"{where}: model disagrees with {HF_FOLDER}/{CONFIG}: {'; '.join(different)}")
        multiple = model.make_vocab_size_divisible_by
        layout = make_layout(dataclasses.replace(source, make_vocab_size_divisible_by=multiple), parallel)
        described = {name: raw[name] for name in layout.describe()}
        dtypes = dict.fromkeys(hf_tensors(layout.model), raw["dtype"]) | raw["other_dtypes"]
        unknown = sorted({repr(dtype) for dtype in dtypes.values() if dtype not in ITEM_BYTES})
    except (KeyError, TypeError) as error:
        raise DataError(f"{where}: malformed: {error}") from None
    except ConfigError as error:
        raise DataError(f"{where}: {error}") from None
    if described != layout.describe():
        raise DataError(f"{where}: layers or padding do not follow from its own model and parallel sizes")
    if unknown or len(dtypes) != len(hf_tensors(layout.model)):
        what = f"unknown formats {', '.join(unknown)}" if unknown else "formats of tensors it does not have"
        raise DataError(f"{where}: {what}; known: {', '.join(ITEM_BYTES)}")
    return layout, config, dtypes
