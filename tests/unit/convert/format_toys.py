"""Weights in memory, and the plainest way to write a target: an empty file and every element put in its place."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np

from megatron_syne.config.schema import ModelConfig
from megatron_syne.convert.numbers import ITEM_BYTES, convert, from_float32
from megatron_syne.convert.pieces import Span, matrix
from megatron_syne.convert.streams import Bytes, Target, Weights
from megatron_syne.convert.table import hf_tensors
from megatron_syne.models.hf_config import hf_config_from_model, model_config_from_hf

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,  # not hidden / heads: the projections are not square
    "vocab_size": 31,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
}


def toy_model(**changes: Any) -> ModelConfig:
    """A small Llama; ``changes`` as in ``config.json``."""
    return model_config_from_hf(CONFIG | changes, "toy")


class ToyWeights(Weights):
    """Random numbers around 1, other ones for every name; ``dtypes`` for single tensors by their name."""

    def __init__(self, model: ModelConfig, dtype: str = "BF16", **dtypes: str) -> None:
        self.model, self.artifacts_dir = model, None
        self.config = hf_config_from_model(model, "bfloat16")
        self.shapes = hf_tensors(model)
        self.dtypes = dict.fromkeys(self.shapes, dtype) | dtypes
        self.documents: dict[str, bytes] = {}
        self.rows: dict[str, Bytes] = {}
        for name, shape in self.shapes.items():
            random = np.random.default_rng(zlib.crc32(name.encode()))
            values = (1 + 0.1 * random.standard_normal(matrix(shape))).astype(np.float32)
            self.rows[name] = from_float32(values, self.dtypes[name])

    def read(self, name: str, rows: Span, out: Bytes) -> None:
        out[:] = self.rows[name][slice(*rows)]

    def describe(self) -> dict[str, Any]:
        return {"kind": "toy"}


def write(weights: Weights, target: Target, folder: Path) -> Path:
    """Write a target row by row; the folder."""
    for file in target.files:
        path = folder / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = bytearray(file.size)
        for at, content in file.fixed:
            raw[at : at + len(content)] = content
        for name, places in target.places.items():
            source, item = weights.dtypes[name], ITEM_BYTES[weights.dtypes[name]]
            for place in places:
                if place.file == file.path:
                    (top, bottom), (left, right) = place.piece.rows, place.piece.cols
                    part = read(weights, name)[top:bottom, left * item : right * item]
                    if (place.dtype, place.shift) != (source, 0.0):
                        part = convert(np.ascontiguousarray(part), source, place.dtype, place.shift, name)
                    at, stride = place.rows_at(place.piece.rows)
                    for index, row in enumerate(part):
                        raw[at + index * stride : at + index * stride + len(row)] = row.tobytes()
        path.write_bytes(raw)
    for name, content in target.documents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def read(weights: Weights, name: str) -> Bytes:
    """All rows of a tensor."""
    out = np.empty((matrix(weights.shapes[name])[0], weights.row_bytes(name)), np.uint8)
    weights.read(name, (0, len(out)), out)
    return out


def same(a: Weights, b: Weights) -> bool:
    """Whether two weights hold the same tensors in the same formats, bit for bit."""
    assert a.shapes == b.shapes and a.dtypes == b.dtypes
    return all(np.array_equal(read(a, name), read(b, name)) for name in a.shapes)
