"""A ``torch_dist`` checkpoint planned as a target: what ``megatron.core.dist_checkpointing.save`` makes.

It loads in any layout, with Transformer Engine's or the local layers. Megatron-LM takes it as a checkpoint to
start from (``--finetune``, or in a folder named ``release``): it has weights, no optimizer and no iteration.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_syne.config.schema import ModelConfig
from megatron_syne.convert.formats.dcp_archive import (
    ALIGNMENT,
    PlannedArchive,
    object_archive,
    plan_tensor_archive,
)
from megatron_syne.convert.formats.dcp_blocks import Block, block_places
from megatron_syne.convert.formats.dcp_metadata import (
    METADATA,
    Chunk,
    DistributedTensor,
    Extent,
    Metadata,
    Slice,
    write_metadata,
)
from megatron_syne.convert.formats.dcp_names import stacked_name
from megatron_syne.convert.formats.documents import hf_folder, json_document, main_dtype
from megatron_syne.convert.formats.hf import listed, target_dtypes
from megatron_syne.convert.formats.shards import parameter_dtypes
from megatron_syne.convert.numbers import ITEM_BYTES
from megatron_syne.convert.pieces import Entry, Kind, local_shape, matrix
from megatron_syne.convert.streams import Place, Target, TargetFile, Weights
from megatron_syne.convert.table import at_layer, entries, table_of
from megatron_syne.errors import ConfigError, DataError
from megatron_syne.models.config import padded_vocab_size

FORMAT = "megatron_syne.torch_dist"
VERSION = 1
MARKER = "weights.json"
_CHUNK_BYTES = 64 * 2**20
"""A rank reads every chunk that it needs a part of, whole; so none is much larger than this."""
_FILE_BYTES = 4 * 2**30
"""No file is larger; up to ``_PARALLEL_FILES`` there are, so that threads write to different ones."""
_PARALLEL_FILES, _LEAST_FILE_BYTES = 8, 128 * 2**20
# Modules with an ``_extra_state`` (FP8 scales) that the engine asks for by name when it loads. A checkpoint
# holding more of them than a model has is fine, one holding fewer is not. Beside those of the projections:
_EXTRA_STATE = "_extra_state"
_CORE_ATTENTION = "decoder.layers.self_attention.core_attention"
_FINAL_NORM = "decoder.final_layernorm"


def plan_torch_dist(
    weights: Weights, *, make_vocab_size_divisible_by: int = 1, dtype: str | None = None
) -> Target:
    """A distributed checkpoint of the weights; ``dtype`` (``BF16``, ``F16``, ``F32``) None keeps each tensor's.

    Raises ConfigError (an option), DataError that lists the tensors that become one array but differ in format,
    DataError or SecurityRefusal for an artifact.
    """
    multiple = make_vocab_size_divisible_by
    if type(multiple) is not int or multiple < 1:
        raise ConfigError(f"make_vocab_size_divisible_by: {multiple!r} must be a whole number from 1 on")
    model = dataclasses.replace(weights.model, make_vocab_size_divisible_by=multiple)
    dtypes = target_dtypes(weights, dtype)
    arrays = _arrays(model, dtypes)
    files = _Files(sum(array.size_bytes for array in arrays))
    places: dict[str, list[Place]] = {name: [] for name in weights.shapes}
    metadata = Metadata()
    for array in arrays:
        chunks = []
        for entry, offsets, sizes in array.boxes(model):
            archive = plan_tensor_archive(array.dtype, sizes)
            stored = files.add(archive)
            chunks.append(Chunk(offsets, sizes, stored))
            top, left = offsets[-len(array.whole)], 0
            high, wide = matrix(sizes[-len(array.whole) :])
            at = stored.offset + archive.data
            block = Block(stored.file, at, array.dtype, (top, top + high), (left, left + wide), array.name)
            for place in block_places(entry, model, block):
                places[place.piece.source].append(place)
        metadata.tensors[array.name] = DistributedTensor(array.dtype, array.shape, chunks)
    nothing = files.add_content(object_archive([None]))
    metadata.objects = dict.fromkeys(_extra_states(model), nothing)
    documents = hf_folder(weights, dtypes) | {
        METADATA: write_metadata(metadata),
        "metadata.json": _ENGINE_CONFIG,
        "common.pt": object_archive({"checkpoint_version": 3.0, "iteration": 0}),
        MARKER: _marker(model, weights, dtypes),
    }
    layout = {"files": len(files.made), "padded_vocab_size": padded_vocab_size(model, 1)}
    return Target("torch_dist", model, dtypes, files.made, places, documents, layout)


_ENGINE_CONFIG = json.dumps(
    {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
).encode()


def _marker(model: ModelConfig, weights: Weights, dtypes: dict[str, str]) -> bytes:
    described = dataclasses.asdict(model)
    del described["hf_path"], described["preset"]
    main = main_dtype(weights, dtypes)
    other = {name: dtype for name, dtype in dtypes.items() if dtype != main}
    return json_document(
        {"format": FORMAT, "version": VERSION, "model": described, "dtype": main, "other_dtypes": other}
    )


@dataclass(frozen=True)
class _Array:
    """A parameter, or those of all layers stacked."""

    name: str
    entries: list[Entry]
    stacked: bool
    dtype: str
    whole: Extent
    """Shape of one layer's."""

    @property
    def shape(self) -> Extent:
        return (len(self.entries), *self.whole) if self.stacked else self.whole

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def boxes(self, model: ModelConfig) -> Iterator[tuple[Entry, Extent, Extent]]:
        """Chunks as (entry, offsets, sizes): rows of one layer, gate and up projection apart as the engine
        itself has them."""
        rows, columns = matrix(self.whole)
        part = rows // 2 if self.entries[0].kind is Kind.GATED_MLP else rows
        step = max(1, _CHUNK_BYTES // (columns * ITEM_BYTES[self.dtype]))
        for layer, entry in enumerate(self.entries):
            for start in range(0, rows, part):
                for top in range(start, start + part, step):
                    high = min(step, start + part - top)
                    offsets, sizes = (top, *(0 for _ in self.whole[1:])), (high, *self.whole[1:])
                    yield (
                        entry,
                        (layer, *offsets) if self.stacked else offsets,
                        ((1, *sizes) if self.stacked else sizes),
                    )


def _arrays(model: ModelConfig, dtypes: dict[str, str]) -> list[_Array]:
    """Arrays in the table's order. Raises DataError where what becomes one of them differs in format."""
    table, layers = table_of(model), range(model.num_layers or 0)
    stored = parameter_dtypes(entries(model), dtypes)
    ends = [entry for entry in entries(model, []) if entry != table.embedding]
    lines = [(table.embedding, False), *((entry, True) for entry in table.layer), *((e, False) for e in ends)]
    found, problems = [], []
    for entry, stacked in lines:
        own = [at_layer(entry, layer) for layer in layers] if stacked else [entry]
        formats = {stored[one.megatron] for one in own}
        name = stacked_name(entry.te or entry.megatron)
        if len(formats) > 1:
            problems.append(f"{name}: {', '.join(sorted(formats))} in different layers")
        found.append(_Array(name, own, stacked, stored[own[0].megatron], local_shape(own[0], model, 1)))
    if problems:
        title = "tensors that become one array differ in format; choose one format for all (dtype)"
        raise DataError(listed(title, problems))
    return found


def _extra_states(model: ModelConfig) -> list[str]:
    """Keys of the objects that hold no more than None: ``<module>._extra_state/shard_<layer>_<layers>``."""
    count = model.num_layers or 0
    modules = [_CORE_ATTENTION]
    for entry in table_of(model).layer:
        module = stacked_name(entry.te or entry.megatron).rpartition(".")[0]
        if entry.kind is not Kind.DIRECT and module not in modules:
            modules.append(module)
    of_layers = [f"{m}.{_EXTRA_STATE}/shard_{layer}_{count}" for m in modules for layer in range(count)]
    return [*of_layers, f"{_FINAL_NORM}.{_EXTRA_STATE}/shard_0_1"]


class _Files:
    """The ``.distcp`` files: each slice goes into the one that is least full."""

    def __init__(self, total_bytes: int) -> None:
        count = min(_PARALLEL_FILES, -(-total_bytes // _LEAST_FILE_BYTES))
        count = max(1, count, -(-total_bytes // (_FILE_BYTES - 2 * _CHUNK_BYTES)))
        self.made = [TargetFile(f"__0_{index}.distcp", 0, []) for index in range(count)]

    def add(self, archive: PlannedArchive) -> Slice:
        file = min(self.made, key=lambda one: one.size)
        start = -(-file.size // ALIGNMENT) * ALIGNMENT
        file.fixed += [(start + at, content) for at, content in archive.fixed]
        file.size = start + archive.size
        return Slice(file.path, start, archive.size)

    def add_content(self, content: bytes) -> Slice:
        return self.add(PlannedArchive([(0, content)], 0, len(content)))
