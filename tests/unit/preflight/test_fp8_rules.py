"""What FP8 needs, on both platforms: every refusal names the values, their place and the nearest legal ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_syne.config.loader import load_config
from megatron_syne.errors import ConfigError
from megatron_syne.models.config import resolve_model
from megatron_syne.preflight import rules
from megatron_syne.preflight.fp8_rules import FP8_RULES

CONFIG = """run_dir: out
model: {num_layers: 4, hidden_size: 128, ffn_hidden_size: 256, num_attention_heads: 8, num_query_groups: 8,
  kv_channels: 16, vocab_size: 512, max_position_embeddings: 256, layernorm_epsilon: 1e-5, rotary_base: 500000,
  share_embeddings_and_output_weights: false}
data:
  seq_length: 128
  sources: {en: {path: en}}
  stages: [{name: a, tokens: 1024, mixture: {en: 1}}, {name: b, tokens: 1024, seq_length: 256, mixture: {en: 1}}]
"""
FP8, GUARD = "precision.fp8", "precision.fp8_guard"
DELAYED, TENSORWISE, BLOCKWISE = (f"{FP8}={recipe}" for recipe in ("delayed", "tensorwise", "blockwise"))
FIRST_LAST = "precision.first_last_layers_bf16=true"
START, END = (f"precision.num_layers_at_{where}_in_bf16" for where in ("start", "end"))
TP2 = "parallel.tensor_model_parallel_size=2"
SP = "parallel.sequence_parallel=true"


@pytest.fixture
def facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def _facts(overrides: list[str], platform: Any) -> rules.Facts:
        Path("run.yaml").write_text(CONFIG)
        config = load_config("run.yaml", overrides)
        return rules.Facts(config, resolve_model(config.model), None, platform)

    return _facts


ALLOWED = [
    [DELAYED],
    [TENSORWISE, FIRST_LAST],
    [TENSORWISE, FIRST_LAST, f"{START}=0", f"{END}=2"],
    [BLOCKWISE],
    [BLOCKWISE, TP2],
    [DELAYED, TP2, SP],
    [BLOCKWISE, TP2, SP, "data.seq_length=256"],
    [DELAYED, "precision.fp8_emulation=true"],
    [DELAYED, f"{GUARD}.interval=10", f"{GUARD}.max_loss_gap=0.1", f"{GUARD}.max_underflow=0.5"],
    [DELAYED, "precision.fp8_margin=2", "precision.fp8_amax_history_len=1"],
    [DELAYED, "train.micro_batch_size=1", "data.stages.1.seq_length=40", "data.stages.1.micro_batch_size=2"],
    [],
]


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("overrides", ALLOWED, ids=" ".join)
def test_what_can_run_is_accepted(facts: Any, overrides: list[str], platform: str) -> None:
    found = facts(overrides, platform)
    assert [text for rule in FP8_RULES for text in rule(found)] == []


# overrides, what the message must hold; refused alike on both platforms
BROKEN: list[tuple[list[str], list[str]]] = [
    ([FIRST_LAST], ["precision.first_last_layers_bf16 = true (command line) needs precision.fp8"]),
    (["precision.fp8_emulation=true"], ["precision.fp8_emulation = true (command line) needs precision.fp8"]),
    ([f"{GUARD}.interval=5"], [f"{GUARD}.interval = 5 (command line) needs precision.fp8"]),
    ([f"{GUARD}.max_overflow=0.1"], [f"{GUARD}.max_overflow = 0.1 (command line) needs precision.fp8"]),
    ([DELAYED, "precision.params_dtype=fp32"], ["precision.params_dtype = fp32", "FP8 needs bf16"]),
    ([DELAYED, FIRST_LAST], ["does not support it with delayed scaling; use tensorwise or blockwise"]),
    ([DELAYED, "precision.fp8_amax_history_len=0"], ["fp8_amax_history_len = 0", "at least 1"]),
    ([DELAYED, "precision.fp8_margin=-1"], ["fp8_margin = -1 (command line) must be at least 0"]),
    ([TENSORWISE, FIRST_LAST, f"{START}=5"], [f"{START} = 5", "from 0 to the 4 layers", "nearest legal: 4"]),
    ([TENSORWISE, FIRST_LAST, f"{END}=-1"], [f"{END} = -1", "nearest legal: 0"]),
    (
        [TENSORWISE, FIRST_LAST, f"{END}=3", "parallel.pipeline_model_parallel_size=2"],
        ["from 0 to the 2 layers of a pipeline stage", "model.num_layers = 4 (run.yaml:2)"],
    ),
    ([TENSORWISE, FIRST_LAST, f"{START}=2", f"{END}=2"], ["leave none of model.num_layers = 4", "in FP8"]),
    ([DELAYED, f"{GUARD}.interval=0"], [f"{GUARD}.interval = 0 (command line) must be at least 1"]),
    ([DELAYED, f"{GUARD}.max_loss_gap=0.1"], [f"needs {GUARD}.interval", "nothing is watched"]),
    ([DELAYED, f"{GUARD}.interval=1", f"{GUARD}.max_loss_gap=0"], ["max_loss_gap = 0", "greater than 0"]),
    ([DELAYED, f"{GUARD}.interval=1", f"{GUARD}.max_overflow=1"], ["max_overflow = 1", "below 1"]),
    ([DELAYED, f"{GUARD}.interval=1", f"{GUARD}.max_underflow=-0.5"], ["max_underflow = -0.5", "at least 0"]),
    (
        [DELAYED, "data.stages.1.seq_length=40"],
        ["seq_length x micro_batch_size = 40", "nearest legal: 32 or 48"],
    ),
    (
        [TENSORWISE, "model.ffn_hidden_size=264", TP2],
        ["ffn_hidden_size / TP = 132 must be a multiple of 16; nearest legal: 128 or 144"],
    ),
    (
        [DELAYED, "parallel.context_parallel_size=16"],
        ["seq_length x micro_batch_size / CP = 8 must be a multiple of 16"],
    ),
    (
        [BLOCKWISE, TP2, SP, "model.hidden_size=192"],
        ["hidden_size = 192 must be a multiple of 128 under parallel.sequence_parallel = true", "128 or 256"],
    ),
    (
        [BLOCKWISE, TP2, SP],
        ["seq_length x micro_batch_size / (TP x CP) = 128 x 1 / 2", "nearest legal seq_length", "256"],
    ),
]


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize(("overrides", "expected"), BROKEN, ids=[" ".join(case[0]) for case in BROKEN])
def test_what_cannot_run_is_refused(
    facts: Any, overrides: list[str], expected: list[str], platform: str
) -> None:
    found = facts(overrides, platform)
    text = "\n".join(text for rule in FP8_RULES for text in rule(found))
    for words in expected:
        assert words in text, text


def test_emulation_belongs_to_the_cpu(facts: Any) -> None:
    def told(overrides: list[str], platform: str) -> str:
        found = facts(overrides, platform)
        return "\n".join(text for rule in FP8_RULES for text in rule(found))

    off, weights = "precision.fp8_emulation=false", "precision.fp8_param_gather=true"
    assert "on the CPU platform: FP8 is emulated there" in told([DELAYED, off], "cpu")
    assert told([DELAYED, off], "cuda") == ""
    assert "emulated layers keep bf16 weights" in told([DELAYED, weights], "cpu")
    assert told([DELAYED, weights], "cuda") == ""
    assert "emulated layers" in told([DELAYED, weights, "precision.fp8_emulation=true"], "cuda")
    alone = "parallel.use_distributed_optimizer=false"
    assert "needs parallel.use_distributed_optimizer: true" in told([DELAYED, weights, alone], "cuda")


def test_every_rule_is_broken_by_some_case(facts: Any) -> None:
    reached = {
        rule.__name__ for overrides, _ in BROKEN for rule in FP8_RULES if list(rule(facts(overrides, "cuda")))
    }
    assert {rule.__name__ for rule in FP8_RULES} == reached


def test_the_rules_are_asked(facts: Any) -> None:
    found = facts([DELAYED, FIRST_LAST], "cpu")
    with pytest.raises(ConfigError, match="does not support it with delayed"):
        rules.check(found.config, found.model, None, "cpu")
