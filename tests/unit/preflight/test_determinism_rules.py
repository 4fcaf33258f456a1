"""What ``train.deterministic_mode`` goes with, and what would undo it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_syne.config.loader import load_config
from megatron_syne.models.config import resolve_model
from megatron_syne.preflight import rules
from megatron_syne.preflight.determinism_rules import DETERMINISM_RULES, DETERMINISTIC_VARIABLES
from megatron_syne.preflight.facts import Facts

RUN = """run_dir: out
model: {num_layers: 4, hidden_size: 64, ffn_hidden_size: 192, num_attention_heads: 8, num_query_groups: 4,
 kv_channels: 8, vocab_size: 512, max_position_embeddings: 128, layernorm_epsilon: 1e-5,
 rotary_base: 500000, share_embeddings_and_output_weights: false}
data: {seq_length: 64, mock: true}
train: {train_iters: 20}
"""
MODE = "train.deterministic_mode=true"


def problems(folder: Path, platform: Any, *overrides: str) -> list[str]:
    """What the rules of the mode say; all others must be content."""
    (folder / "run.yaml").write_text(RUN)
    config = load_config(str(folder / "run.yaml"), overrides)
    facts = Facts(config, resolve_model(config.model), 1, platform)
    others = [rule for rule in rules.RULES if rule not in DETERMINISM_RULES]
    assert not [text for rule in others for text in rule(facts)]
    return [text for rule in DETERMINISM_RULES for text in rule(facts)]


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in DETERMINISTIC_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["precision.fp8=delayed"],
        ["precision.params_dtype=fp32", "memory.recompute_granularity=selective"],
        ["data.reset_attention_mask=true"],
        [
            "launch.env={NCCL_ALGO: Tree, CUBLAS_WORKSPACE_CONFIG: ':16:8', NVTE_ALLOW_NONDETERMINISTIC_ALGO: '0'}"
        ],
    ],
)
def test_what_it_goes_with(tmp_path: Path, platform: str, overrides: list[str]) -> None:
    assert problems(tmp_path, platform, MODE, *overrides) == []


@pytest.mark.parametrize(
    ("name", "value", "legal"),
    [
        ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1", "must be 0;"),
        ("CUBLAS_WORKSPACE_CONFIG", ":0:0", "must be :4096:8 or :16:8;"),
        ("NCCL_ALGO", "NVLS", "must be Ring or Tree or"),
    ],
)
def test_a_variable_that_would_undo_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, legal: str
) -> None:
    given = f"launch.env={{{name}: '{value}'}}"
    (text,) = problems(tmp_path, "cuda", MODE, given)
    assert text.startswith(f"launch.env.{name} = {value} (command line) with train.deterministic_mode = true")
    assert legal in text
    assert problems(tmp_path, "cuda", given) == []  # without the mode it is nobody's business
    assert problems(tmp_path, "cpu", MODE, given) == []  # and on a CPU nothing reads it
    monkeypatch.setenv(name, value)
    (text,) = problems(tmp_path, "cuda", MODE)
    assert text.startswith(f"the environment variable {name} = {value} with train.deterministic_mode = true")
    assert problems(tmp_path, "cuda", MODE, f"launch.env={{{name}: '{legal.split()[2].rstrip(';')}'}}") == []
