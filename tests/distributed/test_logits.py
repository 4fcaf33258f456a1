"""The Megatron model computes what ``transformers`` computes, in every layout, on weights from outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .ranks import run_ranks
from .test_layouts import PP2, SP, TP2

pytestmark = pytest.mark.slow

TP4, PP5 = "parallel.tensor_model_parallel_size=4", "parallel.pipeline_model_parallel_size=5"
FIRST3 = "parallel.num_layers_in_first_pipeline_stage=3"
VPP2_UNEVEN = [
    "parallel.virtual_pipeline_model_parallel_size=2",
    "parallel.pipeline_model_parallel_layout='Et|t|t|ttL'",
]
STORIES_LAYOUTS = {
    1: {"single": []},
    4: {
        "tp2_pp2_3_and_2": [TP2, PP2, FIRST3],
        "tp4": [TP4],
        "tp2_pp2_vpp2": [TP2, PP2, *VPP2_UNEVEN],
        "tp2_pp2_sp": [TP2, PP2, FIRST3, SP],
    },
    5: {"pp5": [PP5]},
}

CONFIG = """
run_dir: {folder}/unused
platform: cpu
model: {{hf_path: {source}}}
data: {{seq_length: {length}, mock: true}}
precision: {{params_dtype: fp32}}
train: {{micro_batch_size: 1, global_batch_size: 4, train_iters: 1}}
checkpoint: {{initialize_from: {source}}}
"""


def megatron_logits(
    folder: Path, source: Path, rows: list[list[int]], layouts: dict[int, dict[str, list[str]]]
):
    """Logits by layout name, each [rows, seq, vocab]."""
    from safetensors.torch import load_file

    (folder / "run.yaml").write_text(CONFIG.format(folder=folder, source=source, length=len(rows[0])))
    (folder / "tokens.json").write_text(json.dumps(rows))
    found = {}
    for world_size, named in layouts.items():
        jobs = [
            {"config": str(folder / "run.yaml"), "overrides": overrides, "tokens": str(folder / "tokens.json"),
             "out": str(folder / f"{name}.safetensors")}
            for name, overrides in named.items()
        ]  # fmt: skip
        (folder / "jobs.json").write_text(json.dumps(jobs))
        run_ranks(world_size, ["-m", "distributed.logits_worker", str(folder / "jobs.json")])
        found |= {name: load_file(folder / f"{name}.safetensors")["logits"] for name in named}
    return found


def transformers_logits(source: Path, rows: list[list[int]]):
    """The judge: fp32, on whole rows."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, torch_dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(rows)).logits


def test_stories260k_in_every_layout(shared_data: Path, tmp_path: Path) -> None:
    import sentencepiece

    source = shared_data / "stories260k"
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    ids = [1, *tokenizer.encode(text * 16)]
    rows = [ids[i * 64 : i * 64 + 256] for i in range(4)]  # 256 long: far positions count too
    expected = transformers_logits(source, rows)
    for name, logits in megatron_logits(tmp_path, source, rows, STORIES_LAYOUTS).items():
        largest = (logits - expected).abs().max().item()
        print(f"stories260k {name}: largest logit difference {largest:.2e}")
        assert logits.shape == expected.shape
        assert largest <= 1e-4, name
