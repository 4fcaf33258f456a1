"""The rank grid and the layers of each stage: by hand, and as megatron-core itself lays them out."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_syne.config.schema import ModelConfig, ParallelConfig
from megatron_syne.errors import ConfigError
from megatron_syne.parallel.topology import (
    Coordinates,
    chunk_layers,
    coordinates,
    data_parallel_size,
    expand_layout,
    model_parallel_size,
    rank_grid,
    world_size_of,
)
from megatron_syne.preflight.size import model_parameters, stage_parameters


def layout(tp: int = 1, pp: int = 1, vpp: int | None = None, **more: object) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        **more,  # type: ignore[arg-type]
    )


def tiny(layers: int, tied: bool = False) -> ModelConfig:
    return ModelConfig(
        model_type="llama",
        num_layers=layers,
        hidden_size=16,
        ffn_hidden_size=24,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=6,  # heads x size differs from hidden_size
        vocab_size=33,  # is padded
        make_vocab_size_divisible_by=4,
        max_position_embeddings=64,
        layernorm_epsilon=1e-5,
        rotary_base=10000.0,
        share_embeddings_and_output_weights=tied,
        init_method_std=0.02,
    )


# world size, layout, layers, tied embeddings
CASES = [
    (1, layout(), 3, False),
    (1, layout(), 3, True),
    (8, layout(tp=2, pp=2), 4, False),
    (4, layout(tp=2, pp=2), 4, True),
    (
        2,
        layout(pp=2, num_layers_in_first_pipeline_stage=3, num_layers_in_last_pipeline_stage=2),
        5,
        True,
    ),
    (3, layout(pp=3, num_layers_in_first_pipeline_stage=1), 5, False),
    (4, layout(tp=2, pp=2, vpp=2), 8, False),
    (2, layout(pp=2, pipeline_model_parallel_layout="Ett|tL"), 3, False),
    (2, layout(pp=2, vpp=2, pipeline_model_parallel_layout="Et|tt|t|L"), 4, False),
]


def test_megatron_core_lays_out_ranks_layers_and_parameters_alike(repository: Path) -> None:
    cases = [
        {"world_size": world, "parallel": dataclasses.asdict(p), "model": dataclasses.asdict(tiny(n, tied))}
        for world, p, n, tied in CASES
    ]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("engine_layouts.py")), json.dumps(cases)],
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "PYTHONPATH": str(repository),
            "TORCH_COMPILE_DISABLE": "1",
            "OMP_NUM_THREADS": "1",
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    for (world, parallel, layers, tied), ranks in zip(CASES, json.loads(line[7:]), strict=True):
        chunks = chunk_layers(parallel, layers)
        counts = stage_parameters(tiny(layers, tied), parallel)
        for rank, engine in enumerate(ranks):
            ours = coordinates(rank, parallel, world)
            where = f"rank {rank} of {world}, {parallel}"
            assert dataclasses.astuple(ours) == tuple(engine["coordinates"]), where
            assert chunks[ours.pp] == engine["layers"], where
            assert counts[ours.pp] == engine["parameters"], where


@pytest.mark.parametrize("tied", [False, True])
def test_model_parameters_match_transformers(tied: bool) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = tiny(3, tied)
    config = transformers.LlamaConfig(
        num_hidden_layers=3,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        vocab_size=33,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(config)
    theirs.tie_weights()
    assert model_parameters(model) == sum(p.numel() for p in theirs.parameters())


@given(
    tp=st.integers(1, 4),
    pp=st.integers(1, 4),
    cp=st.integers(1, 2),
    dp=st.integers(1, 4),
)
@settings(deadline=None)
def test_every_rank_has_its_own_place(tp: int, pp: int, cp: int, dp: int) -> None:
    parallel = layout(tp=tp, pp=pp, context_parallel_size=cp, data_parallel_size=dp)
    world = world_size_of(parallel)
    assert world == model_parallel_size(parallel) * dp
    assert data_parallel_size(parallel, world) == dp
    places = [coordinates(rank, parallel, world) for rank in range(world)]
    assert len(set(places)) == world
    assert places[0] == Coordinates(0, 0, 0, 0)
    assert places[-1] == Coordinates(tp - 1, cp - 1, dp - 1, pp - 1)
    # tp varies fastest, pp slowest
    assert places == sorted(places, key=lambda at: (at.pp, at.dp, at.cp, at.tp))


@given(pp=st.integers(1, 5), vpp=st.integers(1, 3), each=st.integers(1, 3))
@settings(deadline=None)
def test_every_layer_lies_in_one_chunk(pp: int, vpp: int, each: int) -> None:
    layers = pp * vpp * each
    chunks = chunk_layers(layout(pp=pp, vpp=vpp if vpp > 1 else None), layers)
    assert [len(stage) for stage in chunks] == [vpp] * pp
    in_model_order = [layer for vp in range(vpp) for stage in chunks for layer in stage[vp]]
    assert in_model_order == list(range(layers))


def test_uneven_stages_and_explicit_layout() -> None:
    assert chunk_layers(
        layout(pp=2, num_layers_in_first_pipeline_stage=3, num_layers_in_last_pipeline_stage=2), 5
    ) == [[[0, 1, 2]], [[3, 4]]]
    assert chunk_layers(layout(pp=2, vpp=2, pipeline_model_parallel_layout="E|tt|t|tL"), 4) == [
        [[], [2]],
        [[0, 1], [3]],
    ]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Et|t|tL", ["Et", "t", "tL"]),
        ("Et*3|tL", ["Ettt", "tL"]),
        ("E|(t|)*2L", ["E", "t", "t", "L"]),
        ("E|((t,t)*2|)*2,L", ["E", "tttt", "tttt", "L"]),
    ],
)
def test_layout_strings_are_expanded(text: str, parts: list[str]) -> None:
    assert expand_layout(text) == parts


@pytest.mark.parametrize(
    ("parallel", "layers", "parts"),
    [
        (layout(pp=4), 3, ("4 stages for 3 layers", "at most 3")),
        (layout(pp=2), 5, ("5 layers do not divide evenly over 2 stages",)),
        (layout(pp=2, vpp=3), 8, ("stage 0 has 4 layers, which 3 chunks do not divide",)),
        (layout(pp=2, num_layers_in_first_pipeline_stage=6), 5, ("first stage 6",)),
        (layout(pp=2, pipeline_model_parallel_layout="Et|t|tL"), 3, ("3 parts, not a multiple of 2",)),
        (layout(pp=2, pipeline_model_parallel_layout="Et|t|t|tL"), 4, ("2 stages x 2 chunks", "set it to 2")),
        (layout(pp=2, pipeline_model_parallel_layout="Et|tL"), 4, ("hold 4 layers t; found 2",)),
        (layout(pp=2, pipeline_model_parallel_layout="t|tL"), 2, ("must start with E",)),
        (layout(pp=2, pipeline_model_parallel_layout="Etx|tL"), 2, ("must start with E",)),
    ],
)
def test_layouts_that_cannot_be_are_refused(
    parallel: ParallelConfig, layers: int, parts: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        chunk_layers(parallel, layers)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("parallel", "world", "part"),
    [
        (
            layout(tp=2, pp=2),
            6,
            "world size 6 is not a multiple of tensor 2 x pipeline 2 x context 1 = 4; start 4 or 8",
        ),
        (layout(tp=4), 2, "start 4 processes"),
        (layout(tp=2, data_parallel_size=3), 4, "data 3 = 6; start 6 processes"),
    ],
)
def test_world_sizes_that_do_not_fit_are_refused(parallel: ParallelConfig, world: int, part: str) -> None:
    with pytest.raises(ConfigError, match="world size") as caught:
        data_parallel_size(parallel, world)
    assert part in str(caught.value)


def test_rank_grid_shows_every_rank_and_what_it_holds() -> None:
    lines = rank_grid(layout(tp=2, pp=2, vpp=2), 4, 8).splitlines()
    assert lines[0].split() == ["rank", "tp", "cp", "dp", "pp", "holds"]
    assert [line.split()[:5] for line in lines[1:]] == [
        [str(n), str(n % 2), "0", str(n // 2 % 2), str(n // 4)] for n in range(8)
    ]
    assert lines[1].endswith("embedding, layers 0-0 | layers 2-2")
    assert lines[8].endswith("layers 1-1 | layers 3-3, output")


@pytest.mark.parametrize("text", ["(t|)*99999999999", "((((t*9999)*9999)*9999)*9999)*9999", "t*100001"])
def test_a_hostile_layout_does_not_use_up_memory(text: str) -> None:
    with pytest.raises(ConfigError, match="pipeline_model_parallel_layout"):
        expand_layout(text)


def test_layout_notation_expands() -> None:
    assert expand_layout("Et*2|(tt|)*2tL") == ["Ett", "tt", "tt", "tL"]
