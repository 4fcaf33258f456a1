"""Patterns choose parameters, and groups give them their multipliers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_syne.config.schema import (
    CheckpointConfig,
    ModelConfig,
    OptimizerConfig,
    ParamGroupConfig,
    RunConfig,
)
from megatron_syne.errors import ConfigError, DataError
from megatron_syne.models.parameter_names import (
    EMBEDDING,
    OUTPUT,
    canonical,
    matches,
    new_layers_of,
    parameter_names,
    trains,
)
from megatron_syne.training.param_groups import check_patterns, multipliers

LLAMA = ModelConfig(
    model_type="llama",
    num_layers=3,
    hidden_size=8,
    num_attention_heads=2,
    share_embeddings_and_output_weights=False,
)
QKV_NORM = "decoder.layers.2.self_attention.linear_qkv.layer_norm_weight"
NAMES = parameter_names(LLAMA)


def test_names_of_a_model() -> None:
    assert len(NAMES) == 1 + 3 * 6 + 1 + 1
    assert QKV_NORM in NAMES and OUTPUT in NAMES
    tied = parameter_names(
        ModelConfig(model_type="llama", num_layers=1, share_embeddings_and_output_weights=True)
    )
    assert OUTPUT not in tied
    biased = parameter_names(ModelConfig(model_type="qwen2", num_layers=1))
    assert "decoder.layers.0.self_attention.linear_qkv.bias" in biased
    layer_norm = parameter_names(ModelConfig(model_type="inflm", num_layers=1))
    assert "decoder.final_layernorm.bias" in layer_norm


def test_names_are_the_same_on_both_platforms() -> None:
    assert canonical("decoder.layers.2.input_layernorm.weight") == QKV_NORM
    assert (
        canonical("decoder.layers.0.pre_mlp_layernorm.bias")
        == "decoder.layers.0.mlp.linear_fc1.layer_norm_bias"
    )
    assert all(canonical(name) == name for name in NAMES)
    assert canonical(OUTPUT, tied=True) == EMBEDDING


@pytest.mark.parametrize(
    ("pattern", "count"),
    [("embedding.*", 1), ("decoder.layers.1.*", 6), ("*.linear_fc?.weight", 6), ("*", 21), ("layers.new", 12),
     ("layers.original", 6), ("decoder.layers.1", 0), ("Embedding.*", 0)],
)  # fmt: skip
def test_patterns(pattern: str, count: int) -> None:
    assert sum(matches(name, pattern, [0, 2]) for name in NAMES) == count


def test_frozen_goes_before_chosen() -> None:
    chosen = [n for n in NAMES if trains(n, ["decoder.layers.2.*"], ["layers.new", OUTPUT], [0, 2])]
    assert chosen == [n for n in NAMES if n.startswith("decoder.layers.0.")] + [OUTPUT]


def test_a_pattern_without_a_match_names_the_nearest() -> None:
    options = OptimizerConfig(
        freeze=["embeding.*"], train_only=["decoder.*"], groups=[ParamGroupConfig(match="output.weight")]
    )
    with pytest.raises(ConfigError) as caught:
        check_patterns(NAMES, options, None)
    message = str(caught.value)
    assert "optimizer.freeze: 'embeding.*' fits no parameter" in message
    assert EMBEDDING in message
    assert "optimizer.groups.0.match" in message and OUTPUT in message


def test_nothing_left_to_train() -> None:
    with pytest.raises(ConfigError, match="leave nothing to train"):
        check_patterns(NAMES, OptimizerConfig(freeze=["*.weight", "*"], train_only=["decoder.*"]), None)


def test_multipliers() -> None:
    plain = OptimizerConfig()
    assert multipliers(EMBEDDING, 2, plain, None) == (1.0, 1.0)
    assert multipliers(QKV_NORM, 1, plain, None) == (1.0, 0.0)
    assert multipliers(QKV_NORM, 1, OptimizerConfig(decay_norms_and_biases=True), None) == (1.0, 1.0)
    groups = [
        ParamGroupConfig(match="*.layer_norm_weight", wd_mult=0.5),
        ParamGroupConfig(match="decoder.*", lr_mult=0.1),
    ]
    grouped = OptimizerConfig(groups=groups)
    assert multipliers(QKV_NORM, 1, grouped, None) == (1.0, 0.5)  # the first that fits counts
    assert multipliers("decoder.final_layernorm.weight", 1, grouped, None) == (0.1, 0.0)
    assert multipliers("decoder.layers.0.mlp.linear_fc2.weight", 2, grouped, None) == (0.1, 1.0)


def test_new_layers_are_read_beside_the_weights(tmp_path: Path) -> None:
    start, run = tmp_path / "start", tmp_path / "run"
    (start / "hf").mkdir(parents=True)
    config = RunConfig(run_dir=str(run), checkpoint=CheckpointConfig(initialize_from=str(start)))
    with pytest.raises(ConfigError, match=r"surgery\.json"):
        new_layers_of(config)
    (start / "hf" / "surgery.json").write_text(json.dumps({"new_layers": [1, 3]}))
    assert new_layers_of(config) == [1, 3]
    kept = run / "checkpoints" / "iter_0000002" / "hf"
    kept.mkdir(parents=True)
    (kept / "surgery.json").write_text(json.dumps({"new_layers": [2]}))
    assert new_layers_of(config) == [2]  # the run's own goes before what it started from
    (kept / "surgery.json").write_text(json.dumps({"new_layers": ["2"]}))
    with pytest.raises(DataError, match="list of layer numbers"):
        new_layers_of(config)
