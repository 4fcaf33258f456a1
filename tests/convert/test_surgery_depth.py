"""More layers: the same function where that is promised, and the layers that were meant where it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from surgery_toys import Memory, logits, read_json, save, values, whole
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_syne.convert.formats.hf import open_hf
from megatron_syne.convert.surgery import depth
from megatron_syne.convert.surgery.depth import deeper_config, expand_blocks, upscale_depth
from megatron_syne.convert.surgery.record import RECORD, read_record
from megatron_syne.convert.table import hf_tensors
from megatron_syne.errors import ConfigError, DataError

TOKENS = torch.arange(40)[None] % 37 + 3
SILENT = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", [{"every": 1}, {"every": 3}, {"num_new": 2}])
def test_an_expanded_llama_computes_the_same(
    tmp_path: Path, toy_maker: Any, how: dict[str, int], dtype: torch.dtype
) -> None:
    toy = toy_maker(tmp_path / "toy", dtype)
    with_more = save(expand_blocks(open_hf(toy), **how), tmp_path / "more")
    added = {"every": 4 // how.get("every", 4), "num_new": 2}[next(iter(how))]
    assert read_json(with_more / "config.json")["num_hidden_layers"] == 4 + added
    assert torch.equal(logits(toy, TOKENS), logits(with_more, TOKENS))


def test_an_expanded_qwen_computes_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = Qwen2Config(**sizes, num_key_value_heads=2, vocab_size=64, max_window_layers=4)
    model = Qwen2ForCausalLM(config)
    for parameter in model.parameters():  # biases of zero would hide a copy that lost them
        parameter.data.normal_(std=0.2)
    model.save_pretrained(tmp_path / "toy")
    expanded = expand_blocks(open_hf(tmp_path / "toy"), every=2)
    save(expanded, tmp_path / "more")
    assert torch.equal(logits(tmp_path / "toy", TOKENS), logits(tmp_path / "more", TOKENS))
    biases = [f"model.layers.{layer}.self_attn.q_proj.bias" for layer in (1, 2)]
    assert np.array_equal(whole(expanded, biases[0]), whole(expanded, biases[1])), "copied, not zeroed"
    assert read_json(tmp_path / "more" / "config.json")["max_window_layers"] == 6


def test_a_copy_that_is_not_silenced_is_seen(tmp_path: Path, toy: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(depth, "_LAST", (".mlp.linear_fc2.",))
    save(expand_blocks(open_hf(toy), every=2), tmp_path / "more")
    assert (logits(toy, TOKENS) - logits(tmp_path / "more", TOKENS)).abs().max() > 1e-3


def test_stories_expanded_tell_the_same(tmp_path: Path, shared_data: Path) -> None:
    stories = shared_data / "stories260k"
    save(expand_blocks(open_hf(stories), num_new=5), tmp_path / "more")
    assert torch.equal(logits(stories, TOKENS), logits(tmp_path / "more", TOKENS))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.data())
def test_expanded_layers_are_copies(layers: int, data: st.DataObject) -> None:
    every = data.draw(st.integers(1, layers))
    small = Memory(num_layers=layers)
    found = expand_blocks(small, every=every)
    new = found.describe()["parameters"]["new_layers"]
    assert found.shapes == hf_tensors(found.model) and list(found.shapes) == list(hf_tensors(found.model))
    old = iter(range(layers))
    source = -1
    for layer in range(found.model.num_layers or 0):
        source = source if layer in new else next(old)
        assert (layer in new) <= ((source + 1) % every == 0)
        for name in (n for n in small.shapes if n.startswith(f"model.layers.{source}.")):
            copy = whole(found, name.replace(f".{source}.", f".{layer}.", 1), rows_at_once=3)
            if layer in new and name.endswith(SILENT):
                assert not copy.any()
            else:
                assert np.array_equal(copy, small.raw[name])
    assert next(old, None) is None, "every old layer stands once"
    assert len(new) == layers // every


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.data())
def test_upscaled_layers(layers: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(layers // 2 + 1, layers))
    small = Memory(num_layers=layers)
    found = upscale_depth(small, layers_kept=kept)
    sources = [*range(kept), *range(layers - kept, layers)]
    assert found.model.num_layers == len(sources)
    for layer, source in enumerate(sources):
        name = "model.layers.{}.mlp.up_proj.weight"
        assert np.array_equal(whole(found, name.format(layer)), small.raw[name.format(source)])
    new = found.describe()["parameters"]["new_layers"]
    assert {sources[layer] for layer in range(len(sources)) if layer not in new} == set(range(layers))
    assert len(new) == len(sources) - layers


def test_solar_has_48_layers() -> None:
    found = upscale_depth(Memory(num_layers=32), layers_kept=24)
    assert found.model.num_layers == 48
    assert found.describe()["parameters"]["new_layers"] == list(range(24, 40))


def test_an_upscaled_model_loads_and_runs(tmp_path: Path, toy: Path) -> None:
    save(upscale_depth(open_hf(toy), layers_kept=3), tmp_path / "more")
    found = logits(tmp_path / "more", TOKENS)
    assert torch.isfinite(found).all() and not torch.allclose(found, logits(toy, TOKENS))


def test_the_record_follows_layers_through_operations(tmp_path: Path, toy: Path) -> None:
    first = expand_blocks(open_hf(toy), every=2)
    save(first, tmp_path / "first")
    record = read_record(tmp_path / "first")
    assert record is not None and record["new_layers"] == [2, 5]
    # 0 1 [2] 3 4 [5] -> 0 1 2 3 | 2 3 4 5: the copies of 2 are new as before, 2 and 3 of the second part are too
    second = upscale_depth(first, layers_kept=4)
    record = json.loads(second.documents[RECORD])  # type: ignore[attr-defined]
    assert record["new_layers"] == [2, 4, 5, 7]
    assert [one["operation"] for one in record["operations"]] == ["expand-blocks", "upscale-depth"]


def test_a_record_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text('{"format": "megatron_syne.surgery", "version": 1, "operations": []}')
    with pytest.raises(DataError, match="new_layers"):
        read_record(tmp_path)
    (tmp_path / RECORD).write_text("{}")
    with pytest.raises(DataError, match="another tool"):
        read_record(tmp_path)


def test_what_the_certificate_says_is_json_without_paths(tmp_path: Path, toy: Path) -> None:
    found = expand_blocks(open_hf(toy), every=2)
    text = json.dumps(found.describe())
    assert str(tmp_path) not in text
    assert found.describe()["inputs"]["source"]["kind"] == "hf"
    assert list(found.files()) == ["model.safetensors"]
    assert found.identity() != expand_blocks(open_hf(toy), every=1).identity()


def test_the_source_is_not_touched() -> None:
    small = Memory()
    before = {name: raw.copy() for name, raw in small.raw.items()}
    found = expand_blocks(small, every=1)
    assert [values(found, name).shape for name in found.shapes]
    assert small.config["num_hidden_layers"] == 2 and small.model.num_layers == 2
    assert all(np.array_equal(before[name], small.raw[name]) for name in before)


def test_layer_types_follow_the_layers() -> None:
    kinds = ["sliding_attention", "full_attention"]
    config = deeper_config({"num_hidden_layers": 2, "layer_types": kinds}, [0, 0, 1, 1])
    assert config["layer_types"] == [kinds[0], kinds[0], kinds[1], kinds[1]]
    config = deeper_config({"num_hidden_layers": 4, "max_window_layers": 3}, [0, 1, 1, 2, 3, 3])
    assert config["max_window_layers"] == 4
    config = deeper_config({"num_hidden_layers": 4, "max_window_layers": 28}, [0, 1, 2, 1, 2, 3])
    assert config["max_window_layers"] == 30
    windows = {"num_hidden_layers": 4, "max_window_layers": 2, "use_sliding_window": True}
    with pytest.raises(DataError, match="max_window_layers 2"):
        deeper_config(windows, [0, 1, 2, 1, 2, 3])
    with pytest.raises(DataError, match="layer_types"):
        deeper_config({"num_hidden_layers": 2, "layer_types": ["full_attention"]}, [0, 0, 1])


@pytest.mark.parametrize(
    ("operation", "options", "message"),
    [
        (expand_blocks, {}, "one of the two"),
        (expand_blocks, {"every": 2, "num_new": 2}, "one of the two"),
        (expand_blocks, {"every": 0}, "within 1 and the model's 6"),
        (expand_blocks, {"every": 7}, "within 1 and the model's 6"),
        (expand_blocks, {"num_new": 4}, "possible: 1, 2, 3, 6"),
        (upscale_depth, {"layers_kept": 3}, "expected 4 to 6"),
        (upscale_depth, {"layers_kept": 7}, "expected 4 to 6"),
    ],
)
def test_numbers_that_do_not_fit(operation: Any, options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        operation(Memory(num_layers=6), **options)
