"""Weights to start from: a Hugging Face folder or a folder of shards, read alike.

source = open_source(Path("Meta-Llama-3-8B"))
part = source.parameter("decoder.layers.0.mlp.linear_fc1.weight", tp_rank=0, tp_size=8)
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from megatron_syne.config.schema import ModelConfig
from megatron_syne.convert.certificate import CERTIFICATE, read_certificate, weights_fingerprint
from megatron_syne.convert.files import exists_inside, read_exactly, read_json_inside
from megatron_syne.convert.hf_io import HFWeights, check_artifacts
from megatron_syne.convert.pieces import Entry, Piece, local_shape, matrix, pieces
from megatron_syne.convert.safetensors_io import TensorFile
from megatron_syne.convert.shards_io import HF_FOLDER, MANIFEST, Layout, open_shards, read_manifest
from megatron_syne.convert.store import Store
from megatron_syne.convert.table import find, hf_tensors
from megatron_syne.errors import ConfigError, DataError, MissingInput
from megatron_syne.models.config import model_differences
from megatron_syne.models.hf_config import model_config_from_hf


@dataclass
class WeightSource:
    """Open weights. Every read takes only the parts that it needs from the disk."""

    folder: Path
    kind: str
    """``hf`` or ``shards``."""
    model: ModelConfig
    """The resolved model, with the padding rule that :meth:`parameter` follows."""
    artifacts_dir: Path
    """Folder with ``config.json``, tokenizer, generation config, licence."""
    fingerprint: str
    """Identity of the weights: the same for a source and for its shards in any layout where both carry a
    certificate (``sha256:``); otherwise of samples of the files (``samples:``)."""
    store: Store
    layout: Layout | None = None
    """How shards are cut; None for a Hugging Face folder."""
    ignored: list[str] = field(default_factory=list)
    """Tensors in the source's files that are left out: buffers, the copy of a tied embedding."""

    def parameter(self, name: str, tp_rank: int, tp_size: int) -> torch.Tensor:
        """The part of a Megatron parameter that belongs to one TP rank, in the format it is stored in.

        ``name``: local or Transformer Engine name, layers numbered over the whole model. Rows of padding are
        zero. ``output_layer.weight`` of a tied model is the embedding. Raises ConfigError for a name or a
        TP size that the model does not have.
        """
        entry = find(name, self.model)
        wanted = pieces(entry, self.model, tp_rank, tp_size)
        return self.store.read(local_shape(entry, self.model, tp_size), wanted, self.parameter_dtype(entry))

    def parameter_dtype(self, entry: Entry) -> torch.dtype:
        """Format of a Megatron parameter. DataError where the tensors that it is made of differ in theirs."""
        dtypes = {self.store.dtype(tensor) for tensor in entry.hf}
        if len(dtypes) > 1:
            raise DataError(f"{self.folder}: {', '.join(entry.hf)} become one tensor but differ in format")
        return dtypes.pop()

    def check_model(self, model: ModelConfig) -> None:
        """Raises ConfigError that lists where the weights do not fit a run's resolved model; from here on
        :meth:`parameter` pads the vocabulary as that model does."""
        different = model_differences(model, self.model)
        if different:
            raise ConfigError(
                f"{self.folder}: the weights are of another model than the run's: {'; '.join(different)}; "
                f"set model.hf_path to {self.artifacts_dir}"
            )
        multiple = model.make_vocab_size_divisible_by
        self.model = replace(self.model, make_vocab_size_divisible_by=multiple)

    def tensor(self, name: str) -> torch.Tensor:
        """A whole Hugging Face tensor by its name."""
        shape = hf_tensors(self.model)[name]
        rows, cols = matrix(shape)
        return self.store.read(shape, [Piece(name, (0, rows), (0, cols), (0, 0))], self.store.dtype(name))

    def close(self) -> None:
        """Close the files."""
        for file in self.store.files():
            file.close()


def open_source(path: str | Path, make_vocab_size_divisible_by: int | None = None) -> WeightSource:
    """Open a Hugging Face folder or a folder of shards; checks everything but the weights' values.

    ``make_vocab_size_divisible_by``: padding rule for :meth:`WeightSource.parameter`; not given = the one of
    the shards, 1 for a Hugging Face folder. Raises MissingInput, DataError, SecurityRefusal.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise MissingInput(f"{folder}: no such folder; expected a Hugging Face folder or a folder of shards")
    layout, ignored = None, list[str]()
    if exists_inside(folder, MANIFEST):
        layout = read_manifest(folder)
        model, artifacts, store = layout.model, folder / HF_FOLDER, open_shards(folder, layout)
        kind = "shards"
        if exists_inside(folder, CERTIFICATE):
            ignored = read_certificate(folder).get("ignored", [])
    elif exists_inside(folder, "config.json"):
        config = read_json_inside(folder, "config.json")
        model, artifacts = model_config_from_hf(config, str(folder / "config.json")), folder
        check_artifacts(folder)
        weights = HFWeights(folder, model)
        store, kind, ignored = weights.store, "hf", weights.ignored
    else:
        raise MissingInput(
            f"{folder}: neither a Hugging Face folder (no config.json) nor a folder of shards (no {MANIFEST})"
        )
    if make_vocab_size_divisible_by is not None:
        model = replace(model, make_vocab_size_divisible_by=make_vocab_size_divisible_by)
    return WeightSource(folder, kind, model, artifacts, _fingerprint(folder, store), store, layout, ignored)


def _fingerprint(folder: Path, store: Store) -> str:
    if exists_inside(folder, CERTIFICATE):
        return weights_fingerprint(read_certificate(folder)["tensors"])
    digest = hashlib.sha256()
    for file in sorted(store.files(), key=lambda file: str(file.path)):
        _sample(file, digest)
    return f"samples:{digest.hexdigest()}"


def _sample(file: TensorFile, digest: hashlib._Hash) -> None:
    """Add the file's size and the first kilobyte of each of its tensors: tells weights apart in a moment."""
    digest.update(f"{file.path.name} {os.fstat(file.descriptor).st_size}\n".encode())
    for name, info in sorted(file.tensors.items()):
        block = bytearray(min(1024, info.stop - info.start))
        read_exactly(file.descriptor, memoryview(block), info.start, str(file.path))
        digest.update(f"{name} {info.dtype} {info.shape} ".encode() + block)
