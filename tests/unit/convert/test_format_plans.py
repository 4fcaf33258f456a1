"""Plans of Hugging Face folders and shards over all shapes and layouts: every element has its place, once for
each copy, no two share a byte; and what is written so reads back the same."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from format_toys import CONFIG, ToyWeights, same, toy_model, write
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_syne.config.schema import ModelConfig, ParallelConfig
from megatron_syne.convert.formats.hf import open_hf, plan_hf
from megatron_syne.convert.formats.shards import make_layout, open_shards, plan_shards
from megatron_syne.convert.numbers import ITEM_BYTES
from megatron_syne.convert.pieces import Kind, check_tensor_parallel, local_shape, matrix
from megatron_syne.convert.streams import Target, Weights
from megatron_syne.convert.table import entries
from megatron_syne.errors import ConfigError
from megatron_syne.models.family import family_of, known

DTYPES = sorted(ITEM_BYTES)


@st.composite
def models(draw: Any) -> ModelConfig:
    """Any family in any small shape."""
    groups = draw(st.sampled_from([1, 2, 3, 4]))
    heads = groups * draw(st.sampled_from([1, 2, 3, 4, 8]))
    family = draw(st.sampled_from(sorted(known())))
    return dataclasses.replace(
        toy_model(),
        model_type=family,
        num_layers=draw(st.integers(1, 6)),
        hidden_size=draw(st.integers(1, 9)),
        ffn_hidden_size=draw(st.sampled_from([1, 6, 16, 24])),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=draw(st.sampled_from([2, 4, 6])),
        vocab_size=draw(st.integers(1, 40)),
        share_embeddings_and_output_weights=draw(st.booleans()),
        **family_of(family).constants,
    )


@st.composite
def layouts(draw: Any, model: ModelConfig) -> ParallelConfig:
    """A layout that suits the model: every kind of pipeline."""
    possible = []
    for size in range(1, 17):
        try:
            check_tensor_parallel(model, size)
            possible.append(size)
        except ConfigError:
            pass
    parallel = ParallelConfig(tensor_model_parallel_size=draw(st.sampled_from(possible)))
    stages = draw(st.integers(1, 4))
    parallel.pipeline_model_parallel_size = stages
    kind, layers = draw(st.sampled_from(["even", "uneven", "explicit"])), model.num_layers or 0
    if kind == "explicit":
        chunks = draw(st.sampled_from([None, 2, 3])) if stages > 1 else None
        cuts = draw(st.lists(st.integers(0, layers), min_size=(count := stages * (chunks or 1)) - 1))
        cuts = [0, *sorted(cuts)[: count - 1], layers]
        parts = ["t" * (b - a) for a, b in itertools.pairwise(cuts)]
        parallel.virtual_pipeline_model_parallel_size = chunks
        parallel.pipeline_model_parallel_layout = "E" + "|".join(parts) + "L"
    elif kind == "uneven" and stages > 1 and layers >= stages:
        parallel.num_layers_in_first_pipeline_stage = draw(st.integers(1, layers - stages + 1))
        parallel.num_layers_in_last_pipeline_stage = draw(st.integers(1, layers - stages + 1))
    elif draw(st.booleans()):
        parallel.virtual_pipeline_model_parallel_size = 2
    try:
        make_layout(model, parallel)
    except ConfigError:  # the layers do not divide so
        return ParallelConfig(tensor_model_parallel_size=parallel.tensor_model_parallel_size)
    return parallel


def check_target(weights: Weights, target: Target) -> dict[str, set[int]]:
    """The rules that every target keeps; how often each tensor is there."""
    files = {file.path: file for file in target.files}
    assert len(files) == len(target.files)
    taken = {path: np.zeros(file.size, np.int8) for path, file in files.items()}
    for path, file in files.items():
        for at, content in file.fixed:
            taken[path][at : at + len(content)] += 1
            assert at + len(content) <= file.size
    copies = {}
    for name, shape in weights.shapes.items():
        count = np.zeros(matrix(shape), np.int32)
        for place in target.places[name]:
            piece = place.piece
            assert piece.source == name
            count[slice(*piece.rows), slice(*piece.cols)] += 1
            start, stride = place.rows_at(piece.rows)
            width = (piece.cols[1] - piece.cols[0]) * ITEM_BYTES[place.dtype]
            assert start + (piece.rows[1] - piece.rows[0] - 1) * stride + width <= files[place.file].size
            for row in range(piece.rows[1] - piece.rows[0]):
                taken[place.file][start + row * stride : start + row * stride + width] += 1
        copies[name] = set(count.reshape(-1).tolist())
    assert all(bytes_.max(initial=0) <= 1 for bytes_ in taken.values()), "two things in one place"
    return copies


@given(st.data(), models(), st.sampled_from(DTYPES), st.sampled_from([1, 3, 8]))
@settings(deadline=None, max_examples=150)
def test_shards_hold_everything_and_read_back_the_same(
    tmp_path_factory: pytest.TempPathFactory, data: Any, model: ModelConfig, dtype: str, multiple: int
) -> None:
    weights, parallel = ToyWeights(model, dtype), data.draw(layouts(model))
    target = plan_shards(weights, parallel, make_vocab_size_divisible_by=multiple)
    tp_size = parallel.tensor_model_parallel_size
    kinds = {name: entry.kind for entry in entries(model) for name in entry.hf}
    for name, times in check_target(weights, target).items():
        assert times == {tp_size if kinds[name] is Kind.DIRECT else 1}, name
    folder = tmp_path_factory.mktemp("x")
    stored = open_shards(write(weights, target, folder / "a"))
    assert stored.layout.describe() == target.layout
    assert same(weights, stored)
    assert sum(map(len, stored.replicas.values())) + sum(map(len, stored.places.values())) == sum(
        map(len, target.places.values())
    )
    again = plan_shards(stored, data.draw(layouts(model)))
    check_target(stored, again)
    resharded = open_shards(write(stored, again, folder / "b"))
    assert same(weights, resharded)
    back = plan_hf(resharded, max_shard_size=data.draw(st.sampled_from([100, 2000, "5GB"])))
    assert set().union(*check_target(resharded, back).values()) == {1}
    assert same(weights, open_hf(write(resharded, back, folder / "c")))


def test_bytes_that_no_place_covers_are_padding(tmp_path: Path) -> None:
    """What is left free is exactly the header and the rows above the vocabulary."""
    weights = ToyWeights(toy_model(), "F32")
    target = plan_shards(weights, ParallelConfig(tensor_model_parallel_size=2))
    covered = {file.path: len(file.fixed[0][1]) for file in target.files}
    for places in target.places.values():
        for place in places:
            (top, bottom), (left, right) = place.piece.rows, place.piece.cols
            covered[place.file] += (bottom - top) * (right - left) * 4
    free = {file.path: file.size - covered[file.path] for file in target.files}
    assert free == {"mp_rank_00_000/model.safetensors": 0, "mp_rank_01_000/model.safetensors": 2 * 16 * 4}


def test_a_zero_centred_norm_is_kept_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored less 1 and wider, read back the same, in bf16 as before."""
    from megatron_syne.convert.families import llama

    norm = dataclasses.replace(llama.FINAL_NORM, shift=-1.0)
    monkeypatch.setattr(llama, "TABLE", dataclasses.replace(llama.TABLE, final_norm=(norm,)))
    weights = ToyWeights(toy_model(), "BF16")
    target = plan_shards(weights, ParallelConfig(pipeline_model_parallel_size=2))
    (place,) = target.places["model.norm.weight"]
    assert (place.dtype, place.shift, target.dtypes["model.norm.weight"]) == ("F32", -1.0, "BF16")
    folder = write(weights, target, tmp_path / "x")
    raw = (folder / place.file).read_bytes()
    values = np.frombuffer(raw[place.offset : place.offset + 16 * 4], np.float32)
    assert 0.01 < np.abs(values).max() < 0.5, "around 0, not around 1"
    assert same(weights, open_shards(folder))


def test_64_ranks_for_8_key_value_heads() -> None:
    model = toy_model(
        num_attention_heads=64, num_key_value_heads=8, head_dim=8, intermediate_size=64, num_hidden_layers=1
    )
    weights = ToyWeights(model)
    target = plan_shards(weights, ParallelConfig(tensor_model_parallel_size=64))
    copies = check_target(weights, target)
    assert len(target.files) == 64
    assert copies["model.layers.0.self_attn.k_proj.weight"] == {1}
    assert copies["model.norm.weight"] == {64}


def test_every_shard_is_what_the_layer_expects() -> None:
    """Names and shapes in a rank's file: the ones of the table for its stage, layers numbered over the model."""
    from megatron_syne.convert.formats.safetensors import TensorSpec, build_header

    model = toy_model()
    layout = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    layout.virtual_pipeline_model_parallel_size = 2
    target = plan_shards(ToyWeights(model), layout, make_vocab_size_divisible_by=8)
    own = [entry for entry in entries(model, [1, 3]) if "embedding" not in entry.megatron]
    specs = [TensorSpec(entry.megatron, "BF16", local_shape(entry, toy_model(), 2)) for entry in own]
    specs[-1] = TensorSpec("output_layer.weight", "BF16", (16, 16))  # 31 padded to 32, half of it
    header, _, size = build_header(specs, {"format": "pt", "tp_rank": "1", "pp_rank": "1"})
    (file,) = [file for file in target.files if file.path == "mp_rank_01_001/model.safetensors"]
    assert file.fixed == [(0, header)] and file.size == size
    assert CONFIG["vocab_size"] == 31
