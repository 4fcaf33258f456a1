"""A folder of TP/PP shards: written for one layout, read for any.

manifest.json                     format, layout, layers per chunk, model
mp_rank_TT_PPP/model.safetensors  all parameters of one model-parallel rank (local-spec names, layers
                                  numbered over the whole model, all virtual chunks in one file)
hf/                               config.json, generation config, tokenizer, licence of the source
certificate.json                  hashes of source and shards
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_syne.config.schema import ModelConfig, ParallelConfig
from megatron_syne.convert.files import read_json_inside
from megatron_syne.convert.pieces import Entry, Kind, local_shape, pieces
from megatron_syne.convert.safetensors_io import DTYPES, TensorFile
from megatron_syne.convert.store import Store, Stored
from megatron_syne.convert.table import stage_entries
from megatron_syne.errors import ConfigError, DataError
from megatron_syne.models.config import model_differences, padded_vocab_size
from megatron_syne.models.hf_config import model_config_from_hf
from megatron_syne.parallel.topology import chunk_layers

FORMAT = "megatron_syne.shards"
VERSION = 1
MANIFEST = "manifest.json"
HF_FOLDER = "hf"
WEIGHTS = "model.safetensors"

_LAYOUT_FIELDS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "pipeline_model_parallel_layout",
)


def rank_folder(tp_rank: int, pp_rank: int) -> str:
    """Folder of one model-parallel rank, in Megatron's way of naming."""
    return f"mp_rank_{tp_rank:02d}_{pp_rank:03d}"


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


def manifest_of(layout: Layout, dtype: str | None) -> dict[str, Any]:
    """Contents of ``manifest.json``; ``dtype`` as the source's configuration names it."""
    model = dataclasses.asdict(layout.model)
    del model["hf_path"], model["preset"]
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "parallel": {name: getattr(layout.parallel, name) for name in _LAYOUT_FIELDS},
        "layers": layout.chunks,
        "padded_vocab_size": padded_vocab_size(layout.model, layout.tp_size),
        "dtype": dtype,
    }


def read_manifest(folder: Path) -> Layout:
    """Inverse of :func:`manifest_of`. Raises DataError where it is not what this version writes, or where it
    contradicts itself or the configuration of its source."""
    where = str(folder / MANIFEST)
    raw = read_json_inside(folder, MANIFEST)
    if raw.get("format") != FORMAT or raw.get("version") != VERSION:
        raise DataError(
            f"{where}: format {raw.get('format')!r} version {raw.get('version')!r}; "
            f"this program reads {FORMAT!r} version {VERSION}"
        )
    try:
        model, parallel = ModelConfig(**raw["model"]), ParallelConfig(**raw["parallel"])
        config = read_json_inside(folder, HF_FOLDER, "config.json")
        source = model_config_from_hf(config, str(folder / HF_FOLDER / "config.json"))
        different = model_differences(model, source)
        if different:
            raise DataError(f"{where}: model disagrees with {HF_FOLDER}/config.json: {'; '.join(different)}")
        multiple = model.make_vocab_size_divisible_by
        layout = make_layout(dataclasses.replace(source, make_vocab_size_divisible_by=multiple), parallel)
    except (KeyError, TypeError) as error:
        raise DataError(f"{where}: malformed: {error}") from None
    except ConfigError as error:
        raise DataError(f"{where}: {error}") from None
    if manifest_of(layout, raw.get("dtype")) != raw:
        raise DataError(f"{where}: layers or padding do not follow from its own model and parallel sizes")
    return layout


def open_shards(folder: Path, layout: Layout) -> Store:
    """The shards as a store of Hugging Face rectangles. Raises MissingInput or DataError (all problems with
    the tensors of a file at once) where they are not what the manifest announces."""
    stored = []
    for tp_rank, pp_rank in layout.ranks():
        file = TensorFile(folder, rank_folder(tp_rank, pp_rank), WEIGHTS)
        entries = {entry.megatron: entry for entry in layout.stage(pp_rank)}
        problems = [f"{name}: missing" for name in entries if name not in file.tensors]
        problems += [f"{name}: unexpected" for name in file.tensors if name not in entries]
        for name, entry in entries.items():
            shape = local_shape(entry, layout.model, layout.tp_size)
            info = file.tensors.get(name)
            if info and (info.shape != shape or info.dtype not in DTYPES):
                problems.append(f"{name}: {info.dtype} {list(info.shape)}, the manifest gives {list(shape)}")
            if info and not (entry.kind is Kind.DIRECT and tp_rank > 0):  # of replicas the first is read
                own = pieces(entry, layout.model, tp_rank, layout.tp_size)
                stored += [Stored(file, name, piece) for piece in own]
        if problems:
            raise DataError("\n  ".join([f"{file.path}: does not fit the manifest:", *problems]))
    return Store(stored)
