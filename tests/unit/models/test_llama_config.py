"""config.json to ModelConfig and back: both forms of transformers, nothing dropped, everything refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_syne.config.schema import ModelConfig
from megatron_syne.errors import ConfigError, DataError, MissingInput, SecurityRefusal
from megatron_syne.models.config import model_differences, padded_vocab_size, resolve_model
from megatron_syne.models.hf_config import PRESETS, config_dtype, hf_config_from_model, model_config_from_hf
from megatron_syne.models.json_file import read_json

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def llama3_8b(**changes: Any) -> dict[str, Any]:
    """Llama-3-8B's config.json as transformers 4.x writes it."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.0.dev0",
        "use_cache": True,
        "vocab_size": 128256,
    }
    return config | changes


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def test_llama3_8b_is_the_preset() -> None:
    assert model_config_from_hf(llama3_8b(), "config.json") == PRESETS["llama3_8b"]


def test_transformers_5_form_reads_the_same() -> None:
    plain = without(llama3_8b(), "rope_theta", "rope_scaling", "torch_dtype") | {
        "dtype": "bfloat16",
        "pad_token_id": None,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    }
    assert model_config_from_hf(plain, "x") == PRESETS["llama3_8b"]
    scaled = plain | {
        "max_position_embeddings": 131072,
        "rope_parameters": LLAMA3_ROPE | {"rope_theta": 500000.0},
    }
    assert model_config_from_hf(scaled, "x") == PRESETS["llama3_1_8b"]


def test_older_rope_scaling_reads_the_same() -> None:
    older = without(LLAMA3_ROPE, "rope_type") | {"type": "llama3"}
    for scaling in (LLAMA3_ROPE, older):
        model = model_config_from_hf(llama3_8b(rope_scaling=scaling, max_position_embeddings=131072), "x")
        assert model == PRESETS["llama3_1_8b"]


def test_absent_fields_take_transformers_defaults() -> None:
    from transformers import LlamaConfig

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 100}
    sizes["num_attention_heads"] = 4
    model, default = model_config_from_hf(sizes, "x"), LlamaConfig(**sizes)
    assert model.num_query_groups == default.num_key_value_heads
    assert model.kv_channels == default.head_dim
    assert model.layernorm_epsilon == default.rms_norm_eps
    assert model.rotary_base == default.rope_theta
    assert model.max_position_embeddings == default.max_position_embeddings
    assert model.share_embeddings_and_output_weights == default.tie_word_embeddings
    assert model.init_method_std == default.initializer_range


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], list[str]]] = {
    "architecture": ({"architectures": ["MistralForCausalLM"]}, DataError, ["Mistral", "LlamaForCausalLM"]),
    "model type": ({"model_type": "qwen2"}, DataError, ["qwen2", "'llama'"]),
    "two architectures": ({"architectures": ["LlamaForCausalLM", "X"]}, DataError, ["X"]),
    "code": ({"auto_map": {"AutoModel": "x.Y"}}, SecurityRefusal, ["auto_map", "never"]),
    "quantised": ({"quantization_config": {"bits": 4}}, DataError, ["quantization_config"]),
    "attention bias": ({"attention_bias": True}, DataError, ["attention_bias", "True", "False"]),
    "mlp bias": ({"mlp_bias": True}, DataError, ["mlp_bias"]),
    "activation": ({"hidden_act": "gelu"}, DataError, ["hidden_act", "gelu", "silu"]),
    "dropout": ({"attention_dropout": 0.1}, DataError, ["attention_dropout"]),
    "unknown key": ({"sliding_window": 4096}, DataError, ["sliding_window", "4096"]),
    "linear rope": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, DataError, ["linear", "llama3"]),
    "yarn rope": ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, DataError, ["yarn"]),
    "rope constants": (
        {"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 8.0}},
        DataError,
        ["high_freq_factor", "8.0", "4.0"],
    ),
    "rope length": (
        {"rope_scaling": without(LLAMA3_ROPE, "original_max_position_embeddings")},
        DataError,
        ["original_max_position_embeddings", "8192"],
    ),
    "rope factor": ({"rope_scaling": without(LLAMA3_ROPE, "factor")}, DataError, ["factor"]),
    "rope unknown key": ({"rope_scaling": LLAMA3_ROPE | {"beta": 1}}, DataError, ["beta"]),
    "factor without a type": ({"rope_scaling": {"factor": 2.0}}, DataError, ["factor"]),
    "rope not an object": ({"rope_scaling": "llama3"}, DataError, ["rope_scaling", "llama3"]),
    "rope type twice": ({"rope_scaling": LLAMA3_ROPE | {"type": "linear"}}, DataError, ["disagree"]),
    "rope base disagrees": (
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
        DataError,
        ["10000", "500000", "disagrees"],
    ),
    "rope scaling disagrees": (
        {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 500000.0}},
        DataError,
        ["rope_parameters", "disagrees"],
    ),
    "dtype disagrees": ({"dtype": "float32"}, DataError, ["float32", "bfloat16"]),
    "negative": ({"hidden_size": -1}, DataError, ["hidden_size", "-1"]),
    "text": ({"num_hidden_layers": "32"}, DataError, ["num_hidden_layers", "'32'"]),
    "boolean": ({"vocab_size": True}, DataError, ["vocab_size"]),
    "fraction": ({"vocab_size": 1.5}, DataError, ["vocab_size"]),
    "tie": ({"tie_word_embeddings": "yes"}, DataError, ["tie_word_embeddings"]),
    "missing": ({"vocab_size": None, "hidden_size": None}, DataError, ["vocab_size", "hidden_size"]),
    "groups": ({"num_key_value_heads": 5}, DataError, ["32", "5"]),
    "heads": ({"num_attention_heads": 33, "num_key_value_heads": 33}, DataError, ["4096", "33"]),
    "odd head": ({"head_dim": 7}, DataError, ["7"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str) -> None:
    changes, error, words = REFUSED[case]
    with pytest.raises(error) as caught:
        model_config_from_hf(llama3_8b(**changes), "here/config.json")
    for word in ["here/config.json", *words]:
        assert word in str(caught.value)


def test_all_problems_at_once() -> None:
    with pytest.raises(DataError) as caught:
        model_config_from_hf(llama3_8b(mlp_bias=True, hidden_act="relu", new_thing=1, vocab_size=-5), "x")
    for word in ("mlp_bias", "hidden_act", "new_thing", "vocab_size"):
        assert word in str(caught.value)


models = st.builds(
    lambda heads, groups, head, factor, **rest: ModelConfig(
        model_type="llama",
        num_attention_heads=heads * groups,
        num_query_groups=groups,
        kv_channels=2 * head,
        rope_scaling_factor=factor,
        **rest,
    ),
    heads=st.integers(1, 8),
    groups=st.integers(1, 8),
    head=st.integers(1, 64),
    factor=st.none() | st.floats(1, 64),
    num_layers=st.integers(1, 100),
    hidden_size=st.integers(1, 10000),
    ffn_hidden_size=st.integers(1, 10000),
    vocab_size=st.integers(1, 200000),
    max_position_embeddings=st.integers(1, 200000),
    layernorm_epsilon=st.floats(1e-8, 1e-3),
    rotary_base=st.floats(1, 1e7),
    share_embeddings_and_output_weights=st.booleans(),
    init_method_std=st.floats(1e-4, 1),
)


@given(models, st.sampled_from(["float32", "bfloat16"]))
def test_the_written_config_reads_back_and_carries_both_forms(model: ModelConfig, dtype: str) -> None:
    config = json.loads(json.dumps(hf_config_from_model(model, dtype, 1, [2, 3])))
    assert model_config_from_hf(config, "x") == model
    assert config_dtype(config, "x") == dtype
    for one_form in (("rope_theta", "rope_scaling", "torch_dtype"), ("rope_parameters", "dtype")):
        assert model_config_from_hf(without(config, *one_form), "x") == model


def test_transformers_reads_the_written_config() -> None:
    from transformers import LlamaConfig

    for preset in PRESETS.values():
        read = LlamaConfig(**hf_config_from_model(preset, "bfloat16", 128000, 128001))
        assert (read.rope_theta, read.head_dim) == (preset.rotary_base, preset.kv_channels)
        assert read.num_key_value_heads == preset.num_query_groups
        assert (read.rope_scaling or {}).get("factor") == preset.rope_scaling_factor
        assert read.tie_word_embeddings is preset.share_embeddings_and_output_weights
        assert (read.eos_token_id, read.max_position_embeddings) == (128001, preset.max_position_embeddings)


def test_the_source_config_is_the_base() -> None:
    base = llama3_8b(pad_token_id=128255, eos_token_id=[128001, 128009])
    config = hf_config_from_model(PRESETS["llama3_8b"], "float32", base=base)
    assert (config["pad_token_id"], config["eos_token_id"]) == (128255, [128001, 128009])
    assert config["transformers_version"] == "4.40.0.dev0"
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert base["torch_dtype"] == "bfloat16"  # not changed in place


def test_no_special_tokens_are_written_as_none() -> None:
    config = hf_config_from_model(PRESETS["llama3_8b"], "float32")
    assert config["bos_token_id"] is None and config["eos_token_id"] is None


def test_resolve_from_preset_and_override() -> None:
    model = resolve_model(ModelConfig(preset="llama3_8b", num_layers=2, make_vocab_size_divisible_by=64))
    assert (model.num_layers, model.hidden_size, model.make_vocab_size_divisible_by) == (2, 4096, 64)
    assert resolve_model(model) == model
    assert PRESETS["llama3_8b"].num_layers == 32


def test_resolve_from_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(llama3_8b()))
    model = resolve_model(ModelConfig(hf_path=str(tmp_path), rotary_base=1e6))
    assert model_differences(model, PRESETS["llama3_8b"]) == ["rotary_base: 1000000.0 against 500000.0"]


def test_resolve_names_all_missing_fields() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_model(ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4))
    message = str(caught.value)
    for field in dataclasses.fields(ModelConfig):
        given = {"num_layers", "hidden_size", "num_attention_heads", "model_type", "kv_channels"}
        optional = {"hf_path", "preset", "rope_scaling_factor", "init_method_std"}
        named = f"model.{field.name}" in message
        assert named == (field.name not in given | optional | {"make_vocab_size_divisible_by"}), field.name


@pytest.mark.parametrize(
    ("model", "error", "word"),
    [
        (ModelConfig(preset="llama3_8"), ConfigError, "llama3_8b"),
        (ModelConfig(preset="llama3_8b", hf_path="x"), ConfigError, "not both"),
        (ModelConfig(hf_path="/nowhere"), MissingInput, "/nowhere/config.json"),
        (ModelConfig(preset="llama3_8b", num_query_groups=5), ConfigError, "num_query_groups 5"),
        (ModelConfig(preset="llama3_8b", num_layers=0), ConfigError, "num_layers"),
        (ModelConfig(preset="llama3_8b", model_type="gpt2"), ConfigError, "gpt2"),
    ],
)
def test_resolve_refuses(model: ModelConfig, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        resolve_model(model)


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (b"{", "not valid JSON"),
        (b"[1]", "expected a JSON object"),
        (b'{"a": 1, "a": 2}', "'a' stands twice"),
        (b'{"a": NaN}', "NaN"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"a":' + b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' + b"1" * 10_000 + b"}", "not valid JSON"),
    ],
)
def test_read_json_refuses(tmp_path: Path, raw: bytes, word: str) -> None:
    (tmp_path / "x.json").write_bytes(raw)
    with pytest.raises(DataError, match=word):
        read_json(tmp_path / "x.json")


@given(st.integers(1, 200000), st.integers(1, 512), st.integers(1, 64))
def test_padded_vocabulary(vocab: int, divisible: int, tp: int) -> None:
    model = ModelConfig(vocab_size=vocab, make_vocab_size_divisible_by=divisible)
    padded = padded_vocab_size(model, tp)
    assert padded % (divisible * tp) == 0 and vocab <= padded < vocab + divisible * tp
