"""The CUDA platform's model without a GPU: Transformer Engine's parameter names, shapes and layouts.

Needs Transformer Engine's Python files (``make probes`` puts them beside the environment, 0.7 MB).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_syne.config.schema import ModelConfig, ParallelConfig
from megatron_syne.convert.pieces import local_shape
from megatron_syne.convert.table import find, stage_entries, table_of
from megatron_syne.models.config import resolve_model
from megatron_syne.models.family import known
from megatron_syne.parallel.topology import chunk_layers, coordinates, world_size_of

STUB = Path(__file__).with_name("te_stub.py")
MODEL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "kv_channels": 8,
    "vocab_size": 512,
    "layernorm_epsilon": 1e-5,
    "rotary_base": 500000.0,
    "max_position_embeddings": 64,
    "init_method_std": 0.02,
    "model_type": "llama",
    "share_embeddings_and_output_weights": False,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2-uneven": {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 3},
    "tp2-pp2-vpp2": {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "sequence_parallel": True,
    },
}
CASES: dict[str, dict[str, Any]] = {
    **{name: {"model": MODEL, "parallel": layout} for name, layout in LAYOUTS.items()},
    "tied-pp2": {
        "model": MODEL | {"share_embeddings_and_output_weights": True},
        "parallel": {"pipeline_model_parallel_size": 2},
    },
    **{
        f"{family}-tp4": {
            "model": MODEL | {"model_type": family},  # more ranks than key/value heads
            "parallel": {"tensor_model_parallel_size": 4, "sequence_parallel": True},
        }
        for family in known()
    },
    "fp8-delayed": {"model": MODEL, "precision": {"fp8": "delayed"}},
    "fp8-tensorwise": {"model": MODEL, "precision": {"fp8": "tensorwise", "first_last_layers_bf16": True}},
    "fp8-blockwise": {"model": MODEL, "precision": {"fp8": "blockwise", "first_last_layers_bf16": True}},
}
# What one layer holds, whole; and the axis that tensor parallelism cuts.
LAYER: dict[str, tuple[list[int], int | None]] = {
    "self_attention.linear_proj.weight": ([64, 64], 1),
    "self_attention.linear_qkv.layer_norm_weight": ([64], None),
    "self_attention.linear_qkv.weight": ([96, 64], 0),
    "mlp.linear_fc1.layer_norm_weight": ([64], None),
    "mlp.linear_fc1.weight": ([256, 64], 0),
    "mlp.linear_fc2.weight": ([64, 128], 1),
}
EMBEDDING = {"embedding.word_embeddings.weight": ([512, 64], 0)}
HEAD: dict[str, tuple[list[int], int | None]] = {
    "decoder.final_layernorm.weight": ([64], None),
    "output_layer.weight": ([512, 64], 0),
}


def te_folder() -> Path:
    """Where the Python files of Transformer Engine lie; skips where they do not."""
    folder = Path(os.environ.get("MEGATRON_SYNE_TE_NAMES") or Path(sys.prefix) / "te_names")
    if not (folder / "transformer_engine").is_dir():
        pytest.skip(f"Transformer Engine's Python files are absent from {folder}: run `make probes`")
    return folder


@pytest.fixture(scope="module")
def built(repository: Path) -> dict[str, list[dict[str, list[int]]]]:
    """``{case: [{parameter: shape} of rank 0, rank 1, ...]}``, all built by one process."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("NVTE_")}
    env["PYTHONPATH"] = os.pathsep.join([str(te_folder()), str(repository)])
    env["TORCH_COMPILE_DISABLE"] = "1"
    done = subprocess.run(
        [sys.executable, str(STUB)],
        input=json.dumps(list(CASES.values())),
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answer = json.loads(done.stdout)
    assert answer["transformer_engine"].startswith("2.11.")
    return dict(zip(CASES, answer["cases"], strict=True))


def expected(case: str, rank: int) -> dict[str, list[int]]:
    """Names and shapes of one rank, from the tables above and our own topology."""
    parallel = ParallelConfig(**CASES[case].get("parallel", {}))
    tp, at = parallel.tensor_model_parallel_size, coordinates(rank, parallel, world_size_of(parallel))
    tied = CASES[case]["model"]["share_embeddings_and_output_weights"]
    first, last = at.pp == 0, at.pp == parallel.pipeline_model_parallel_size - 1
    whole: dict[str, tuple[list[int], int | None]] = {}
    if first:
        whole |= EMBEDDING
    for chunk in chunk_layers(parallel, MODEL["num_layers"])[at.pp]:
        for layer in chunk:
            whole |= {f"decoder.layers.{layer}.{name}": value for name, value in LAYER.items()}
    if last:
        whole |= HEAD
        if tied and first:
            del whole["output_layer.weight"]  # the embedding itself; on another stage a copy of it
    return {
        name: [size // tp if axis == cut else size for axis, size in enumerate(shape)]
        for name, (shape, cut) in whole.items()
    }


# Other families are compared with their tables below.
@pytest.mark.parametrize("case", [name for name in CASES if CASES[name]["model"]["model_type"] == "llama"])
def test_names_and_shapes_of_every_rank(built: dict[str, Any], case: str) -> None:
    ranks = built[case]
    assert len(ranks) == world_size_of(ParallelConfig(**CASES[case].get("parallel", {})))
    for rank, shapes in enumerate(ranks):
        assert shapes == expected(case, rank), f"rank {rank}"


@pytest.mark.parametrize("case", CASES)
def test_conversion_table_has_these_names(built: dict[str, Any], case: str) -> None:
    """Each parameter is found under its name and wanted in this shape; the table has no other for the stage."""
    model = resolve_model(ModelConfig(**CASES[case]["model"]))
    parallel = ParallelConfig(**CASES[case].get("parallel", {}))
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    chunks = chunk_layers(parallel, MODEL["num_layers"])
    for rank, shapes in enumerate(built[case]):
        stage = coordinates(rank, parallel, world_size_of(parallel)).pp
        for name, shape in shapes.items():
            assert local_shape(find(name, model), model, tp) == tuple(shape), name
        table = {entry.te or entry.megatron for entry in stage_entries(model, chunks, stage)}
        if model.share_embeddings_and_output_weights and stage == pp - 1 > 0:
            table.add("output_layer.weight")  # the copy of the embedding, filled from the same tensor
            assert find("output_layer.weight", model) == table_of(model).tied_output
        assert table == set(shapes), f"rank {rank}"
