"""megatron-core's GPTModel, filled by this room, against transformers: fp32 logits at every position.

One process; the layouts over several are compared in ``tests/distributed``.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from megatron_syne.config.schema import ParallelConfig
from megatron_syne.convert.importing import import_to_shards

PROGRAM = """
import sys
from megatron_syne.platform.base import select

platform = select("cpu")
import torch
from safetensors.torch import load_file, save_file
from megatron_syne.config.schema import DataConfig, ModelConfig, PrecisionConfig, RunConfig
from megatron_syne.convert.source import open_source
from megatron_syne.models.gpt import build_model, load_weights
from megatron_syne.models.config import resolve_model
from megatron_syne.parallel.ranks import rank_info
from megatron_syne.parallel.setup import (
    start_distributed, start_model_parallel, stop_distributed, stop_model_parallel,
)

hf, weights, tokens, out = sys.argv[1:]
tokens = load_file(tokens)["tokens"]
config = RunConfig(
    model=ModelConfig(hf_path=hf, make_vocab_size_divisible_by=48),
    precision=PrecisionConfig(params_dtype="fp32"),
    data=DataConfig(seq_length=tokens.shape[1]),
)
model = resolve_model(config.model)
info = rank_info()
platform.start(info.local_rank, config.precision)
start_distributed(platform, info, 60)
start_model_parallel(config.parallel, 1)
chunks = build_model(config, model, platform)
source = open_source(weights)
source.check_model(model)
load_weights(chunks, source.parameter)
with torch.no_grad():
    logits = chunks[0].eval()(tokens, torch.arange(tokens.shape[1])[None], None)
assert logits.shape[-1] % 48 == 0, "the vocabulary was padded"
save_file({"logits": logits[..., : model.vocab_size].contiguous()}, out)
stop_model_parallel()
stop_distributed()
"""


def megatron_logits(
    tmp_path: Path, repository: Path, hf: Path, weights: Path, tokens: torch.Tensor
) -> torch.Tensor:
    save_file({"tokens": tokens}, tmp_path / "tokens")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")} | {
        "PYTHONPATH": str(repository),
        "TORCH_COMPILE_DISABLE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
    }
    paths = [str(path) for path in (hf, weights, tmp_path / "tokens", tmp_path / "logits")]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *paths], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return load_file(tmp_path / "logits")["logits"]


def hf_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
    return result


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@pytest.mark.parametrize("start", ["hf", "shards"])
def test_stories(tmp_path: Path, repository: Path, shared_data: Path, start: str) -> None:
    stories = weights = shared_data / "stories260k"
    if start == "shards":
        layout = ParallelConfig(
            tensor_model_parallel_size=2,
            pipeline_model_parallel_size=2,
            virtual_pipeline_model_parallel_size=2,
            pipeline_model_parallel_layout="Et|t|t|ttL",
        )
        weights = tmp_path / "shards"
        import_to_shards(stories, weights, layout).close()
    tokens = torch.randint(512, (1, 512), generator=torch.Generator().manual_seed(0))
    found = megatron_logits(tmp_path, repository, stories, weights, tokens)
    assert difference(found, hf_logits(stories, tokens)) <= 1e-4


def test_llama3_scaling_far_out(tmp_path: Path, repository: Path, toy_maker: Any) -> None:
    """Rope scaling shows at late positions only; the same model without it must fail this comparison."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    sizes = {"num_hidden_layers": 2, "head_dim": 64, "hidden_size": 32, "max_position_embeddings": 16384}
    toy = toy_maker(tmp_path / "toy", rope_scaling=scaling, **sizes)
    tokens = torch.randint(131, (1, 3000), generator=torch.Generator().manual_seed(0))
    found = megatron_logits(tmp_path, repository, toy, toy, tokens)
    assert difference(found, hf_logits(toy, tokens)) <= 1e-4
    config = json.loads((toy / "config.json").read_text())
    (toy / "config.json").write_text(json.dumps(config | {"rope_scaling": None}))
    assert difference(found, hf_logits(toy, tokens)) > 1e-3
