"""config.json to ModelConfig and back: both forms of transformers, nothing dropped, everything refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_syne.config.schema import ModelConfig
from megatron_syne.errors import ConfigError, DataError, MissingInput, SecurityRefusal
from megatron_syne.models.config import PRESETS, model_differences, padded_vocab_size, resolve_model
from megatron_syne.models.family import LLAMA_CONSTANTS, ROPE_DEFAULTS, completed, family_of, known
from megatron_syne.models.hf_config import config_dtype, hf_config_from_model, model_config_from_hf
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

    sizes: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "vocab_size": 100,
    }
    sizes["num_attention_heads"] = 4
    model, default = model_config_from_hf(sizes, "x"), LlamaConfig(**without(sizes, "model_type"))
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
    "unknown family": ({"model_type": "gpt2"}, DataError, ["gpt2", "'llama'"]),
    "family not named": ({"model_type": None, "architectures": None}, DataError, ["None", "'llama'"]),
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
        {"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 1.0}},
        DataError,
        ["high_freq_factor", "1.0", "low_freq_factor"],
    ),
    "rope length": (
        {"rope_scaling": without(LLAMA3_ROPE, "original_max_position_embeddings")},
        DataError,
        ["original_max_position_embeddings", "None"],
    ),
    "rope length broken": (
        {"rope_scaling": LLAMA3_ROPE | {"original_max_position_embeddings": 8192.5}},
        DataError,
        ["original_max_position_embeddings", "8192.5"],
    ),
    "rope base within the scaling": (
        {"rope_scaling": LLAMA3_ROPE | {"rope_theta": 10000.0}},
        DataError,
        ["10000", "500000", "disagrees"],
    ),
    "dynamic rope": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, DataError, ["dynamic"]),
    "layer types": ({"layer_types": ["full_attention"] * 31}, DataError, ["layer_types", "32"]),
    "dual chunk": (
        {"dual_chunk_attention_config": {"chunk_size": 1}},
        DataError,
        ["dual_chunk_attention_config"],
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


def test_every_constant_of_the_scaling_is_read() -> None:
    scaling = {"rope_type": "llama3", "factor": 3.0, "low_freq_factor": 2, "high_freq_factor": 5.5}
    scaling["original_max_position_embeddings"] = 1024
    model = model_config_from_hf(llama3_8b(rope_scaling=scaling), "x")
    assert (model.rope_scaling_factor, model.rope_low_freq_factor, model.rope_high_freq_factor) == (3, 2, 5.5)
    assert model.rope_original_max_position_embeddings == 1024
    assert hf_config_from_model(model, "float32")["rope_scaling"] == scaling


def test_all_problems_at_once() -> None:
    with pytest.raises(DataError) as caught:
        model_config_from_hf(llama3_8b(mlp_bias=True, hidden_act="relu", new_thing=1, vocab_size=-5), "x")
    for word in ("mlp_bias", "hidden_act", "new_thing", "vocab_size"):
        assert word in str(caught.value)


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    """Any model of any family."""
    family = family_of(draw(st.sampled_from(known())))
    groups = draw(st.integers(1, 8))
    model = ModelConfig(
        model_type=family.model_type,
        num_attention_heads=groups * draw(st.integers(1, 8)),
        num_query_groups=groups,
        kv_channels=2 * draw(st.integers(1, 64)),
        num_layers=draw(st.integers(1, 100)),
        hidden_size=draw(st.integers(1, 10000)),
        ffn_hidden_size=draw(st.integers(1, 10000)),
        vocab_size=draw(st.integers(1, 200000)),
        max_position_embeddings=draw(st.integers(1, 200000)),
        layernorm_epsilon=draw(st.floats(1e-8, 1e-3)),
        rotary_base=draw(st.floats(1, 1e7)),
        share_embeddings_and_output_weights=draw(st.booleans()),
        init_method_std=draw(st.floats(1e-4, 1)),
        **family.constants,
    )
    if "window_size" in {field.name for field in family.fields}:
        model.window_size = draw(st.none() | st.integers(1, 10000))
    if draw(st.booleans()):
        model.rope_scaling_factor = draw(st.floats(1, 64))
        model.rope_low_freq_factor = draw(st.floats(0.5, 4))
        model.rope_high_freq_factor = model.rope_low_freq_factor + draw(st.floats(0.5, 8))
        model.rope_original_max_position_embeddings = draw(st.integers(1, 200000))
    return model


@settings(deadline=None)
@given(models(), st.sampled_from(["float32", "bfloat16"]))
def test_the_written_config_reads_back_and_carries_both_forms(model: ModelConfig, dtype: str) -> None:
    config = json.loads(json.dumps(hf_config_from_model(model, dtype, 1, [2, 3])))
    assert model_config_from_hf(config, "x") == model
    assert config_dtype(config, "x") == dtype
    for one_form in (("rope_theta", "rope_scaling", "torch_dtype"), ("rope_parameters", "dtype")):
        assert model_config_from_hf(without(config, *one_form), "x") == model


def test_transformers_reads_the_written_config() -> None:
    from transformers import LlamaConfig

    for preset in PRESETS.values():
        if preset.model_type != "llama":
            continue
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
        given |= set(LLAMA_CONSTANTS)
        optional = {
            "hf_path",
            "preset",
            "rope_scaling_factor",
            *ROPE_DEFAULTS,
            "window_size",
            "init_method_std",
        }
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
        (ModelConfig(preset="llama3_8b", normalization="LayerNorm"), ConfigError, "normalization.*RMSNorm"),
        (ModelConfig(preset="llama3_8b", add_qkv_bias=True), ConfigError, "add_qkv_bias"),
        (ModelConfig(preset="llama3_8b", window_size=4096), ConfigError, "window_size"),
        (ModelConfig(preset="mistral_7b_v0_1", window_size=0), ConfigError, "window_size"),
        (ModelConfig(preset="llama3_8b", rope_low_freq_factor=2.0), ConfigError, "rope_scaling_factor"),
        (ModelConfig(preset="llama3_1_8b", rope_high_freq_factor=0.5), ConfigError, "rope_high_freq_factor"),
    ],
)
def test_resolve_refuses(model: ModelConfig, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        resolve_model(model)


def test_a_record_without_the_newer_fields_is_the_same_model() -> None:
    """Manifests and run records of earlier versions have neither the norms' fields nor three rope constants."""
    for name in ("llama3_8b", "llama3_1_8b"):
        record = dataclasses.asdict(PRESETS[name])
        for field in (*LLAMA_CONSTANTS, *ROPE_DEFAULTS, "window_size"):
            del record[field]
        assert resolve_model(ModelConfig(**record)) == completed(ModelConfig(**record)) == PRESETS[name]
        assert model_differences(ModelConfig(**record), PRESETS[name]) == []
        assert hf_config_from_model(ModelConfig(**record), "float32") == hf_config_from_model(
            PRESETS[name], "float32"
        )


def test_layer_types_follow_the_number_of_layers() -> None:
    base = llama3_8b(layer_types=["full_attention"] * 32)
    deeper = dataclasses.replace(model_config_from_hf(base, "x"), num_layers=40)
    assert hf_config_from_model(deeper, "float32", base=base)["layer_types"] == ["full_attention"] * 40


def test_preset_names_are_one_familys() -> None:
    names = [name for model_type in known() for name in family_of(model_type).presets]
    assert len(names) == len(set(names)) == len(PRESETS)
    for name, preset in PRESETS.items():
        assert resolve_model(dataclasses.replace(preset)) == preset, name


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
