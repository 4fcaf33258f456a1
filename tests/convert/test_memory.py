"""Conversion holds one parameter at a time, however large the model is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from megatron_syne.config.schema import ModelConfig
from megatron_syne.convert.certificate import verify
from megatron_syne.convert.safetensors_io import TensorSpec, TensorWriter
from megatron_syne.convert.table import hf_tensors
from megatron_syne.models.hf_config import hf_config_from_model, model_config_from_hf

PROGRAM = r"""
import re, sys
from pathlib import Path
from megatron_syne.config.schema import ParallelConfig
from megatron_syne.convert.export import export_shards
from megatron_syne.convert.importing import import_to_shards

source, out = Path(sys.argv[1]), Path(sys.argv[2])

def peak():  # not ru_maxrss: a child starts with its parent's
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])

start = peak()
parallel = ParallelConfig(tensor_model_parallel_size=4, pipeline_model_parallel_size=3)
shards = import_to_shards(source, out / "shards", parallel)
after_import = peak()
export_shards(shards, out / "hf", max_shard_size="100MB")
print(after_import - start, peak() - start)
"""


def write_checkpoint(folder: Path) -> tuple[ModelConfig, int]:
    """A Hugging Face folder of 12 layers in bf16; the model and its size in bytes."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "vocab_size": 1000}
    sizes |= {"num_attention_heads": 16, "num_key_value_heads": 4}
    model = model_config_from_hf(sizes, "sizes")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config_from_model(model, "bfloat16")))
    specs = [TensorSpec(name, torch.bfloat16, shape) for name, shape in hf_tensors(model).items()]
    writer = TensorWriter(folder / "model.safetensors", specs, {"format": "pt"})
    for spec in specs:
        writer.write(spec.name, torch.randn(spec.shape).bfloat16())
    writer.finish()
    return model, sum(spec.size_bytes for spec in specs)


def test_peak_memory_is_far_below_the_model(tmp_path: Path, repository: Path) -> None:
    _, size = write_checkpoint(tmp_path / "source")
    largest = 2 * 2 * 2816 * 1024  # gate and up of one layer, two bytes each
    environment = os.environ | {"PYTHONPATH": str(repository)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "source"), str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
        timeout=300,
    )
    after_import, after_export = map(int, done.stdout.split())
    print(f"model {size}, largest parameter {largest}, import +{after_import}, export +{after_export}")
    blocks = 2 * 8 * 2**20  # a block to read, a block to hash
    slack = 24 * 2**20  # the allocator, tables of names
    assert after_import <= 2 * largest + blocks + slack
    assert after_export <= 3 * largest + blocks + slack
    assert size > 250e6
    assert verify(tmp_path / "hf").fingerprint == verify(tmp_path / "shards").fingerprint
