"""The rules and notes of evaluation by lm-evaluation-harness, and the command lines' wrong options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_syne.config.loader import load_config
from megatron_syne.config.schema import RunConfig
from megatron_syne.errors import ConfigError
from megatron_syne.models.config import resolve_model
from megatron_syne.preflight import harness_rules, rules

RUN = """run_dir: out
model: {num_layers: 4, hidden_size: 64, ffn_hidden_size: 192, num_attention_heads: 8, num_query_groups: 4,
 kv_channels: 8, vocab_size: 512, max_position_embeddings: 128, layernorm_epsilon: 1e-5,
 rotary_base: 500000, share_embeddings_and_output_weights: false}
data: {seq_length: 64, mock: true}
train: {train_iters: 20}
checkpoint: {save_interval: 10}
harness: {tasks: [arc_easy]}
"""


def load(folder: Path, *overrides: str) -> RunConfig:
    (folder / "run.yaml").write_text(RUN)
    return load_config(str(folder / "run.yaml"), overrides)


def check(config: RunConfig) -> None:
    rules.check(config, resolve_model(config.model), None, "cpu")


def test_what_may_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text("task: mine")
    (tmp_path / "other.yml").write_text("task: other")
    monkeypatch.chdir(tmp_path)
    check(load(tmp_path))
    check(load(tmp_path, "harness.interval=20", "harness.num_fewshot=0", "harness.device=cuda:1"))
    check(
        load(tmp_path, "harness.tasks=[mine.yaml, other.yml]", f"harness.include_path={tmp_path / 'tasks'}")
    )
    check(load(tmp_path, "checkpoint.save_interval=null"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "harness.interval=15",
            "is not a multiple of checkpoint.save_interval = 10 (run.yaml:7); nearest legal: 10 or 20",
        ),
        ("harness.interval=0", "must be at least 1"),
        ("harness.limit=0", "must be at least 1"),
        ("harness.batch_size=0", "must be at least 1"),
        ("harness.timeout_seconds=0", "must be at least 1"),
        ("harness.num_fewshot=-1", "must be at least 0"),
        ("harness.device=gpu", "must be cpu, cuda or cuda:<n>"),
        ("harness.include_path=nowhere", "no such folder"),
        ("harness.tasks=[mine.yaml]", "harness.tasks.0 = mine.yaml (command line): no such file"),
        ("harness.tasks=[a, b, a]", "harness.tasks.2 = a (command line) is named twice"),
        ("harness.tasks=['a,b']", "must be one task's name or file"),
    ],
)
def test_what_may_not(override: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        check(load(tmp_path, override))
    text = str(caught.value).replace(str(tmp_path) + "/", "")
    assert override.partition("=")[0] in text and words in text, text


def test_an_interval_needs_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"harness.interval = 10 .* needs checkpoint.save_interval"):
        check(load(tmp_path, "harness.interval=10", "checkpoint.save_interval=null"))


def test_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def notes(*overrides: str) -> str:
        return "\n".join(harness_rules.harness_notes(load(tmp_path, *overrides)))

    monkeypatch.setattr(harness_rules, "is_installed", lambda: True)
    assert notes() == ""
    assert "the last checkpoint alone is evaluated" in notes("checkpoint.save_interval=null")
    assert "takes memory of a GPU that trains" in notes("harness.device=cuda:0")
    assert (
        notes("harness.tasks=[]", "harness.limit=5")
        == "harness.limit is not used: harness.tasks is not given"
    )
    monkeypatch.setattr(harness_rules, "is_installed", lambda: False)
    assert "is not installed here; the nodes of the run need it (pip install" in notes()


@pytest.mark.parametrize("program", ["train", "score"])
@pytest.mark.parametrize("given", [["--nonsense"], []])
def test_a_wrong_option_exits_as_documented(program: str, given: list[str], capsys: Any) -> None:
    import importlib

    with pytest.raises(SystemExit) as caught:
        importlib.import_module(f"megatron_syne.{program}").main(given)
    assert caught.value.code == 64
    assert "error: " in capsys.readouterr().err
