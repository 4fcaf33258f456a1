"""What is recomputed, offloaded, overlapped and in which formats: refused before the engine sees it, or accepted
by the engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_syne.config.loader import load_config
from megatron_syne.models.config import resolve_model
from megatron_syne.preflight.facts import Facts
from megatron_syne.preflight.memory_rules import MEMORY_RULES

RUN = (
    "run_dir: out\n"
    "model: {num_layers: 8, hidden_size: 64, ffn_hidden_size: 192, num_attention_heads: 8, num_query_groups: 4,"
    " kv_channels: 8, vocab_size: 512, max_position_embeddings: 128, layernorm_epsilon: 1e-5,"
    " rotary_base: 500000, share_embeddings_and_output_weights: false}\n"
    "data: {seq_length: 64, mock: true}\ntrain: {train_iters: 20}\n"
)
TP2 = "parallel.tensor_model_parallel_size=2"
SP = "parallel.sequence_parallel=true"
PP2 = "parallel.pipeline_model_parallel_size=2"
VPP2 = "parallel.virtual_pipeline_model_parallel_size=2"
SELECTIVE, FULL = (f"memory.recompute_granularity={kind}" for kind in ("selective", "full"))
UNIFORM, BLOCK = (f"memory.recompute_method={method}" for method in ("uniform", "block"))
DISTRIBUTE = "memory.distribute_saved_activations=true"
OFFLOAD = "memory.cpu_offloading=true"
TP_OVERLAP = "parallel.tp_comm_overlap=true"
AWARE = "optimizer.use_precision_aware_optimizer=true"
GRADS16 = ["optimizer.main_grads_dtype=bf16", "precision.accumulate_allreduce_grads_in_fp32=false"]
STATE_OFFLOAD = "optimizer.optimizer_cpu_offload=true"
FP8 = "optimizer.exp_avg_dtype=fp8"
STAGES = "data.stages=[{name: a, tokens: 512, mixture: {x: 1}, micro_batch_size: 2}]"


def count(layers: int) -> str:
    return f"memory.recompute_num_layers={layers}"


def problems(folder: Path, overrides: list[str], platform: Any) -> list[str]:
    (folder / "run.yaml").write_text(RUN)
    config = load_config(str(folder / "run.yaml"), overrides)
    facts = Facts(config, resolve_model(config.model), None, platform)
    return [text for rule in MEMORY_RULES for text in rule(facts)]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [SELECTIVE],
        [SELECTIVE, "memory.recompute_modules=[core_attn,mlp,layernorm]"],
        [SELECTIVE, "memory.recompute_modules=[layernorm]", "precision.fp8=tensorwise"],
        [FULL, UNIFORM],
        [FULL, UNIFORM, count(8)],
        [FULL, BLOCK, count(5)],
        [FULL, UNIFORM, count(2), PP2, VPP2],
        [FULL, BLOCK, DISTRIBUTE, TP2],
        ["parallel.ddp_bucket_size=1000", "parallel.overlap_grad_reduce=true"],
        [AWARE],
        [AWARE, FP8, "optimizer.exp_avg_sq_dtype=fp16", "optimizer.main_params_dtype=fp16", *GRADS16],
        [AWARE, FP8, "precision.fp8=delayed"],
        [AWARE, "optimizer.exp_avg_dtype=bf16", "precision.fp8=blockwise"],
        [AWARE, FP8, "optimizer.main_params_dtype=fp16", "precision.fp8=tensorwise"],
        [AWARE, FP8, "precision.fp8=tensorwise"],
    ],
)
def test_what_fits_together_is_accepted(tmp_path: Path, overrides: list[str]) -> None:
    for platform in ("cpu", "cuda"):
        assert problems(tmp_path, overrides, platform) == []


@pytest.mark.parametrize(
    "overrides",
    [
        [OFFLOAD],
        [OFFLOAD, "memory.cpu_offloading_num_layers=7"],
        [TP_OVERLAP, TP2, SP],
        [STATE_OFFLOAD, AWARE, "optimizer.optimizer_offload_fraction=0.5"],
        [STATE_OFFLOAD, AWARE, "optimizer.overlap_cpu_optimizer_d2h_h2d=true", *GRADS16],
    ],
)
def test_what_is_of_cuda_is_accepted_there_alone(tmp_path: Path, overrides: list[str]) -> None:
    assert problems(tmp_path, overrides, "cuda") == []
    assert len(problems(tmp_path, overrides, "cpu")) == 1


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            [UNIFORM],
            ["memory.recompute_method = uniform (command line)", "recompute_granularity: full", "null"],
        ),
        ([count(2)], ["memory.recompute_num_layers = 2", "full"]),
        ([SELECTIVE, count(2)], ["memory.recompute_num_layers = 2", "it is selective"]),
        ([SELECTIVE, UNIFORM], ["memory.recompute_method = uniform", "it is selective"]),
        ([FULL, UNIFORM, "memory.recompute_modules=[mlp]"], ["recompute_modules", "selective"]),
        ([DISTRIBUTE, TP2], ["distribute_saved_activations = true", "full"]),
        ([FULL], ["memory.recompute_granularity = full", "uniform or block"]),
        ([SELECTIVE, "memory.recompute_modules=[mlp,moe]"], ["no module moe", "core_attn, mlp, layernorm"]),
        (
            [SELECTIVE, "memory.recompute_modules=[layernorm]", "precision.fp8=delayed"],
            ["delayed", "tensorwise"],
        ),
        ([FULL, UNIFORM, count(3)], ["num_layers = 3", "divide", "(8)", "nearest legal: 2 or 4"]),
        ([FULL, UNIFORM, count(0)], ["num_layers = 0", "nearest legal: 1"]),
        ([FULL, UNIFORM, count(4), PP2, VPP2], ["num_layers = 4", "(2)", "nearest legal: 2"]),
        ([FULL, BLOCK, count(9)], ["at most", "(8)", "nearest legal: 8"]),
        (
            [FULL, UNIFORM, count(2), PP2, "parallel.num_layers_in_first_pipeline_stage=3"],
            ["num_layers = 2", "(3, 5)", "nearest legal: 1"],
        ),
        ([FULL, UNIFORM, DISTRIBUTE, TP2, SP], ["distribute_saved_activations", "sequence_parallel = true"]),
        ([FULL, UNIFORM, DISTRIBUTE], ["tensor_model_parallel_size > 1"]),
        (
            [FULL, UNIFORM, DISTRIBUTE, TP2, "data.seq_length=63", "model.hidden_size=65"],
            ["63 x 65", "tensor_model_parallel_size = 2"],
        ),
        (["memory.cpu_offloading_num_layers=2"], ["cpu_offloading: true"]),
        ([OFFLOAD, PP2], ["memory.cpu_offloading = true", "pipeline_model_parallel_size = 2"]),
        ([OFFLOAD, SELECTIVE], ["memory.cpu_offloading = true", "recompute_granularity = selective"]),
        ([OFFLOAD, FULL, BLOCK], ["memory.cpu_offloading = true", "recompute_granularity = full"]),
        ([OFFLOAD, "memory.cpu_offloading_num_layers=8"], ["below model.num_layers = 8", "nearest legal: 7"]),
        ([OFFLOAD, "memory.cpu_offloading_num_layers=0"], ["nearest legal: 1"]),
        ([OFFLOAD, "model.num_layers=1"], ["model.num_layers = 1"]),
        ([TP_OVERLAP], ["tp_comm_overlap = true", "tensor_model_parallel_size > 1"]),
        ([TP_OVERLAP, TP2], ["sequence_parallel: true"]),
        (
            [TP_OVERLAP, TP2, SP, "data.mock=false", STAGES],
            ["one micro batch", "data.stages.0.micro_batch_size = 2", "train.micro_batch_size = 1"],
        ),
        (
            [TP_OVERLAP, TP2, SP, "data.mock=false", STAGES.replace("micro_batch_size: 2", "seq_length: 32")],
            ["one sequence length", "data.seq_length = 64", "data.stages.0.seq_length = 32"],
        ),
        (["parallel.ddp_bucket_size=1000"], ["ddp_bucket_size = 1000", "overlap_grad_reduce: true"]),
        (["parallel.ddp_bucket_size=0", "parallel.overlap_grad_reduce=true"], ["at least 1"]),
        ([FP8], ["optimizer.exp_avg_dtype = fp8", "use_precision_aware_optimizer: true"]),
        (["optimizer.main_params_dtype=fp16"], ["main_params_dtype = fp16", "use_precision_aware_optimizer"]),
        ([AWARE, "parallel.use_distributed_optimizer=false"], ["use_distributed_optimizer: true"]),
        ([AWARE, "precision.params_dtype=fp32"], ["params_dtype: bf16"]),
        (
            [AWARE, "optimizer.main_grads_dtype=bf16"],
            ["main_grads_dtype = bf16", "grads_in_fp32 = true", "fp32"],
        ),
        ([AWARE, "precision.accumulate_allreduce_grads_in_fp32=false"], ["main_grads_dtype: bf16"]),
        (
            [AWARE, "optimizer.exp_avg_sq_dtype=fp8"],
            ["exp_avg_sq_dtype = fp8", "nearest legal: fp16 or bf16"],
        ),
        (
            [AWARE, FP8, "precision.fp8=tensorwise", "precision.fp8_param_gather=true"],
            ["exp_avg_dtype = fp8", "fp8 = tensorwise", "bf16"],
        ),
        (["optimizer.optimizer_offload_fraction=0.5"], ["optimizer_cpu_offload: true"]),
        (["optimizer.overlap_cpu_optimizer_d2h_h2d=true"], ["optimizer_cpu_offload: true"]),
        ([STATE_OFFLOAD, AWARE, "optimizer.optimizer_offload_fraction=1.5"], ["above 0 and at most 1"]),
        ([STATE_OFFLOAD], ["use_precision_aware_optimizer: true"]),
        ([STATE_OFFLOAD, AWARE, FP8], ["exp_avg_dtype = fp8", "fp32"]),
        (
            [STATE_OFFLOAD, AWARE, "precision.fp8=blockwise", "precision.fp8_param_gather=true"],
            ["precision.fp8: delayed", "precision.fp8 = blockwise"],
        ),
    ],
)
def test_each_rule_names_numbers_and_a_way_out(
    tmp_path: Path, overrides: list[str], words: list[str]
) -> None:
    found = problems(tmp_path, overrides, "cuda")
    assert len(found) == 1, found
    for word in words:
        assert word in found[0], found[0]


PRODUCTS = """
import itertools, json, sys
from dataclasses import replace

from megatron_syne.platform.base import select

platform = select("cpu")
from megatron_syne.config.loader import load_config
from megatron_syne.models.config import resolve_model
from megatron_syne.models.engine_options import engine_config
from megatron_syne.preflight.facts import Facts
from megatron_syne.preflight.memory_rules import MEMORY_RULES
from megatron_syne.training.optimizer import engine_ddp_config, engine_optimizer_config

run = load_config(sys.argv[1])
model = resolve_model(run.model)
platform.start(0, run.precision)
BOOL = (False, True)
PRODUCTS = [
    {
        "memory.recompute_granularity": (None, "selective", "full"),
        "memory.recompute_method": (None, "uniform", "block"),
        "memory.recompute_num_layers": (None, 1, 3, 4, 9),
        "memory.recompute_modules": ([], ["mlp"], ["layernorm", "core_attn"], ["moe_act"]),
        "memory.distribute_saved_activations": BOOL,
        "memory.cpu_offloading": BOOL,
        "memory.cpu_offloading_num_layers": (None, 8),
        "parallel.sequence_parallel": BOOL,
        "parallel.tensor_model_parallel_size": (2,),
        "parallel.pipeline_model_parallel_size": (1, 2),
    },
    {
        "optimizer.use_precision_aware_optimizer": BOOL,
        "optimizer.main_grads_dtype": ("fp32", "bf16"),
        "optimizer.main_params_dtype": ("fp32", "fp16"),
        "optimizer.exp_avg_dtype": ("fp32", "bf16", "fp16", "fp8"),
        "optimizer.exp_avg_sq_dtype": ("fp32", "bf16", "fp16", "fp8"),
        "optimizer.optimizer_cpu_offload": BOOL,
        "precision.params_dtype": ("bf16", "fp32"),
        "precision.accumulate_allreduce_grads_in_fp32": BOOL,
        "precision.fp8": (None, "delayed", "tensorwise"),
        "parallel.use_distributed_optimizer": BOOL,
        "parallel.overlap_grad_reduce": BOOL,
        "parallel.ddp_bucket_size": (None, 100),
    },
    {
        "parallel.tp_comm_overlap": BOOL,
        "parallel.sequence_parallel": BOOL,
        "parallel.tensor_model_parallel_size": (2,),
        "memory.cpu_offloading": BOOL,
        "precision.fp8": (None, "delayed"),
    },
]
accepted, unnamed, raised = [0] * len(PRODUCTS), [], []
for number, product in enumerate(PRODUCTS):
    for values in itertools.product(*product.values()):
        chosen = dict(zip(product, values))
        parts = {}
        for key, value in chosen.items():
            section, name = key.split(".")
            parts.setdefault(section, {})[name] = value
        config = replace(run, **{s: replace(getattr(run, s), **fields) for s, fields in parts.items()})
        facts = Facts(config, model, None, "cpu")
        found = [text for rule in MEMORY_RULES for text in rule(facts)]
        if found:
            unnamed += [text for text in found if not any(f"{key} = " in text for key in chosen)]
            continue
        accepted[number] += 1
        try:
            engine_config(config, model, platform)
            engine_optimizer_config(config, fp8=config.precision.fp8 is not None)
            engine_ddp_config(config)
        except Exception as error:
            raised.append(f"{chosen}: {type(error).__name__}: {error}")
print(json.dumps({"accepted": accepted, "unnamed": unnamed[:3], "raised": raised[:3]}))
"""


def test_what_the_rules_accept_the_engine_takes(tmp_path: Path) -> None:
    """Over products of option values, with the engine's own checks (in a process of its own: the CPU platform
    changes torch for good)."""
    (tmp_path / "run.yaml").write_text(RUN)
    done = subprocess.run(
        [sys.executable, "-c", PRODUCTS, str(tmp_path / "run.yaml")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["raised"] == result["unnamed"] == []
    assert min(result["accepted"]) >= 2
    print(result["accepted"])


def test_changed_formats_are_told(tmp_path: Path) -> None:
    from dataclasses import asdict

    from megatron_syne.training.optimizer import changed_formats

    (tmp_path / "run.yaml").write_text(RUN)
    plain, bf16 = (
        load_config(str(tmp_path / "run.yaml"), overrides)
        for overrides in ([], [AWARE, "optimizer.exp_avg_dtype=bf16"])
    )
    assert changed_formats(None, plain) == changed_formats(asdict(bf16.optimizer), bf16) == []
    assert changed_formats(None, bf16) == ["optimizer.exp_avg_dtype: fp32 -> bf16, rounded to it"]
    assert changed_formats(asdict(bf16.optimizer), plain) == ["optimizer.exp_avg_dtype: bf16 -> fp32"]
