"""Every rule of schedules and stages refuses what it names, with the numbers and the nearest legal values."""

from __future__ import annotations

from collections.abc import Callable
from math import cos, pi
from pathlib import Path

import pytest

from megatron_syne.config.loader import load_config
from megatron_syne.config.schema import RunConfig
from megatron_syne.errors import ConfigError
from megatron_syne.models.config import resolve_model
from megatron_syne.preflight import rules
from megatron_syne.preflight.report import dry_run_report
from megatron_syne.preflight.stage_rules import STAGE_RULES

RUN = """\
run_dir: out
platform: cpu
model: {num_layers: 4, hidden_size: 64, ffn_hidden_size: 192, num_attention_heads: 8, num_query_groups: 4,
  kv_channels: 8, vocab_size: 512, max_position_embeddings: 128, layernorm_epsilon: 1e-5, rotary_base: 10000,
  share_embeddings_and_output_weights: false}
data:
  seq_length: 64
  sources: {en: {path: en}, zh: {path: zh}}
  stages:
  - {name: a, tokens: 10240, mixture: {en: 0.8, zh: 0.2}}
  - {name: b, tokens: 5120, mixture: {en: 1}}
optimizer: {lr: 1.0e-3, min_lr: 1.0e-4}
train: {global_batch_size: 8}
"""  # 20 and 10 iterations of 512 tokens

SPAN = "schedule.span=stage"
OWN = "data.stages.1.schedule"
Load = Callable[..., RunConfig]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(RUN)
    return lambda *overrides: load_config("run.yaml", overrides)


def check(config: RunConfig, world_size: int | None = None) -> None:
    rules.check(config, resolve_model(config.model), world_size, "cpu")


BROKEN: dict[str, tuple[list[str], list[str]]] = {
    "both lengths of the decay": (
        ["schedule.lr_wsd_decay_iters=2", "schedule.lr_wsd_decay_tokens=1024"],
        ["schedule.lr_wsd_decay_iters = 2 (command line)", "lr_wsd_decay_tokens = 1024", "give one of them"],
    ),
    "both lengths of a stage's warm-up": (
        [SPAN, f"{OWN}.lr_warmup_iters=2", f"{OWN}.lr_warmup_tokens=1024"],
        [f"{OWN}.lr_warmup_iters = 2 (command line)", f"{OWN}.lr_warmup_tokens = 1024", "give one of them"],
    ),
    "schedule of a stage under one for all": (
        [f"{OWN}.lr=5.0e-4"],
        [f"{OWN} (", "of stage b with schedule.span = run (default)", "set schedule.span to stage"],
    ),
    "decay end with a schedule for each stage": (
        [SPAN, "schedule.lr_decay_iters=20"],
        ["schedule.lr_decay_iters = 20", "schedule.span = stage", "set lr_decay_iters to null"],
    ),
    "negative rate in a stage": (
        [SPAN, f"{OWN}.min_lr=-1"],
        [f"{OWN}.min_lr = -1.0 (command line) must be at least 0"],
    ),
    "no rate in a stage": ([SPAN, f"{OWN}.lr=0"], [f"{OWN}.lr = 0.0 (command line) must be greater than 0"]),
    "negative decay in tokens": (
        ["schedule.lr_wsd_decay_tokens=-1"],
        ["schedule.lr_wsd_decay_tokens = -1 (command line) must be at least 0"],
    ),
    "a stage's peak below the run's floor": (
        [SPAN, f"{OWN}.lr=5.0e-5"],
        ["optimizer.min_lr = 0.0001 (run.yaml:", "(stage b) is greater than data.stages.1.schedule.lr = 5e-05"],
    ),
    "a stage's warm-up starts above its peak": (
        [SPAN, f"{OWN}.lr_warmup_init=0.1"],
        [f"{OWN}.lr_warmup_init = 0.1", "is greater than optimizer.lr = 0.001 (run.yaml:"],
    ),
    "warm-up longer than its stage": (
        [SPAN, f"{OWN}.lr_warmup_iters=10"],
        [f"{OWN}.lr_warmup_iters = 10", "stage b, 10 iterations of 5,120 tokens", "at most 9 iterations"],
    ),
    "the run's warm-up longer than a stage": (
        [SPAN, "schedule.lr_warmup_tokens=6000"],
        ["schedule.lr_warmup_tokens = 6000 (command line) (stage b)", "at most 5056 tokens"],
    ),
    "warm-up and decay longer than a stage": (
        [SPAN, f"{OWN}.lr_warmup_iters=4", f"{OWN}.lr_wsd_decay_iters=7"],
        [f"{OWN}.lr_wsd_decay_iters = 7", "warm-up (4 iterations)", "at most 6 iterations"],
    ),
    "warm-up and decay in tokens longer than the run": (
        ["schedule.lr_warmup_tokens=1024", "schedule.lr_wsd_decay_tokens=99999"],
        ["schedule.lr_wsd_decay_tokens = 99999", "warm-up (1024 tokens)", "at most 14336 tokens"],
    ),
    "inverse square root from nothing": (
        ["schedule.lr_decay_style=inverse-square-root"],
        ["schedule.lr_decay_style = inverse-square-root (command line) without a warm-up"],
    ),
    "a stage's batch": (
        ["data.stages.1.global_batch_size=9", "train.micro_batch_size=2"],
        ["data.stages.1.global_batch_size = 9", "micro_batch_size 2 x DP 1 = 2", "nearest legal", "8 or 10"],
    ),
    "a stage's micro-batch": (
        ["data.stages.1.micro_batch_size=3"],
        ["data.stages.1.micro_batch_size = 3", "a global batch of 8 is not a multiple", "6 or 9"],
    ),
    "no batch in a stage": (
        ["data.stages.0.global_batch_size=0"],
        ["data.stages.0.global_batch_size = 0", "at least 1"],
    ),
    "ramp of two numbers": (["train.rampup_batch_size=[2, 2]"], ["train.rampup_batch_size = [2, 2]", "three numbers"]),
    "ramp downwards": (["train.rampup_batch_size=[16, 2, 64]"], ["does not start below the global batch of 8"]),
    "ramp that misses its batch": (
        ["data.stages.1.rampup_batch_size=[2, 4, 64]"],
        ["data.stages.1.rampup_batch_size = [2, 4, 64]", "from 2 to the global batch of 8", "legal increment: 3 or 6"],
    ),
    "ramp of half micro-batches": (
        ["train.rampup_batch_size=[3, 5, 64]", "train.micro_batch_size=2"],
        ["its start 3 is not a multiple of micro_batch_size 2 x DP 1 = 2", "2 or 4"],
    ),
    "ramp in too few samples": (["train.rampup_batch_size=[2, 2, 2]"], ["2 samples are too few for 3 steps"]),
    "two ramps for one stage": (
        ["train.rampup_batch_size=[2, 2, 32]", "data.stages.0.rampup_batch_size=[4, 2, 32]"],
        ["train.rampup_batch_size = [2, 2, 32]", "data.stages.0.rampup_batch_size = [4, 2, 32]"],
    ),
    "rotary base of nothing": (
        ["data.stages.1.rotary_base=0.5"],
        ["data.stages.1.rotary_base = 0.5 (command line) must be greater than 1"],
    ),
    "longer than the model claims": (
        ["data.stages.1.seq_length=256"],
        ["data.stages.1.seq_length = 256", "model.max_position_embeddings = 128", "embeddings: 256 or more"],
    ),
    "longer than the stage claims": (
        ["data.stages.1.seq_length=256", "data.stages.1.max_position_embeddings=200"],
        ["is greater than data.stages.1.max_position_embeddings = 200"],
    ),
    "a branch with weights of its own": (
        ["checkpoint.branch_from=there", "checkpoint.initialize_from=weights", "data.mock=true", "train.train_iters=5"],
        ["checkpoint.branch_from = ", "checkpoint.initialize_from = ", "set initialize_from to null", "data.mock"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_stage_rule_refuses_with_key_place_and_remedy(load: Load, name: str, tmp_path: Path) -> None:
    overrides, parts = BROKEN[name]
    config = load(*overrides)
    facts = rules.Facts(config, resolve_model(config.model), None, "cpu")
    text = "\n".join(problem for rule in STAGE_RULES for problem in rule(facts))
    for part in parts:
        assert part in text, text
    if config.checkpoint.branch_from is None:
        with pytest.raises(ConfigError):
            check(config)


def test_every_stage_rule_is_broken_by_some_case(load: Load) -> None:
    reached = set()
    for overrides, _ in BROKEN.values():
        config = load(*overrides)
        facts = rules.Facts(config, resolve_model(config.model), None, "cpu")
        reached |= {rule.__name__ for rule in STAGE_RULES if list(rule(facts))}
    assert {rule.__name__ for rule in STAGE_RULES} == reached


GOOD = {
    "all at its limit": [SPAN, f"{OWN}.lr_warmup_iters=9", "schedule.lr_wsd_decay_iters=1"],
    "decay all of the run": ["schedule.lr_wsd_decay_tokens=15360"],
    "ramp": ["train.rampup_batch_size=[2, 2, 32]", "data.stages.1.rampup_batch_size=[4, 4, 16]"],
    "a longer stage": ["data.stages.1.seq_length=256", "data.stages.1.max_position_embeddings=256",
                       "data.stages.1.rotary_base=5.0e5", "data.stages.1.global_batch_size=2"],
    "tokens in the place of iterations": [SPAN, "schedule.lr_warmup_iters=2", f"{OWN}.lr_warmup_tokens=600"],
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_what_fits_is_accepted(load: Load, name: str) -> None:
    check(load(*GOOD[name]))


def report(config: RunConfig) -> dict[str, list[str]]:
    text = dry_run_report(config, resolve_model(config.model), "cpu")
    parts = [part.split(" ==\n", 1) for part in ("\n\n" + text).split("\n\n== ")[1:]]
    return {title: body.splitlines() for title, body in parts}


def test_dry_run_shows_each_stage_and_its_rate(load: Load) -> None:
    """Iterations by hand: stage a 20; stage b 5,120 tokens in batches of 2 x 256."""
    shown = report(
        load(SPAN, *GOOD["a longer stage"], f"{OWN}.lr=5.0e-4", f"{OWN}.lr_decay_style=cosine",
             "schedule.lr_warmup_tokens=1000", "data.stages.1.train_only=[output_layer.*]")
    )  # fmt: skip
    stages = [line.split() for line in shown["stages"]]
    assert stages[1] == ["a", "1-20", "10,240", "64", "8", "10,000", "128", "all", "1"]
    assert stages[2] == ["b", "21-30", "5,120", "256", "2", "500,000", "256", "only", "output_layer.*", "2"]
    rate = shown["learning rate"]
    assert "stage a: WSD without decay" in rate and "stage b: cosine" in rate
    points = [
        (line.split("iteration")[0].strip(), line.split()[-2:]) for line in rate if " iteration " in line
    ]
    assert points == [
        ("first step", ["0", "0"]),
        ("end of warm-up", ["2", "0.001"]),
        ("last step", ["19", "0.001"]),
        ("first step", ["20", "0"]),
        ("end of warm-up", ["22", "0.0005"]),
        ("last step", ["29", f"{1e-4 + 4e-4 * 0.5 * (1 + cos(pi * 7 / 8)):.4g}"]),
    ]
    borders = next(line for line in rate if line.lstrip().startswith("stages"))
    begins = [n for n, mark in enumerate(borders.split("+")[1]) if mark == "|"]
    assert begins[0] == 0 and begins[1] == 41  # the first column at or after step 20 of 0..29 over 60 columns
    assert rate[-1].split() == ["a", "b"]


def test_dry_run_shows_a_growing_batch(load: Load) -> None:
    shown = report(load(*GOOD["ramp"]))
    assert "2 to 8 in 4 sizes" in shown["stages"][1] and "4 then 8" in shown["stages"][2]
    assert "global batch 4 samples = micro batch 1 x DP 1 x 4 micro-batches" in shown["batch"]
    assert "tokens per step: 8 x 64 = 512" in shown["batch"]
