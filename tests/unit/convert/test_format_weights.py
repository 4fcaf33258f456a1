"""Weights for training: the parameters of any rank as torch tensors, the same out of every format."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from format_toys import ToyWeights, toy_model, write
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_syne.config.schema import ParallelConfig
from megatron_syne.convert.artifacts import collect_artifacts
from megatron_syne.convert.formats.hf import open_hf, plan_hf
from megatron_syne.convert.formats.shards import open_shards, plan_shards
from megatron_syne.convert.table import entries
from megatron_syne.convert.weights import open_source
from megatron_syne.errors import ConfigError, DataError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
LAYOUTS = {
    "tp1": ParallelConfig(),
    "tp2 pp2": ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
    "tp4: more than key/value heads": ParallelConfig(tensor_model_parallel_size=4),
    "pp2 vpp2": ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    "uneven": ParallelConfig(pipeline_model_parallel_size=2, num_layers_in_first_pipeline_stage=1),
}


def saved(folder: Path, **options: Any) -> Path:
    """The toy as a Hugging Face folder."""
    dtype, config = options.pop("dtype", "BF16"), options.pop("config", {})
    weights = ToyWeights(toy_model(**config), dtype, **options)
    return write(weights, plan_hf(weights), folder)


def expected(folder: Path, name: str, tp_rank: int, tp_size: int, multiple: int) -> torch.Tensor:
    """A parameter made the long way: fused whole as Megatron-Bridge does it, then cut."""
    from safetensors.torch import load_file

    model, tensors = toy_model(), load_file(folder / "model.safetensors")
    groups, heads, size = model.num_query_groups, model.num_attention_heads, model.kv_channels
    assert groups and heads and size
    layer = f"model.layers.{name.split('.')[2]}." if "layers" in name else ""
    if "linear_qkv" in name:
        q, k, v = (tensors[f"{layer}self_attn.{x}_proj.weight"] for x in "qkv")
        fused = [part.view(groups, -1, size, 16) for part in (q, k, v)]
        return torch.cat(fused, 1).reshape(-1, 16).chunk(tp_size)[tp_rank]
    if "linear_fc1" in name:
        gate, up = (tensors[f"{layer}mlp.{x}_proj.weight"].chunk(tp_size)[tp_rank] for x in ("gate", "up"))
        return torch.cat([gate, up])
    if "linear_proj" in name:
        return tensors[f"{layer}self_attn.o_proj.weight"].chunk(tp_size, 1)[tp_rank]
    if "linear_fc2" in name:
        return tensors[f"{layer}mlp.down_proj.weight"].chunk(tp_size, 1)[tp_rank]
    if "norm" in name:
        end = {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}
        return tensors[f"{layer}{end[name.split('.')[3]]}.weight" if layer else "model.norm.weight"]
    full = tensors["lm_head.weight" if "output" in name else "model.embed_tokens.weight"]
    rows = -(-len(full) // (multiple * tp_size)) * multiple * tp_size
    return torch.cat([full, full.new_zeros(rows - len(full), 16)]).chunk(tp_size)[tp_rank]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_of_every_rank(tmp_path: Path, layout: str, dtype: str) -> None:
    """Out of a Hugging Face folder and out of shards of another layout: what Megatron's rank wants."""
    folder = saved(tmp_path / "hf", dtype=dtype)
    weights = open_hf(folder)
    shards = write(weights, plan_shards(weights, LAYOUTS[layout]), tmp_path / "shards")
    for source in (open_source(folder, 8), open_source(shards, 8)):
        for tp_size in (1, 2, 4):
            for entry in entries(source.model):
                for tp_rank in range(tp_size):
                    found = source.parameter(entry.megatron, tp_rank, tp_size)
                    assert found.dtype is DTYPES[dtype]
                    assert torch.equal(found, expected(folder, entry.megatron, tp_rank, tp_size, 8)), entry
        source.close()


def test_padding_rule_of_the_source(tmp_path: Path) -> None:
    folder = saved(tmp_path / "hf")
    weights = open_hf(folder)
    target = plan_shards(weights, ParallelConfig(), make_vocab_size_divisible_by=64)
    write(weights, target, tmp_path / "shards")
    name = "output_layer.weight"
    assert len(open_source(tmp_path / "shards").parameter(name, 0, 2)) == 64
    assert len(open_source(folder).parameter(name, 0, 2)) == 16
    source = open_source(folder)
    source.check_model(toy_model())
    assert len(source.parameter(name, 1, 2)) == 16
    source.check_model(dataclasses.replace(toy_model(), make_vocab_size_divisible_by=50))
    last = source.parameter(name, 3, 4)
    assert len(last) == 50 and not last.any()
    with pytest.raises(ConfigError, match=r"num_layers: 5 against 4.*hf_path"):
        source.check_model(toy_model(num_hidden_layers=5))


def test_names(tmp_path: Path) -> None:
    """Transformer Engine's names too; the output layer of a tied model is the embedding."""
    source = open_source(saved(tmp_path / "hf", config={"tie_word_embeddings": True}))
    te, local = "self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"
    assert torch.equal(
        source.parameter(f"decoder.layers.3.{te}", 1, 2), source.parameter(f"decoder.layers.3.{local}", 0, 1)
    )
    assert torch.equal(
        source.parameter("output_layer.weight", 1, 2),
        source.parameter("embedding.word_embeddings.weight", 1, 2),
    )
    assert torch.equal(
        source.tensor("model.embed_tokens.weight"), source.parameter("output_layer.weight", 0, 1)[:31]
    )
    with pytest.raises(ConfigError, match="layers, numbered from 0"):
        source.parameter("decoder.layers.4.input_layernorm.weight", 0, 1)


def test_formats_that_differ_within_a_parameter(tmp_path: Path) -> None:
    source = open_source(saved(tmp_path / "hf", **{"model.layers.0.self_attn.k_proj.weight": "F32"}))
    with pytest.raises(DataError, match=r"k_proj\.weight F32"):
        source.parameter("decoder.layers.0.self_attention.linear_qkv.weight", 0, 1)


def test_zero_centred_norms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's value, in fp32: Hugging Face's less 1. What training stored in fp32 comes back bit for bit."""
    from megatron_syne.convert.families import llama

    norm = dataclasses.replace(llama.FINAL_NORM, shift=-1.0)
    monkeypatch.setattr(llama, "TABLE", dataclasses.replace(llama.TABLE, final_norm=(norm,)))
    folder = saved(tmp_path / "hf")
    value = open_source(folder).tensor("model.norm.weight")
    name = "decoder.final_layernorm.weight"
    assert torch.equal(open_source(folder).parameter(name, 0, 1), value.float() - 1)
    weights = open_hf(folder)
    shards = write(weights, plan_shards(weights, ParallelConfig()), tmp_path / "shards")
    assert torch.equal(open_source(shards).parameter(name, 0, 1), value.float() - 1)
    (place,) = open_shards(shards).places["model.norm.weight"]
    trained = torch.full((16,), 1.2345678e-9)  # lost if 1 were added and taken away again
    raw = bytearray((shards / place.file).read_bytes())
    raw[place.offset : place.offset + 64] = trained.numpy().tobytes()
    (shards / place.file).write_bytes(raw)
    assert torch.equal(open_source(shards).parameter(name, 0, 1), trained)


@given(st.sampled_from(sorted(LAYOUTS)), st.integers(1, 70), st.sampled_from([1, 2, 4]), st.booleans())
@settings(deadline=None, max_examples=20)
def test_split_then_merge_is_the_identity(
    tmp_path_factory: pytest.TempPathFactory, layout: str, multiple: int, tp_size: int, tied: bool
) -> None:
    """All ranks' parameters put together as megatron-core's layers would: the whole ones."""
    folder = tmp_path_factory.mktemp("x")
    weights = ToyWeights(toy_model(tie_word_embeddings=tied))
    target = plan_shards(weights, LAYOUTS[layout], make_vocab_size_divisible_by=multiple)
    source = open_source(write(weights, target, folder / "shards"))
    for entry in entries(source.model):
        whole = source.parameter(entry.megatron, 0, 1)
        parts = [source.parameter(entry.megatron, rank, tp_size) for rank in range(tp_size)]
        if "norm" in entry.megatron:
            assert all(torch.equal(part, whole) for part in parts)
        elif "linear_fc1" in entry.megatron:
            halves = [part.chunk(2) for part in parts]
            assert torch.equal(torch.cat([*(a for a, _ in halves), *(b for _, b in halves)]), whole)
        else:
            columns = "linear_proj" in entry.megatron or "linear_fc2" in entry.megatron
            merged = torch.cat(parts, 1 if columns else 0)
            rows = 31 if "embedding" in entry.megatron or "output" in entry.megatron else len(whole)
            assert torch.equal(merged[:rows], whole[:rows])
            assert not merged[rows:].any() and not whole[rows:].any(), "padding"


def test_fingerprints_tell_weights_apart(tmp_path: Path) -> None:
    folder = saved(tmp_path / "hf")
    first = open_source(folder).fingerprint
    assert first.startswith("samples:") and open_source(folder).fingerprint == first
    raw = bytearray((folder / "model.safetensors").read_bytes())
    place = open_hf(folder).places["model.norm.weight"][0]
    raw[place.offset] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    assert open_source(folder).fingerprint != first


def test_fingerprints_are_the_same_for_all_that_was_made_from_one_source(tmp_path: Path) -> None:
    from megatron_syne.convert.engine import convert

    weights = open_hf(saved(tmp_path / "hf"))
    convert(weights, plan_shards(weights, LAYOUTS["tp2 pp2"]), tmp_path / "shards")
    convert(weights, plan_shards(weights, LAYOUTS["uneven"], dtype="F32"), tmp_path / "wide")
    shards = open_source(tmp_path / "shards")
    convert(shards.stored, plan_hf(shards.stored), tmp_path / "back")
    assert shards.fingerprint.startswith("blake3:")
    assert open_source(tmp_path / "back").fingerprint == shards.fingerprint
    assert open_source(tmp_path / "wide").fingerprint != shards.fingerprint


def test_artifacts_of_a_run(tmp_path: Path) -> None:
    """The configuration of where it starts; its own tokenizer before that of the weights."""
    folder = saved(tmp_path / "hf", config={"rope_theta": 5.0})
    for name in ("LICENSE", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    weights = open_hf(folder)
    shards = write(weights, plan_shards(weights, ParallelConfig()), tmp_path / "shards")
    own = tmp_path / "own"
    own.mkdir()
    (own / "tokenizer.model").write_text("own")
    for start in (folder, shards):
        out = tmp_path / f"run from {start.name}" / "hf"
        collect_artifacts(out, weights.model, "fp32", str(start), str(own))
        assert sorted(os.listdir(out)) == [
            "LICENSE",
            "config.json",
            "tokenizer.model",
            "tokenizer_config.json",
        ]
        assert '"rope_theta": 5.0' in (out / "config.json").read_text()
        collect_artifacts(out, weights.model, "fp32", None, None)
        assert (out / "LICENSE").exists(), "once made it stays"
    collect_artifacts(tmp_path / "bare", weights.model, "bf16", None, None)
    assert os.listdir(tmp_path / "bare") == ["config.json"]


def test_no_torch_before_training(tmp_path: Path) -> None:
    """Opening and planning take no second for torch, nor the safetensors library or transformers."""
    folder = saved(tmp_path / "hf")
    code = f"""
import sys
from megatron_syne.config.schema import ParallelConfig
from megatron_syne.convert.formats.detect import open_weights
from megatron_syne.convert.formats.hf import plan_hf
from megatron_syne.convert.formats.shards import plan_shards
weights = open_weights({str(folder)!r})
plan_hf(weights), plan_shards(weights, ParallelConfig())
heavy = {{"torch", "safetensors", "transformers", "megatron"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)
