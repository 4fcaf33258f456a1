"""Which parameter of the model a tensor of a distributed checkpoint is, by its name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_syne.config.schema import ModelConfig
from megatron_syne.convert.formats.dcp_metadata import DistributedTensor
from megatron_syne.convert.pieces import Entry, Kind, local_shape
from megatron_syne.convert.table import at_layer, table_of

_EMBEDDING = re.compile(r"((?:(?:model|module)\.)*)embedding\.word_embeddings\.weight")
_LAYER = re.compile(r"(decoder\.layers\.)(\d{1,6})\.(.+)")
_HALVES = ("_w", "_v")
"""Ends of the names of gate and up projection where they are two tensors (``singleton_local_shards``)."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of the model, or of all of its layers at once."""

    entry: Entry
    """With ``{layer}`` open where ``stacked``."""
    stacked: bool = False
    """Whether the layers are stacked along a first axis."""
    half: int | None = None
    """0 or 1 where it is the gate or the up projection alone."""
    copy: bool = False
    """The output layer of a tied model, a copy of the embedding."""

    def shape(self, model: ModelConfig) -> tuple[int, ...]:
        """Shape that the model gives the array; a vocabulary may have more rows."""
        whole = local_shape(at_layer(self.entry, 0), model, 1)
        if self.half is not None:
            whole = (whole[0] // 2, *whole[1:])
        return (model.num_layers or 0, *whole) if self.stacked else whole

    def entries(self, model: ModelConfig) -> list[Entry]:
        """The entry of each layer, or the one."""
        count = model.num_layers or 0
        return [at_layer(self.entry, layer) for layer in range(count)] if self.stacked else [self.entry]

    def shape_problem(self, tensor: DistributedTensor, model: ModelConfig) -> str | None:
        """What is wrong with an array's shape or format."""
        wanted = self.shape(model)
        if self.entry.kind is Kind.VOCABULARY and tensor.shape[1:] == wanted[1:]:
            if tensor.shape[0] < (model.vocab_size or 0):
                return f"{tensor.shape[0]} rows, the model's vocabulary has {model.vocab_size}"
        elif tensor.shape != wanted:
            return f"shape {list(tensor.shape)}, the model gives {list(wanted)}"
        return None


def parameter_names(model: ModelConfig) -> dict[str, Parameter]:
    """Every name that a parameter may have in a distributed checkpoint, layers stacked: Transformer Engine's,
    which megatron-core stores, and the local spec's."""
    table = table_of(model)
    tied = bool(model.share_embeddings_and_output_weights)
    output = Parameter(table.tied_output if tied else table.output, copy=tied)
    found = {output.entry.megatron: output}
    for entry in (table.embedding, *table.final_norm):
        found |= {name: Parameter(entry) for name in (entry.megatron, entry.te) if name}
    for entry in table.layer:
        for name in (entry.megatron, entry.te):
            if name is not None:
                plain = stacked_name(name)
                found[plain] = Parameter(entry, stacked=True)
                if entry.kind is Kind.GATED_MLP:
                    halves = {plain + end: Parameter(entry, True, half) for half, end in enumerate(_HALVES)}
                    found |= halves
    return found


def stacked_name(template: str) -> str:
    """A name from the table without its ``{layer}``, as megatron-core stores all layers in one array."""
    return template.replace("layers.{layer}.", "layers.")


def find_parameter(name: str, known: dict[str, Parameter], model: ModelConfig) -> Parameter | None:
    """The parameter of a name, with or without a layer's number; None where the model has none such."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return known.get(name)
    parameter, layer = known.get(match[1] + match[3]), int(match[2])
    if parameter is None or not parameter.stacked or layer >= (model.num_layers or 0):
        return None
    return Parameter(at_layer(parameter.entry, layer), half=parameter.half)


def common_prefix(names: Iterable[str]) -> str | None:
    """What stands before the names of the model (``model.``, ``module.``), from the embedding's; None where
    there is no embedding, or more than one."""
    found = {match[1] for name in names if (match := _EMBEDDING.fullmatch(name))}
    return found.pop() if len(found) == 1 else None
