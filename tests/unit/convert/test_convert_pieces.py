"""Pieces against the textbook formulas of fusing and cutting, over many shapes and layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_syne.config.schema import ModelConfig, ParallelConfig
from megatron_syne.convert.families import llama
from megatron_syne.convert.formats.shards import make_layout
from megatron_syne.convert.pieces import Piece, hf_shapes, local_shape, matrix, overlap, pieces
from megatron_syne.convert.table import at_layer, entries, find, hf_tensors
from megatron_syne.errors import ConfigError
from megatron_syne.models.config import padded_vocab_size


def make_model(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "model_type": "llama",
        "num_layers": 2,
        "hidden_size": 8,
        "ffn_hidden_size": 12,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "kv_channels": 2,
        "vocab_size": 11,
        "max_position_embeddings": 16,
        "layernorm_epsilon": 1e-5,
        "rotary_base": 10000.0,
        "share_embeddings_and_output_weights": False,
        "init_method_std": 0.02,
    }
    return ModelConfig(**values | changes)


@st.composite
def models_and_tp(draw: st.DrawFn) -> tuple[ModelConfig, int]:
    """A model and a TP size that suits it."""
    tp = draw(st.sampled_from([1, 2, 3, 4]))
    groups = tp * draw(st.integers(1, 3))
    model = make_model(
        num_layers=draw(st.integers(1, 3)),
        hidden_size=draw(st.integers(1, 9)),
        ffn_hidden_size=tp * draw(st.integers(1, 5)),
        num_query_groups=groups,
        num_attention_heads=groups * draw(st.integers(1, 3)),
        kv_channels=draw(st.integers(1, 4)),
        vocab_size=draw(st.integers(1, 30)),
        make_vocab_size_divisible_by=draw(st.integers(1, 8)),
        share_embeddings_and_output_weights=draw(st.booleans()),
    )
    return model, tp


def numbered(model: ModelConfig) -> dict[str, torch.Tensor]:
    """Every Hugging Face tensor, all elements different from each other."""
    found, start = {}, 1
    for name, shape in hf_tensors(model).items():
        count = torch.Size(shape).numel()
        found[name] = torch.arange(start, start + count).view(shape)
        start += count
    return found


def fill(own: list[Piece], shape: tuple[int, ...], hf: dict[str, torch.Tensor]) -> torch.Tensor:
    out = torch.zeros(matrix(shape), dtype=torch.long)
    for p in own:
        part = hf[p.source].view(matrix(tuple(hf[p.source].shape)))[slice(*p.rows), slice(*p.cols)]
        target = out[p.at[0] : p.at[0] + part.shape[0], p.at[1] : p.at[1] + part.shape[1]]
        assert target.shape == part.shape and not target.any(), "pieces lie inside and do not overlap"
        target.copy_(part)
    return out.view(shape)


def textbook(name: str, model: ModelConfig, hf: dict[str, torch.Tensor], tp: int) -> list[torch.Tensor]:
    """The ranks' parameters, written down independently (recipes: fuse by group, gate over up, pad, chunk)."""
    entry = find(name, model)
    full = [hf[source] for source in entry.hf]
    if name.endswith("linear_qkv.weight"):
        g, d, h = model.num_query_groups, model.kv_channels, model.hidden_size
        n = model.num_attention_heads
        assert g and d and h and n
        q, k, v = full
        fused = torch.cat([q.view(g, n // g * d, h), k.view(g, d, h), v.view(g, d, h)], dim=1)
        return list(fused.reshape(-1, h).chunk(tp))
    if name.endswith("linear_fc1.weight"):
        gate, up = (t.chunk(tp) for t in full)
        return [torch.cat(pair) for pair in zip(gate, up, strict=True)]
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return list(full[0].chunk(tp, dim=1))
    if name.endswith(("word_embeddings.weight", "output_layer.weight")):
        rows = padded_vocab_size(model, tp) - len(full[0])
        return list(torch.cat([full[0], full[0].new_zeros(rows, full[0].shape[1])]).chunk(tp))
    return full * tp


@given(models_and_tp())
@settings(deadline=None, max_examples=60)
def test_pieces_are_the_textbook_formulas(case: tuple[ModelConfig, int]) -> None:
    model, tp = case
    hf = numbered(model)
    for entry in entries(model):
        expected = textbook(entry.megatron, model, hf, tp)
        for rank in range(tp):
            got = fill(pieces(entry, model, rank, tp), local_shape(entry, model, tp), hf)
            assert torch.equal(got, expected[rank]), entry.megatron


@given(models_and_tp())
@settings(deadline=None, max_examples=60)
def test_pieces_tile_each_tensor_once_and_merge_back(case: tuple[ModelConfig, int]) -> None:
    model, tp = case
    hf = numbered(model)
    for entry in entries(model):
        ranks = 1 if "norm" in entry.megatron else tp
        merged = {
            name: torch.zeros(matrix(s), dtype=torch.long) for name, s in hf_shapes(entry, model).items()
        }
        for rank in range(ranks):
            own = pieces(entry, model, rank, tp)
            local = fill(own, local_shape(entry, model, tp), hf)
            local = local.view(matrix(tuple(local.shape)))
            for p in own:
                target = merged[p.source][slice(*p.rows), slice(*p.cols)]
                assert not target.any(), "no element twice"
                height, width = target.shape
                target.copy_(local[p.at[0] : p.at[0] + height, p.at[1] : p.at[1] + width])
        for name, tensor in merged.items():
            assert torch.equal(tensor.view(hf[name].shape), hf[name])


@given(models_and_tp(), models_and_tp())
@settings(deadline=None, max_examples=60)
def test_resharding_by_overlap(case: tuple[ModelConfig, int], other: tuple[ModelConfig, int]) -> None:
    """Parameters of one TP size made from those of another, without the Hugging Face tensors between."""
    (model, old), (_, new) = case, other
    assume(all(x % new == 0 for x in (model.num_query_groups or 0, model.ffn_hidden_size or 0)))
    hf = numbered(model)
    for entry in entries(model):
        stored = []
        for rank in range(1 if "norm" in entry.megatron else old):
            own = pieces(entry, model, rank, old)
            stored.append((own, fill(own, local_shape(entry, model, old), hf)))
        for rank in range(new):
            shape = local_shape(entry, model, new)
            out = torch.zeros(matrix(shape), dtype=torch.long)
            for wanted in pieces(entry, model, rank, new):
                for own, local in stored:
                    for move in filter(None, (overlap(wanted, p) for p in own)):
                        part = local.view(matrix(tuple(local.shape)))[slice(*move.rows), slice(*move.cols)]
                        down, right = move.at
                        out[down : down + part.shape[0], right : right + part.shape[1]] = part
            assert torch.equal(out.view(shape), fill(pieces(entry, model, rank, new), shape, hf))


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_every_parameter_lies_on_exactly_one_stage(pp: int, vpp: int, per_chunk: int, tied: bool) -> None:
    model = make_model(num_layers=pp * vpp * per_chunk, share_embeddings_and_output_weights=tied)
    parallel = ParallelConfig(
        pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None
    )
    layout = make_layout(model, parallel)
    held = [entry.megatron for stage in range(pp) for entry in layout.stage(stage)]
    assert sorted(held) == sorted(entry.megatron for entry in entries(model))
    assert llama.EMBEDDING in layout.stage(0) and llama.FINAL_NORM in layout.stage(pp - 1)


def test_names_of_both_layer_specs() -> None:
    model = make_model()
    for template in llama.LAYER:
        entry = at_layer(template, 1)
        for name in filter(None, (entry.megatron, entry.te)):
            assert find(name, model) == entry
    assert find("output_layer.weight", model) == llama.OUTPUT
    tied = make_model(share_embeddings_and_output_weights=True)
    assert list(find("output_layer.weight", tied).hf) == ["model.embed_tokens.weight"]
    assert "output_layer.weight" not in [entry.megatron for entry in entries(tied)]


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("decoder.layers.2.mlp.linear_fc1.weight", "2 layers"),
        ("decoder.layers.0.mlp.linear_fc3.weight", "nearest: decoder.layers.0.mlp.linear_fc"),
        ("lm_head.weight", "not a parameter"),
    ],
)
def test_unknown_names(name: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        find(name, make_model())


@pytest.mark.parametrize(
    ("changes", "tp", "words"),
    [
        ({"num_attention_heads": 6, "num_query_groups": 2}, 4, ["4", "num_attention_heads 6", "1, 2"]),
        ({"num_attention_heads": 12, "num_query_groups": 3}, 4, ["num_query_groups 3", "1, 3, 6, 12"]),
        ({"ffn_hidden_size": 10}, 4, ["ffn_hidden_size 10", "1, 2"]),
    ],
)
def test_tp_that_does_not_divide(changes: dict[str, Any], tp: int, words: list[str]) -> None:
    model = make_model(**changes)
    with pytest.raises(ConfigError) as caught:
        make_layout(model, ParallelConfig(tensor_model_parallel_size=tp))
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(pipeline_model_parallel_size=3),
        ParallelConfig(tensor_model_parallel_size=0),
        ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    ],
)
def test_layouts_that_cannot_be(parallel: ParallelConfig) -> None:
    with pytest.raises(ConfigError, match="parallel"):
        make_layout(make_model(), parallel)


def test_padding_rule_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="make_vocab_size_divisible_by"):
        make_layout(make_model(make_vocab_size_divisible_by=0), ParallelConfig())
