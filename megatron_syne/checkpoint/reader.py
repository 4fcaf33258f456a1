"""Read single tensors out of a ``torch_dist`` checkpoint: one process, no layout, no optimizer state.

Whatever TP, PP and VPP it was written with, the checkpoint holds each parameter as one global tensor under
its Transformer Engine name, those of the layers stacked along a first axis; here they come out one layer at
a time, so that an export needs the memory of one tensor.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_syne.checkpoint import folder as folders
from megatron_syne.config.schema import ModelConfig
from megatron_syne.errors import DataError

# the local layers' norms are stored under the names of Transformer Engine's fused modules
_STORED_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


class CheckpointReader:
    """A whole checkpoint, open for reading; DataError or SecurityRefusal where it is damaged or hostile."""

    def __init__(self, path: Path) -> None:
        folders.read_manifest(path)
        self.path = path
        self.run = folders.read_run(path)
        self.model = ModelConfig(**self.run["model"])
        self.artifacts_dir = path / "hf"
        self.metadata = folders.read_metadata(path)
        self._storage = FileSystemReader(str(path))
        self._storage.set_up_storage_reader(self.metadata, is_coordinator=True)

    def full(self, name: str) -> torch.Tensor:
        """The whole parameter (TP = 1) of a Megatron name with a global layer number, local or TE spelling.

        The vocabulary may be padded, as it was in training.
        """
        match = _LAYER.fullmatch(name)
        layer = int(match[1]) if match else None
        key = f"decoder.layers.{_STORED_NAMES.get(match[2], match[2])}" if match else name
        stored = self.metadata.state_dict_metadata.get(key)
        if not isinstance(stored, TensorStorageMetadata):
            raise DataError(f"{self.path}: holds no tensor {key!r} (wanted for {name!r})")
        shape = list(stored.size)
        if layer is None:
            offsets, sizes = [0] * len(shape), shape
        elif layer < shape[0]:
            offsets, sizes = [layer] + [0] * (len(shape) - 1), [1, *shape[1:]]
        else:
            raise DataError(f"{self.path}: {key!r} holds {shape[0]} layers; layer {layer} was asked for")
        result = torch.empty(sizes, dtype=stored.properties.dtype)
        wanted = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, stored, [wanted])
        covered = sum(item.lengths.numel() for item in items)
        if covered != result.numel():
            raise DataError(f"{self.path}: {key!r}: {covered} of {result.numel()} values are stored")
        self._storage.read_data(LoadPlan(items), _Into(result)).wait()
        return result if layer is None else result[0]


class _Into(LoadPlanner):
    """Puts what the storage reads into one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        self.target = target

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to prepare."""

    def create_local_plan(self) -> LoadPlan:
        """Not used: the plan is made by the caller."""
        raise NotImplementedError

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Not used: there is one process."""
        raise NotImplementedError

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Not used."""
        raise NotImplementedError

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        """Only tensors are ever asked for."""
        raise NotImplementedError

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """The part of the target that a stored chunk fills."""
        view = self.target
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(axis, start, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """It was read in place."""
