"""What the tests of surgery share: weights in memory, and a writer that knows nothing of the engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from megatron_syne.config.schema import ModelConfig
from megatron_syne.convert.formats.hf import plan_hf
from megatron_syne.convert.numbers import TORCH_NAMES, from_float32, to_float32
from megatron_syne.convert.pieces import Span, matrix
from megatron_syne.convert.streams import Weights
from megatron_syne.convert.table import hf_tensors
from megatron_syne.models.config import resolve_model
from megatron_syne.models.hf_config import hf_config_from_model


class Memory(Weights):
    """A tiny random Llama whose tensors are numpy arrays of bytes."""

    def __init__(self, seed: int = 0, dtype: str = "F32", scale: float = 1.0, **changes: Any) -> None:
        fields = {
            "model_type": "llama",
            "num_layers": 2,
            "hidden_size": 8,
            "ffn_hidden_size": 12,
            "num_attention_heads": 2,
            "num_query_groups": 1,
            "kv_channels": 4,
            "vocab_size": 11,
            "max_position_embeddings": 32,
            "layernorm_epsilon": 1e-5,
            "rotary_base": 10000.0,
            "share_embeddings_and_output_weights": False,
        }
        self.model = resolve_model(ModelConfig(**fields | changes))
        self.config = hf_config_from_model(self.model, TORCH_NAMES[dtype])
        self.artifacts_dir = None
        self.shapes = hf_tensors(self.model)
        self.dtypes = dict.fromkeys(self.shapes, dtype)
        generator = np.random.default_rng(seed)
        self.raw: dict[str, Any] = {}
        for name, shape in self.shapes.items():
            self.fill(name, scale * generator.standard_normal(matrix(shape)))

    def fill(self, name: str, values: Any) -> None:
        single = np.ascontiguousarray(values, np.float32).reshape(matrix(self.shapes[name]))
        self.raw[name] = from_float32(single, self.dtypes[name]).copy()

    def read(self, name: str, rows: Span, out: Any) -> None:
        out[:] = self.raw[name][rows[0] : rows[1]]

    def describe(self) -> dict[str, Any]:
        return {"kind": "memory"}


def whole(weights: Weights, name: str, rows_at_once: int | None = None) -> Any:
    """All bytes of a tensor, read in tiles of so many rows, the last tile first."""
    height = matrix(weights.shapes[name])[0]
    out = np.empty((height, weights.row_bytes(name)), np.uint8)
    step = rows_at_once or height
    for first in reversed(range(0, height, step)):
        stop = min(first + step, height)
        weights.read(name, (first, stop), out[first:stop])
    return out


def values(weights: Weights, name: str) -> Any:
    """A tensor in float64, rows x columns."""
    return to_float32(whole(weights, name), weights.dtypes[name]).astype(np.float64)


def same_bits(a: Weights, b: Weights) -> bool:
    """Whether all tensors have the same formats, shapes and bytes."""
    return (
        a.shapes == b.shapes
        and a.dtypes == b.dtypes
        and all(np.array_equal(whole(a, name), whole(b, name)) for name in a.shapes)
    )


def save(weights: Weights, folder: Path, rows_at_once: int | None = None) -> Path:
    """Write a Hugging Face folder, byte by byte as planned."""
    target = plan_hf(weights)
    folder.mkdir(parents=True)
    contents = {file.path: bytearray(file.size) for file in target.files}
    for file in target.files:
        for offset, fixed in file.fixed:
            contents[file.path][offset : offset + len(fixed)] = fixed
    for name, (place,) in target.places.items():
        raw = whole(weights, name, rows_at_once).tobytes()
        contents[place.file][place.offset : place.offset + len(raw)] = raw
    for name, content in {**contents, **target.documents}.items():
        (folder / name).write_bytes(content)
    return folder


def logits(folder: Path, tokens: Any) -> Any:
    """What transformers computes at every position, in fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model.eval()(torch.as_tensor(tokens)).logits


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
