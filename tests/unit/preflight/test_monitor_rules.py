"""What may be asked of the watchers, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_syne.config.loader import load_config
from megatron_syne.config.schema import RunConfig
from megatron_syne.errors import ConfigError
from megatron_syne.models.config import resolve_model
from megatron_syne.monitor import wandb
from megatron_syne.preflight import rules

RUN = """run_dir: out
model: {num_layers: 4, hidden_size: 64, ffn_hidden_size: 192, num_attention_heads: 8, num_query_groups: 4,
 kv_channels: 8, vocab_size: 512, max_position_embeddings: 128, layernorm_epsilon: 1e-5,
 rotary_base: 500000, share_embeddings_and_output_weights: false}
data: {seq_length: 64, mock: true}
train: {train_iters: 20}
"""


def load(folder: Path, *overrides: str) -> RunConfig:
    (folder / "run.yaml").write_text(RUN)
    return load_config(str(folder / "run.yaml"), overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["monitor.norms_interval=null", "monitor.peak_flops=989.4e12"],
        ["monitor.wandb_project=synelm", "monitor.wandb_name=first"],
    ],
)
def test_what_may_run(tmp_path: Path, overrides: list[str]) -> None:
    config = load(tmp_path, *overrides)
    rules.check(config, resolve_model(config.model), None, "cpu")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("monitor.norms_interval=0", "monitor.norms_interval = 0 (command line) must be at least 1"),
        ("monitor.peak_flops=989.4", "must be in FLOP/s"),
        ("monitor.peak_flops=-1", "must be in FLOP/s"),
        ("monitor.wandb_project=' '", "is empty"),
        ("monitor.wandb_name=first", "needs monitor.wandb_project"),
    ],
)
def test_what_is_refused(tmp_path: Path, override: str, words: str) -> None:
    config = load(tmp_path, override)
    with pytest.raises(ConfigError) as error:
        rules.check(config, resolve_model(config.model), None, "cpu")
    assert words in str(error.value)


def test_a_missing_package_is_told_before_the_run_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb, "find_spec", lambda name: None)
    wandb.require_wandb(load(tmp_path))
    with pytest.raises(
        ConfigError, match=r"monitor.wandb_project = synelm: the package wandb is not installed"
    ):
        wandb.require_wandb(load(tmp_path, "monitor.wandb_project=synelm"))
