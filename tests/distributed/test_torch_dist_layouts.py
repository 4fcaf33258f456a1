"""Our ``torch_dist`` and megatron-core's own are one format: each loads what the other wrote, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from unit.convert.format_toys import ToyWeights, write

from megatron_syne.convert.engine import convert
from megatron_syne.convert.formats.hf import open_hf, plan_hf
from megatron_syne.convert.formats.torch_dist import plan_torch_dist
from megatron_syne.models.hf_config import model_config_from_hf

from .conftest import make_seed
from .ranks import run_ranks

pytestmark = pytest.mark.slow

TP2 = "parallel.tensor_model_parallel_size=2"
PP2 = "parallel.pipeline_model_parallel_size=2"
VPP2 = "parallel.virtual_pipeline_model_parallel_size=2"
SP = "parallel.sequence_parallel=true"
BF16, FP32 = "precision.params_dtype=bf16", "precision.params_dtype=fp32"
LAYOUTS = {"tp1": [], "tp2_pp2": [TP2, PP2], "tp2_sp": [TP2, SP], "pp2_vpp2": [PP2, VPP2]}
PADDED = "model.make_vocab_size_divisible_by=24"
WORLD = 4

CONFIG = """
run_dir: {folder}/unused
platform: cpu
model: {{hf_path: {source}}}
data: {{seq_length: 64, mock: true}}
precision: {{params_dtype: fp32}}
train: {{micro_batch_size: 1, global_batch_size: 4, train_iters: 1}}
"""


def run_jobs(folder: Path, jobs: list[dict[str, Any]]) -> None:
    """Run all jobs in one world; every parameter of every rank must have been compared and found equal."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    run_ranks(WORLD, ["-m", "distributed.torch_dist_worker", str(folder / "jobs.json")], timeout=1800)
    for rank in range(WORLD):
        found = json.loads((folder / f"found_{rank}.json").read_text())
        assert set(found) == {job["name"] for job in jobs}
        for name, (compared, different) in found.items():
            assert compared >= 10, (name, rank)
            assert not different, (name, rank)


def jobs_of(
    folder: Path, source: Path, dtype: str, layouts: dict[str, list[str]], optimizer: bool = True
) -> list[dict[str, Any]]:
    """Load what we write, and open what the engine writes, in every layout."""
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder, source=source))
    weights = open_hf(source)
    ours = folder / "ours"
    convert(weights, plan_torch_dist(weights, make_vocab_size_divisible_by=8), ours)
    jobs: list[dict[str, Any]] = []
    for layout, overrides in layouts.items():
        common = {"config": str(folder / "run.yaml"), "source": str(source)}
        base = [dtype, PADDED, *overrides]
        jobs.append(common | {"do": "load", "name": f"load_{layout}", "overrides": base, "path": str(ours)})
        for do in ("save", "save_pt"):
            name = f"{do}_{layout}"
            job = {
                "do": do,
                "name": name,
                "path": str(folder / name),
                "optimizer": optimizer and layout != "tp1",
            }
            jobs.append(common | job | {"overrides": base})
    return jobs


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_both_ways_in_every_layout(tmp_path: Path, dtype: str) -> None:
    source = make_seed(tmp_path / "seed", vocab_size=131, num_hidden_layers=4)
    run_jobs(tmp_path, jobs_of(tmp_path, source, dtype, LAYOUTS))


def test_trained_and_tied_weights_with_uneven_stages(shared_data: Path, tmp_path: Path) -> None:
    layouts = {
        "tp2_pp2_3_and_2": [TP2, PP2, "parallel.num_layers_in_first_pipeline_stage=3"],
        "pp2_vpp2": [PP2, VPP2, "parallel.pipeline_model_parallel_layout='Et|t|t|ttL'"],
    }
    run_jobs(tmp_path, jobs_of(tmp_path, shared_data / "stories260k", FP32, layouts, optimizer=False))


FAMILIES = {
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "rms_norm_eps": 1e-6},
    "inflm": {"architectures": ["INFLMForCausalLM"], "layer_norm_eps": 1e-5, "head_dim": 8},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_biases_and_zero_centred_norms(tmp_path: Path, family: str) -> None:
    pytest.importorskip(f"megatron_syne.convert.families.{family}")
    config = {
        "model_type": family,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 131,
        "max_position_embeddings": 64,
        **FAMILIES[family],
    }
    weights = ToyWeights(model_config_from_hf(config, "toy"), "F32")
    source = write(weights, plan_hf(weights), tmp_path / "source")
    run_jobs(tmp_path, jobs_of(tmp_path, source, FP32, {"tp2_pp2": LAYOUTS["tp2_pp2"]}))
