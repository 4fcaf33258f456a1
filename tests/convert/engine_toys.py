"""A Llama of a few megabytes as a Hugging Face folder, targets for it, and the plainest way to write one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_syne.config.schema import ParallelConfig
from megatron_syne.convert.formats.hf import open_hf, plan_hf
from megatron_syne.convert.formats.safetensors import TensorSpec, build_header
from megatron_syne.convert.formats.shards import plan_shards
from megatron_syne.convert.formats.torch_dist import plan_torch_dist
from megatron_syne.convert.numbers import ITEM_BYTES, convert, from_float32
from megatron_syne.convert.pieces import matrix
from megatron_syne.convert.streams import StoredWeights, Target, Weights
from megatron_syne.convert.table import hf_tensors
from megatron_syne.models.hf_config import model_config_from_hf

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1001,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def make_source(folder: Path, dtype: str = "BF16", **changes: Any) -> Path:
    """A Hugging Face folder of random weights in one file, with a licence."""
    config = CONFIG | changes
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "LICENSE").write_text("the licence\n")
    specs = [TensorSpec(n, dtype, s) for n, s in hf_tensors(model_config_from_hf(config, "toy")).items()]
    header, _, _ = build_header(specs, {"format": "pt"})
    random = np.random.default_rng(5)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(header)
        for spec in specs:
            values = random.standard_normal(matrix(spec.shape), np.float32) / 16
            stream.write(from_float32(values, dtype).tobytes())
    return folder


def shards(weights: Weights, **options: Any) -> Target:
    """TP 2 x PP 2, the second stage with two of the three layers, the vocabulary padded."""
    parallel = ParallelConfig(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=2, num_layers_in_first_pipeline_stage=1
    )
    return plan_shards(weights, parallel, make_vocab_size_divisible_by=64, **options)


def several_files(weights: Weights, **options: Any) -> Target:
    """A Hugging Face folder of several files."""
    return plan_hf(weights, max_shard_size="600KB", **options)


PLANS: dict[str, Callable[..., Target]] = {
    "hf": several_files,
    "shards": shards,
    "torch_dist": plan_torch_dist,
}


def read_all(weights: Weights, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A whole tensor, rows of bytes."""
    rows = matrix(weights.shapes[name])[0]
    out = np.empty((rows, weights.row_bytes(name)), np.uint8)
    weights.read(name, (0, rows), out)
    return out


def write_naively(weights: Weights, target: Target) -> dict[str, bytes]:
    """What the files of a target must hold, row by row."""
    found = {}
    for file in target.files:
        raw = found[file.path] = bytearray(file.size)
        for at, content in file.fixed:
            raw[at : at + len(content)] = content
    for name, places in target.places.items():
        seen = target.dtypes[name]
        tensor = convert(read_all(weights, name), weights.dtypes[name], seen, 0.0, name)
        for place in places:
            (top, bottom), (left, right) = place.piece.rows, place.piece.cols
            item = ITEM_BYTES[seen]
            part = np.ascontiguousarray(tensor[top:bottom, left * item : right * item])
            part = convert(part, seen, place.dtype, place.shift, name)
            at, stride = place.rows_at((top, bottom))
            for index, row in enumerate(part):
                found[place.file][at + index * stride : at + index * stride + len(row)] = row.tobytes()
    return {name: bytes(raw) for name, raw in found.items()} | dict(target.documents)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if not p.is_dir()}


def opened(folder: Path) -> StoredWeights:
    """The toy's weights."""
    return open_hf(folder)
