"""Hugging Face -> shards -> Hugging Face: the same bits, the same logits, the same text, in any layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from roads import to_hf, to_shards
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from megatron_syne.config.schema import ParallelConfig
from megatron_syne.convert.certificate import read_certificate, verify
from megatron_syne.convert.formats.detect import open_weights
from megatron_syne.convert.table import entries
from megatron_syne.convert.weights import WeightSource, open_source
from megatron_syne.errors import ConfigError, DataError
from megatron_syne.models.config import resolve_model

STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, "
    "she saw a big, red ball. She wanted to play with it, but it was too high.\n"
    "Lily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know w"
)


def parallel(tp: int = 1, pp: int = 1, vpp: int | None = None, **more: Any) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        **more,
    )


LAYOUTS = {
    "one": parallel(),
    "tp4": parallel(4),
    "pp4": parallel(1, 4),
    "tp2-pp2": parallel(2, 2),
    "tp2-pp2-vpp2": parallel(2, 2, 2),
    "tp2-pp3-uneven": parallel(
        2, 3, num_layers_in_first_pipeline_stage=1, num_layers_in_last_pipeline_stage=1
    ),
}
STORY_LAYOUTS = {
    "tp2-pp2": parallel(2, 2, num_layers_in_first_pipeline_stage=3),
    "tp4": parallel(4),
    "pp5": parallel(1, 5),
    "tp2-pp2-vpp2": parallel(2, 2, 2, pipeline_model_parallel_layout="Et|t|t|ttL"),
}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder, read by the safetensors library."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8)) for n in a
    )


def logits(folder: Path) -> torch.Tensor:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.arange(3, 100).remainder(model.config.vocab_size)[None]
    with torch.no_grad():
        result: torch.Tensor = model(tokens).logits
    return result


def same_parameters(a: WeightSource, b: WeightSource, tp_size: int) -> bool:
    return all(
        torch.equal(a.parameter(e.megatron, rank, tp_size), b.parameter(e.megatron, rank, tp_size))
        for e in entries(a.model)
        for rank in range(tp_size)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_toy_round_trip(tmp_path: Path, toy_maker: Any, layout: str, tied: bool, dtype: torch.dtype) -> None:
    toy = toy_maker(tmp_path / "toy", dtype, shard="50KB", tie_word_embeddings=tied)
    shards = to_shards(toy, tmp_path / "shards", LAYOUTS[layout], make_vocab_size_divisible_by=8)
    out = to_hf(shards, tmp_path / "hf", max_shard_size="60KB")
    assert same_bits(tensors_of(out), tensors_of(toy))
    assert ("lm_head.weight" in tensors_of(out)) is not tied
    assert torch.equal(logits(out), logits(toy))
    for folder in (tmp_path / "shards", out):
        assert verify(folder).fingerprint == open_source(shards).fingerprint == open_source(out).fingerprint
    assert (out / "LICENSE").read_bytes() == (toy / "LICENSE").read_bytes()
    assert (out / "generation_config.json").read_bytes() == (toy / "generation_config.json").read_bytes()


@pytest.mark.parametrize("layout", STORY_LAYOUTS)
def test_stories_round_trip_and_text(tmp_path: Path, shared_data: Path, layout: str) -> None:
    import sentencepiece

    stories = shared_data / "stories260k"
    shards = to_shards(stories, tmp_path / "shards", STORY_LAYOUTS[layout])
    assert verify(tmp_path / "shards", stories).tensors == 47
    out = to_hf(shards, tmp_path / "hf")
    assert same_bits(tensors_of(out), tensors_of(stories))
    model = LlamaForCausalLM.from_pretrained(out)
    assert model.config.rope_theta == 10000.0
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    bos = torch.tensor([[tokenizer.bos_id()]])
    tokens = model.generate(bos, do_sample=False, max_new_tokens=120)[0].tolist()
    assert tokenizer.decode(tokens).startswith(STORY)


def test_stories_loss_is_the_published_one(tmp_path: Path, shared_data: Path) -> None:
    import sentencepiece

    shards = to_shards(shared_data / "stories260k", tmp_path / "shards", parallel(4))
    out = to_hf(shards, tmp_path / "hf")
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    text = STORY[: STORY.index(" She wanted")]
    tokens = torch.tensor([[tokenizer.bos_id(), *tokenizer.encode(text)]])
    assert tokens.shape[1] == 45
    loss = LlamaForCausalLM.from_pretrained(out)(tokens, labels=tokens).loss.item()
    assert loss == pytest.approx(0.32410, abs=5e-6)


@given(
    old=st.sampled_from(sorted(LAYOUTS)),
    new=st.sampled_from([1, 2, 4]),
    tied=st.booleans(),
    multiple=st.sampled_from([1, 7, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@settings(deadline=None, max_examples=25)
def test_shards_give_any_layouts_parameters(
    tmp_path_factory: pytest.TempPathFactory,
    toy_maker: Any,
    old: str,
    new: int,
    tied: bool,
    multiple: int,
    dtype: torch.dtype,
) -> None:
    """From shards of one layout the local parameters of another: the same as straight from Hugging Face."""
    folder = tmp_path_factory.mktemp("x")
    toy = toy_maker(folder / "toy", dtype, shard="50KB", tie_word_embeddings=tied)
    to_shards(toy, folder / "shards", LAYOUTS[old], make_vocab_size_divisible_by=5)
    shards, hf = open_source(folder / "shards", multiple), open_source(toy, multiple)
    assert shards.model == hf.model
    assert same_parameters(shards, hf, new)
    name = "output_layer.weight"  # of a tied model: the last stage's copy of the embedding
    assert torch.equal(shards.parameter(name, new - 1, new), hf.parameter(name, new - 1, new))


def test_transformer_engine_names_give_the_same(toy: Path) -> None:
    source = open_source(toy)
    for te, local in (
        (
            "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight",
            "decoder.layers.3.input_layernorm.weight",
        ),
        ("decoder.layers.3.mlp.linear_fc1.layer_norm_weight", "decoder.layers.3.pre_mlp_layernorm.weight"),
    ):
        assert torch.equal(source.parameter(te, 1, 2), source.parameter(local, 0, 1))


def test_config_keeps_what_the_source_had(tmp_path: Path, toy: Path) -> None:
    path = toy / "config.json"
    config = json.loads(path.read_text()) | {"pad_token_id": 7, "max_position_embeddings": 999}
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config["rope_scaling"] = scaling | {"original_max_position_embeddings": 8192}
    path.write_text(json.dumps(config))
    source = to_shards(toy, tmp_path / "shards", parallel(2, 2))
    out = to_hf(source, tmp_path / "hf")
    written = json.loads((out / "config.json").read_text())
    assert {key: written[key] for key in config} == config
    assert written["rope_parameters"] == config["rope_scaling"] | {"rope_theta": 500000.0}
    assert torch.equal(logits(out), logits(toy))


def test_dtype_of_the_export(tmp_path: Path, toy: Path) -> None:
    out = to_hf(toy, tmp_path / "hf", dtype="bf16")
    assert same_bits(tensors_of(out), {n: t.bfloat16() for n, t in tensors_of(toy).items()})
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert LlamaForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16


def test_fp16_that_cannot_hold_the_values(tmp_path: Path, toy: Path) -> None:
    path = toy / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.2.mlp.up_proj.weight"][3, 3] = 1e6
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(DataError, match="fp16 cannot hold"):
        to_hf(toy, tmp_path / "hf", dtype="fp16")
    assert [entry.name for entry in tmp_path.iterdir()] == ["toy"]


def test_old_buffers_and_tied_copies_are_known(tmp_path: Path, toy_maker: Any) -> None:
    toy = toy_maker(tmp_path / "toy", tie_word_embeddings=True)
    path = toy / "model.safetensors"
    tensors = load_file(path)
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(3)}
    more["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | more, path)
    assert sorted(open_weights(toy).ignored) == sorted(more)
    source = to_shards(toy, tmp_path / "shards", parallel(2))
    assert sorted(read_certificate(source)["ignored"]) == sorted(more)
    assert same_bits(tensors_of(to_hf(source, tmp_path / "hf")), tensors)
    more["lm_head.weight"][3, 3] += 1
    save_file(tensors | more, path)
    with pytest.raises(DataError, match="tie_word_embeddings"):
        open_source(toy)


def test_weights_of_another_model_are_refused(toy: Path) -> None:
    source = open_source(toy)
    model = resolve_model(source.model)
    model.make_vocab_size_divisible_by = 64
    source.check_model(model)
    assert source.parameter("embedding.word_embeddings.weight", 0, 1).shape[0] == 192
    model.rotary_base = 10000.0
    with pytest.raises(ConfigError, match=r"rotary_base: 10000\.0 against 500000\.0"):
        source.check_model(model)


def test_certificate_says_where_everything_lies(tmp_path: Path, toy: Path) -> None:
    to_shards(toy, tmp_path / "shards", parallel(2, 2))
    certificate = read_certificate(tmp_path / "shards")
    shard = certificate["slices"]["mp_rank_01_000/model.safetensors"]
    assert shard["embedding.word_embeddings.weight"]["pieces"] == [
        "model.embed_tokens.weight[66:131, 0:40] at (0, 0)"
    ]
    assert shard["embedding.word_embeddings.weight"]["padding_rows"] == [65, 66]
    assert shard["decoder.layers.1.self_attention.linear_qkv.weight"]["pieces"][:3] == [
        "model.layers.1.self_attn.q_proj.weight[24:36, 0:40] at (0, 0)",
        "model.layers.1.self_attn.k_proj.weight[12:18, 0:40] at (12, 0)",
        "model.layers.1.self_attn.v_proj.weight[12:18, 0:40] at (18, 0)",
    ]
    assert set(certificate["tensors"]) == set(tensors_of(toy))
