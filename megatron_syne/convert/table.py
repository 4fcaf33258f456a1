"""A family's table for one model: its parameters in order, by pipeline stage, and looked up by name."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import re
from dataclasses import dataclass, replace

from megatron_syne.config.schema import ModelConfig
from megatron_syne.convert import families
from megatron_syne.convert.pieces import Entry, hf_shapes
from megatron_syne.errors import ConfigError


@dataclass(frozen=True)
class Table:
    """The parameters of a family. In ``layer`` the names hold ``{layer}``, the global number from 0."""

    embedding: Entry
    layer: tuple[Entry, ...]
    final_norm: tuple[Entry, ...]
    output: Entry
    """Of its own only where embedding and output layer are not tied."""
    ignored_suffixes: tuple[str, ...] = ()
    """Ends of the names of tensors that carry nothing (buffers that follow from the configuration)."""

    @property
    def tied_output(self) -> Entry:
        """The output layer of a tied model: no tensor of its own, but megatron-core keeps a copy of the
        embedding under this name on the last pipeline stage."""
        return Entry(self.output.kind, self.embedding.hf, self.output.megatron)


def table_of(model: ModelConfig) -> Table:
    """The table of the model's family. Raises ConfigError for a family that has none."""
    known = [module.name for module in pkgutil.iter_modules(families.__path__)]
    if model.model_type not in known:
        raise ConfigError(
            f"model.model_type: {model.model_type!r}: no table of tensors; known: {', '.join(known)}"
        )
    table: Table = importlib.import_module(f"{families.__name__}.{model.model_type}").TABLE
    return table


def at_layer(entry: Entry, layer: int) -> Entry:
    """The entry with ``{layer}`` filled in."""
    number = str(layer)
    return replace(
        entry,
        hf={name.replace("{layer}", number): shape for name, shape in entry.hf.items()},
        megatron=entry.megatron.replace("{layer}", number),
        te=None if entry.te is None else entry.te.replace("{layer}", number),
    )


def entries(model: ModelConfig, layers: range | list[int] | None = None) -> list[Entry]:
    """Entries of the whole model in its order; ``layers`` keeps only those layers (and the ends)."""
    assert model.num_layers is not None, "resolve_model first"
    table = table_of(model)
    kept = range(model.num_layers) if layers is None else layers
    middle = [at_layer(entry, layer) for layer in kept for entry in table.layer]
    end = [] if model.share_embeddings_and_output_weights else [table.output]
    return [table.embedding, *middle, *table.final_norm, *end]


def stage_entries(model: ModelConfig, chunks: list[list[list[int]]], pp_rank: int) -> list[Entry]:
    """Entries that a pipeline stage holds, over all of its chunks (``chunks`` from ``chunk_layers``)."""
    table = table_of(model)
    layers = {layer for chunk in chunks[pp_rank] for layer in chunk}
    first, last = pp_rank == 0, pp_rank == len(chunks) - 1
    found = []
    for entry in entries(model, sorted(layers)):
        if entry == table.embedding and not first:
            continue
        if entry in (*table.final_norm, table.output) and not last:
            continue
        found.append(entry)
    return found


def hf_tensors(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor of the model and its shape, in the model's order."""
    return {name: shape for entry in entries(model) for name, shape in hf_shapes(entry, model).items()}


def find(name: str, model: ModelConfig) -> Entry:
    """The entry of a Megatron parameter, by its local or Transformer Engine name with a global layer number.

    Raises ConfigError for a name that the model does not have.
    """
    table = table_of(model)
    if match := re.fullmatch(r"decoder\.layers\.(\d+)\..+", name):
        layer = int(match[1])
        assert model.num_layers is not None
        if layer >= model.num_layers:
            raise ConfigError(f"{name}: the model has {model.num_layers} layers, numbered from 0")
        candidates = [at_layer(entry, layer) for entry in table.layer]
    else:
        tied = model.share_embeddings_and_output_weights
        candidates = [table.embedding, *table.final_norm, table.tied_output if tied else table.output]
    for entry in candidates:
        if name in (entry.megatron, entry.te):
            return entry
    near = difflib.get_close_matches(name, [entry.megatron for entry in candidates], n=1)
    hint = f"; nearest: {near[0]}" if near else ""
    raise ConfigError(f"{name}: not a parameter of the {model.model_type} family{hint}")
