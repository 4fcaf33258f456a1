"""What context parallelism needs: every refusal names the values, their place and the nearest legal ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_syne.config.loader import load_config
from megatron_syne.errors import ConfigError
from megatron_syne.models.config import resolve_model
from megatron_syne.preflight import rules

CONFIG = """run_dir: out
model: {model_type: mistral, num_layers: 4, hidden_size: 64, ffn_hidden_size: 192, num_attention_heads: 8,
  num_query_groups: 4, kv_channels: 8, vocab_size: 512,
  max_position_embeddings: 256, layernorm_epsilon: 1e-5, rotary_base: 500000,
  share_embeddings_and_output_weights: false}
data:
  seq_length: 64
  sources: {en: {path: en}}
  stages: [{name: a, tokens: 1024, mixture: {en: 1}}, {name: b, tokens: 1024, seq_length: 128, mixture: {en: 1}}]
"""
CP, TP, SP = (
    f"parallel.{name}"
    for name in ("context_parallel_size", "tensor_model_parallel_size", "sequence_parallel")
)
TYPE = "parallel.cp_comm_type"


@pytest.fixture
def problems(tmp_path: Path) -> Any:
    def _problems(overrides: list[str], platform: Any) -> str:
        (tmp_path / "run.yaml").write_text(CONFIG)
        config = load_config(str(tmp_path / "run.yaml"), overrides)
        try:
            rules.check(config, resolve_model(config.model), None, platform)
        except ConfigError as error:
            return str(error)
        return ""

    return _problems


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "overrides",
    [
        [f"{CP}=2"],
        [f"{CP}=4", f"{TYPE}=all_gather"],
        [f"{CP}=4", f"{TYPE}=a2a"],
        [f"{CP}=2", f"{TP}=2", f"{SP}=true", f"{TYPE}=a2a"],
        # 4 tokens on each CP rank, one on each TP rank
        [f"{CP}=16", f"{TP}=4", f"{SP}=true"],
        [f"{CP}=2", "model.window_size=9", f"{TYPE}=all_gather"],
        [f"{CP}=2", "model.window_size=9", f"{TYPE}=a2a"],
    ],
)
def test_what_the_engine_can_run_is_accepted(problems: Any, overrides: list[str], platform: str) -> None:
    assert problems(overrides, platform) == ""


# overrides, what the one message holds
EVERYWHERE: dict[str, tuple[list[str], list[str]]] = {
    "length": (
        [f"{CP}=2", "data.seq_length=66"],
        ["data.seq_length = 66 (command line) is not a multiple of 4 (2 x", "nearest legal: 64 or 68"],
    ),
    "length of a stage": (
        [f"{CP}=4", "data.stages.1.seq_length=100"],
        ["data.stages.1.seq_length = 100 (command line) is not a multiple of 8", "nearest legal: 96 or 104"],
    ),
    "length with SP": (
        [f"{CP}=2", f"{TP}=4", f"{SP}=true", "data.seq_length=68"],
        ["data.seq_length = 68", "multiple of 8", f"{TP} = 4 (command line)", "nearest legal: 64 or 72"],
    ),
    "exchange of nothing": (
        [f"{TYPE}=all_gather"],
        [f"{TYPE} = all_gather (command line) needs {CP} > 1", "set cp_comm_type to null"],
    ),
    "a2a and KV heads": (
        [f"{CP}=8", f"{TYPE}=a2a"],
        [f"{CP} = 8 (command line) does not divide model.num_query_groups = 4", "= 4, which", "nearest legal: 4"],
    ),
    "a2a and TP above the KV heads": (
        [f"{CP}=2", f"{TYPE}=a2a", f"{TP}=4", "model.num_query_groups=2"],
        [f"{CP} = 2 (command line) does not divide model.num_query_groups = 2", "/ TP 4 = 1", "nearest legal: 1"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("case", EVERYWHERE)
def test_refused_everywhere(problems: Any, case: str, platform: str) -> None:
    overrides, parts = EVERYWHERE[case]
    text = problems(overrides, platform)
    for part in parts:
        assert part in text, text
    assert "problems" not in text, text


# what Transformer Engine's attention cannot do
ENGINE = {
    "fp32": (["precision.params_dtype=fp32"], "Transformer Engine's attention over CP is 16-bit"),
    "window": (["model.window_size=9"], "set cp_comm_type to all_gather or a2a"),
    "window, p2p": (["model.window_size=9", f"{TYPE}=p2p"], "set cp_comm_type to all_gather or a2a"),
    "documents": (
        ["data.reset_attention_mask=true", "train.micro_batch_size=1"],
        "packed sequences (THD) are not cut over CP",
    ),
}


@pytest.mark.parametrize("case", ENGINE)
def test_refused_on_cuda_alone(problems: Any, case: str) -> None:
    overrides, part = ENGINE[case]
    assert part in problems([f"{CP}=2", *overrides], "cuda")
    assert problems([f"{CP}=2", *overrides], "cpu") == ""
    if TYPE not in " ".join(overrides):
        assert problems(overrides, "cuda") == ""  # without CP


def test_every_rule_is_broken_by_some_case(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG)
    reached = set()
    for overrides, _ in [*EVERYWHERE.values(), ([f"{CP}=2", *ENGINE["fp32"][0]], "")]:
        config = load_config(str(tmp_path / "run.yaml"), overrides)
        facts = rules.Facts(config, resolve_model(config.model), None, "cuda")
        reached |= {rule for rule in rules.CONTEXT_RULES if list(rule(facts))}
    assert reached == set(rules.CONTEXT_RULES)
