"""What trains is checked before anything starts: patterns by the model's own names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_syne.config.loader import load_config
from megatron_syne.models.config import resolve_model
from megatron_syne.preflight.facts import Facts
from megatron_syne.preflight.trainable_rules import TRAINABLE_RULES

RUN = """
run_dir: out
model: {num_layers: 4, hidden_size: 64, ffn_hidden_size: 192, num_attention_heads: 8, num_query_groups: 4,
  kv_channels: 8, vocab_size: 512, max_position_embeddings: 128, layernorm_epsilon: 1e-5, rotary_base: 500000,
  share_embeddings_and_output_weights: false}
data:
  sources: {en: {path: en}}
  stages:
    - {name: a, tokens: 1000, mixture: {en: 1}}
    - {name: b, tokens: 1000, mixture: {en: 1}}
"""


@pytest.fixture
def problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(RUN)

    def _problems(*overrides: str) -> list[str]:
        config = load_config("run.yaml", overrides)
        facts = Facts(config, resolve_model(config.model), None, "cpu")
        return [text for rule in TRAINABLE_RULES for text in rule(facts)]

    return _problems


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["optimizer.freeze=[embedding.*, output_layer.*]", "optimizer.train_only=['decoder.layers.?.mlp.*']"],
        ["data.stages.0.train_only=[embedding.*]", "data.stages.1.freeze=['*.layer_norm_weight']"],
        ["optimizer.groups=[{match: embedding.*, lr_mult: 0, wd_mult: 0}]", "train.z_loss=1e-5"],
        ["optimizer.freeze=['*']", "data.stages.0.freeze=[]", "data.stages.1.freeze=[embedding.*]"],
    ],
)
def test_accepted(problems, overrides: list[str]) -> None:
    assert problems(*overrides) == []


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["train.z_loss=-0.1"], ["train.z_loss = -0.1", "at least 0"]),
        (["train.neftune_noise_alpha=-1"], ["train.neftune_noise_alpha = -1"]),
        (["optimizer.groups=[{match: '*', lr_mult: -2}]"], ["optimizer.groups.0.lr_mult = -2"]),
        (["optimizer.groups=[{match: '*', wd_mult: -2}]"], ["optimizer.groups.0.wd_mult = -2"]),
        (["optimizer.freeze=['']"], ["optimizer.freeze = ", "fits no parameter"]),
        (["optimizer.freeze=[embeddings.*]"], ["optimizer.freeze", "embedding.word_embeddings.weight"]),
        (["data.stages.1.freeze=[decoder.layers.4.*]"], ["data.stages.1.freeze", "decoder.layers.4.*"]),
        (["optimizer.groups=[{match: lm_head.*}]"], ["optimizer.groups.0.match = lm_head.*"]),
        (["optimizer.train_only=[layers.new]"], ["surgery.json"]),
        (["optimizer.freeze=['*']"], ["leave nothing to train"]),
        (
            ["data.stages.1.freeze=[embedding.*]", "data.stages.1.train_only=['*.word_embeddings.*']"],
            ["data.stages.1.freeze", "data.stages.1.train_only", "leave nothing to train"],
        ),
    ],
)
def test_refused(problems, overrides: list[str], parts: list[str]) -> None:
    found = problems(*overrides)
    assert len(found) == 1, found
    assert all(part in found[0] for part in parts), found[0]


def test_new_layers_must_exist(problems, tmp_path: Path) -> None:
    (tmp_path / "seed").mkdir()
    start = f"checkpoint.initialize_from={tmp_path / 'seed'}"
    record = tmp_path / "seed" / "surgery.json"
    record.write_text(json.dumps({"new_layers": [1]}))
    assert problems(start, "optimizer.train_only=[layers.new]") == []
    record.write_text(json.dumps({"new_layers": []}))
    (found,) = problems(start, "optimizer.train_only=[layers.new]")
    assert "there are no such layers" in found
