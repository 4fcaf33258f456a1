"""Weights for training: parameters of a rank as torch tensors, out of any format.

source = open_source(Path("Meta-Llama-3-8B"))
part = source.parameter("decoder.layers.0.mlp.linear_fc1.weight", tp_rank=0, tp_size=8)

The one module of this room that needs torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megatron_syne.config.schema import ModelConfig
from megatron_syne.convert.certificate import weights_fingerprint
from megatron_syne.convert.files import read_exactly
from megatron_syne.convert.formats.detect import open_weights
from megatron_syne.convert.numbers import ITEM_BYTES
from megatron_syne.convert.pieces import Entry, local_shape, matrix, pieces
from megatron_syne.convert.streams import Bytes, StoredWeights
from megatron_syne.convert.table import find
from megatron_syne.errors import ConfigError, DataError
from megatron_syne.models.config import model_differences

_TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass
class WeightSource:
    """Open weights. Every read takes only the parts that it needs from the disk."""

    stored: StoredWeights
    model: ModelConfig
    """The resolved model, with the padding rule that :meth:`parameter` follows."""

    @property
    def folder(self) -> Path:
        """Where they lie."""
        return self.stored.folder

    @property
    def kind(self) -> str:
        """``hf``, ``shards``, ``torch_dist``, ``megatron_pt``."""
        return self.stored.kind

    @property
    def artifacts_dir(self) -> Path | None:
        """Folder with ``config.json``, tokenizer, generation config, licence."""
        return self.stored.artifacts_dir

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the weights: the same for a source and all that was made from it where they carry
        certificates; otherwise of samples of the files (``samples:``)."""
        if self.stored.certificate is not None:
            return weights_fingerprint(self.stored.certificate["tensors"])
        return _sample(self.stored)

    def parameter(self, name: str, tp_rank: int, tp_size: int) -> torch.Tensor:
        """The part of a Megatron parameter that belongs to one TP rank, in the format it is stored in (fp32
        for the weight of a zero-centred norm).

        ``name``: local or Transformer Engine name, layers numbered over the whole model. Rows of padding are
        zero. ``output_layer.weight`` of a tied model is the embedding. Raises ConfigError for a name or a
        TP size that the model does not have, DataError where the tensors that it is made of differ in format.
        """
        entry = find(name, self.model)
        wanted = pieces(entry, self.model, tp_rank, tp_size)
        dtype = self._dtype(entry)
        out = torch.empty(local_shape(entry, self.model, tp_size), dtype=_TORCH[dtype])
        raw = _bytes(out, dtype)
        filled = max((piece.at[0] + piece.rows[1] - piece.rows[0] for piece in wanted), default=0)
        raw[filled:] = 0
        for piece in wanted:
            places = self.stored.places[piece.source]
            if entry.shift:  # fill() gives Hugging Face's value; what is stored as Megatron's comes as it is
                places = [replace(place, shift=place.shift - entry.shift) for place in places]
            self.stored.fill(places, piece, raw, dtype)
        return out

    def check_model(self, model: ModelConfig) -> None:
        """Raises ConfigError that lists where the weights do not fit a run's resolved model; from here on
        :meth:`parameter` pads the vocabulary as that model does."""
        different = model_differences(model, self.model)
        if different:
            raise ConfigError(
                f"{self.folder}: the weights are of another model than the run's: {'; '.join(different)}; "
                f"set model.hf_path to {self.artifacts_dir or self.folder}"
            )
        self.model = replace(self.model, make_vocab_size_divisible_by=model.make_vocab_size_divisible_by)

    def tensor(self, name: str) -> torch.Tensor:
        """A whole Hugging Face tensor by its name."""
        shape, dtype = self.stored.shapes[name], self.stored.dtypes[name]
        out = torch.empty(shape, dtype=_TORCH[dtype])
        self.stored.read(name, (0, shape[0]), _bytes(out, dtype))
        return out

    def close(self) -> None:
        """Close the files."""
        self.stored.close()

    def _dtype(self, entry: Entry) -> str:
        if entry.shift:
            return "F32"
        dtypes = {tensor: self.stored.dtypes[tensor] for tensor in entry.hf}
        if len(set(dtypes.values())) > 1:
            formats = ", ".join(f"{tensor} {dtype}" for tensor, dtype in dtypes.items())
            raise DataError(f"{self.folder}: tensors that become one parameter differ in format: {formats}")
        return next(iter(dtypes.values()))


def open_source(
    path: str | Path, make_vocab_size_divisible_by: int | None = None, hf_config: Path | None = None
) -> WeightSource:
    """Open weights in any format; checks everything but their values.

    ``hf_config``: folder with the ``config.json`` of a checkpoint that has none.
    ``make_vocab_size_divisible_by``: padding rule for :meth:`WeightSource.parameter`; not given = the one of
    the shards, 1 for other formats. Raises MissingInput, DataError, SecurityRefusal.
    """
    stored = open_weights(path, hf_config)
    multiple = make_vocab_size_divisible_by
    if multiple is None:
        multiple = stored.model.make_vocab_size_divisible_by if stored.kind == "shards" else 1
    return WeightSource(stored, replace(stored.model, make_vocab_size_divisible_by=multiple))


def _bytes(tensor: torch.Tensor, dtype: str) -> Bytes:
    """A tensor's memory as rows of bytes."""
    rows, columns = matrix(tuple(tensor.shape))
    view: Bytes = tensor.view(-1).view(torch.uint8).numpy().reshape(rows, columns * ITEM_BYTES[dtype])
    return view


def _sample(stored: StoredWeights) -> str:
    """Hash of the files' sizes and the first kilobyte of every piece: tells weights apart in a moment."""
    digest = hashlib.sha256()
    for name, path in stored.files().items():
        digest.update(f"{name} {path.stat().st_size}\n".encode())
    for name in sorted(stored.places):
        for place in _in_order(stored.places[name]):
            at, stride = place.rows_at(place.piece.rows)
            width = (place.piece.cols[1] - place.piece.cols[0]) * ITEM_BYTES[place.dtype]
            block: Any = bytearray(min(1024, width))
            where = str(stored.folder / place.file)
            read_exactly(stored.descriptors[place.file], memoryview(block), at, where)
            digest.update(f"{place.piece} {place.dtype} {stride} ".encode() + block)
    return f"samples:{digest.hexdigest()}"


def _in_order(places: Iterable[Any]) -> list[Any]:
    return sorted(places, key=lambda place: (place.file, place.offset, place.piece.at))
