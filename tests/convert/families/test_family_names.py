"""Of every family that is found: the table names exactly what megatron-core builds, and in the same shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from megatron_syne.config.schema import ModelConfig, ParallelConfig
from megatron_syne.convert.pieces import local_shape
from megatron_syne.convert.table import find, stage_entries, table_of
from megatron_syne.models.config import resolve_model
from megatron_syne.models.family import known
from megatron_syne.parallel.topology import chunk_layers, coordinates, world_size_of
from megatron_syne.preflight.size import stage_parameters

SCRIPT = Path(__file__).with_name("engine_names.py")
LAYOUTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "tp2_pp2_vpp2": {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
    },
    "tp4_above_the_groups": {"tensor_model_parallel_size": 4, "sequence_parallel": True},
}
CASES = [(family, tied, layout) for family in known() for tied in (False, True) for layout in LAYOUTS]


def model_of(family: str, tied: bool) -> ModelConfig:
    return resolve_model(
        ModelConfig(
            model_type=family,
            num_layers=4,
            hidden_size=24,
            ffn_hidden_size=40,
            num_attention_heads=4,
            num_query_groups=2,
            kv_channels=8,
            vocab_size=53,
            make_vocab_size_divisible_by=3,
            max_position_embeddings=64,
            layernorm_epsilon=1e-5,
            rotary_base=10000.0,
            share_embeddings_and_output_weights=tied,
        )
    )


@pytest.fixture(scope="module")
def built(repository: Path) -> dict[tuple[str, bool, str], list[dict[str, list[int]]]]:
    """For each case the names and shapes of every rank, all built by one process."""
    request = [
        {"model": asdict(model_of(family, tied)), "parallel": LAYOUTS[layout]}
        for family, tied, layout in CASES
    ]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(request)],
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answer = next(line for line in done.stdout.splitlines() if line.startswith("ANSWER "))
    return dict(zip(CASES, json.loads(answer.removeprefix("ANSWER ")), strict=True))


@pytest.mark.parametrize(("family", "tied", "layout"), CASES)
def test_the_table_is_what_the_engine_builds(built: Any, family: str, tied: bool, layout: str) -> None:
    model, parallel = model_of(family, tied), ParallelConfig(**LAYOUTS[layout])
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    chunks = chunk_layers(parallel, 4)
    counts = stage_parameters(model, parallel)
    ranks = built[family, tied, layout]
    assert len(ranks) == tp * pp
    for rank, found in enumerate(ranks):
        stage = coordinates(rank, parallel, world_size_of(parallel)).pp
        expected = {
            entry.megatron: list(local_shape(entry, model, tp))
            for entry in stage_entries(model, chunks, stage)
        }
        if tied and stage == pp - 1 > 0:  # the copy of the embedding
            copy = table_of(model).tied_output
            expected[copy.megatron] = list(local_shape(copy, model, tp))
        assert found == expected, f"rank {rank}"
        assert all(find(name, model).megatron == name for name in found)
        sizes = [shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in found.values()]
        assert counts[stage] == sum(sizes), f"rank {rank}"
