"""Global batches that change: the ramp against the engine's own calculator, per stage, on a resume; and branches."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_syne.config.schema import DataConfig, RunConfig, SourceConfig, StageConfig, TrainConfig
from megatron_syne.config.stages import leg_config, legs, stage_batch
from megatron_syne.data.mixture.ledger import make_ledger
from megatron_syne.data.mixture.planning import MixturePlan, branch_plan, plan_mixture, resume_plan
from megatron_syne.data.mixture.ramp import batch_at
from megatron_syne.errors import ConfigError


def config(*stages: StageConfig, **train: Any) -> RunConfig:
    data = DataConfig(seq_length=8, sources={n: SourceConfig(n) for n in "abc"}, stages=list(stages))
    return RunConfig(data=data, train=TrainConfig(**{"global_batch_size": 8, **train}))


def stage(name: str, samples: int, **own: Any) -> StageConfig:
    return StageConfig(name, samples * 8, {"a": 0.75, "b": 0.25}, **own)


def batches(plan: MixturePlan, first: int = 0) -> list[int]:
    """Global batch of each step."""
    found, at = [], first
    while at < plan.num_samples:
        found.append(plan.segment_at(at).global_batch_size)
        at += found[-1]
    assert at == plan.num_samples
    return found


def ledger(plan: MixturePlan, sample: int) -> Any:
    return json.loads(json.dumps(make_ledger(plan, sample, {})))


@pytest.mark.parametrize(
    "ramp", [(4, 4, 100), (2, 2, 7), (8, 8, 1), (4, 12, 333), (16, 16, 5000), (2, 2, 1001), (12, 4, 97)]
)
def test_a_ramp_is_the_engines_at_every_step(ramp: tuple[int, int, int]) -> None:
    calculators = pytest.importorskip("megatron.core.num_microbatches_calculator")
    target = ramp[0] + 6 * ramp[1]
    engine = calculators.RampupBatchsizeNumMicroBatchesCalculator(
        target, 1, 2, False, 1, ramp[0], ramp[1], ramp[2]
    )
    plan = plan_mixture(
        config(stage("one", 4 * ramp[2] + 500), global_batch_size=target, rampup_batch_size=list(ramp))
    )
    at = 0
    for batch in batches(plan):
        engine.update(at, True)
        assert batch == engine.get_current_global_batch_size() == batch_at(at, target, ramp), at
        at += batch
    assert batches(plan)[-1] == target


def test_sources_have_their_shares_of_the_stage_whatever_its_batches() -> None:
    """Twenty steps of a ramp, each of too few samples for the small source to have its own in every one."""
    small = StageConfig("one", 4000, {"a": 0.97, "b": 0.03}, rampup_batch_size=[1, 1, 400])
    plan = plan_mixture(config(small, global_batch_size=21))
    assert len(plan.segments) > 15 and {s.reason for s in plan.segments[1:]} == {"ramp"}
    b = sum(segment.counts[1] for segment in plan.segments)
    assert b == round(0.03 * plan.num_samples) and plan.stages[0].tokens - 4000 < 21 * 8
    for segment in plan.segments:
        so_far = sum(each.counts[1] for each in plan.segments if each.end <= segment.end)
        assert abs(so_far - 0.03 * segment.end) <= 1
    assert MixturePlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert [plan.iteration_at(plan.sample_at(n)) for n in range(plan.train_iters)] == list(
        range(plan.train_iters)
    )


def test_a_stage_has_its_own_batches_and_the_first_the_runs_ramp() -> None:
    run = config(stage("one", 40), stage("two", 40, global_batch_size=4, micro_batch_size=1), stage("three", 16),
                 micro_batch_size=2, rampup_batch_size=[4, 4, 8])  # fmt: skip
    plan = plan_mixture(run)
    assert batches(plan) == [4, 4] + [8] * 4 + [4] * 10 + [8] * 2
    assert [segment.micro_batch_size for segment in plan.segments] == [2, 2, 1, 2]
    assert stage_batch(run, 0) == (2, 8, (4, 4, 8)) and stage_batch(run, 1) == (1, 4, ())
    assert leg_config(run, "two").train.micro_batch_size == 1 and run.train.micro_batch_size == 2


def test_a_ramp_goes_on_where_it_was_when_the_mixture_changes() -> None:
    run = config(stage("one", 200, rampup_batch_size=[2, 2, 60]))
    plan = plan_mixture(run)
    before = batches(plan)
    sample = sum(before[:10])
    run.data.stages[0].mixture = {"b": 1.0}
    again, words = resume_plan(run, ledger(plan, sample), sample)
    assert words == ["stage one: share of a 0.75 -> 0", "stage one: share of b 0.25 -> 1"]
    assert batches(again) == before and batches(again, sample) == before[10:]
    moved = plan.with_shares(sample, {"a": 0.5, "b": 0.5}, "re-weighting")
    assert batches(moved) == before
    assert moved.segment_at(sample).reason == "re-weighting" and moved.segments[-1].shares == (0.5, 0.5, 0.0)


def test_a_new_batch_of_one_stage_or_of_all() -> None:
    run = config(stage("one", 80), stage("two", 80), stage("three", 80, global_batch_size=8))
    plan = plan_mixture(run)
    run.data.stages[1].global_batch_size = 16
    again, words = resume_plan(run, ledger(plan, 40), 40)
    assert words == ["stage two: global_batch_size 8 -> 16"] and again.segments[0] == plan.segments[0]
    assert batches(again) == [8] * 10 + [16] * 5 + [8] * 10
    run.data.stages[1].global_batch_size = None
    run.train.global_batch_size = 4
    again, words = resume_plan(run, ledger(plan, 40), 40)
    assert words == ["train.global_batch_size 8 -> 4"]
    assert batches(again) == [8] * 5 + [4] * 30 + [8] * 10  # stage three has its own
    assert resume_plan(run, ledger(again, 60), 60) == (again, [])
    run.data.stages[0].global_batch_size = 16
    with pytest.raises(ConfigError, match=r"data\.stages\.0 is over: stage one: global_batch_size 8 -> 16"):
        resume_plan(run, ledger(plan, 80), 80)


def test_the_micro_batch_is_the_configurations_and_moves_no_sample() -> None:
    run = config(stage("one", 80), micro_batch_size=4)
    plan = plan_mixture(run)
    run.train.micro_batch_size = 2
    again, words = resume_plan(run, ledger(plan, 40), 40)
    assert words == [] and [segment.micro_batch_size for segment in again.segments] == [2]
    assert [again.locate(n) for n in range(80)] == [plan.locate(n) for n in range(80)]


def test_an_account_from_before_stages_had_batches_is_read() -> None:
    plan = plan_mixture(config(stage("one", 40), stage("two", 40)))
    old = ledger(plan, 16)
    del old["plan"]["inherited"]
    for each in old["plan"]["asked"]:
        del each["global_batch_size"], each["rampup_batch_size"]
    for each in old["plan"]["segments"]:
        del each["micro_batch_size"]
    run = config(stage("one", 40), stage("two", 40), micro_batch_size=2)
    again, words = resume_plan(run, old, 16)
    assert words == [] and again.asked == plan.asked
    assert [segment.micro_batch_size for segment in again.segments] == [2, 2]


@pytest.mark.parametrize(
    ("ramp", "part"),
    [
        ([4, 4], r"expected \[start, increment, samples\], each at least 1, found \[4, 4\]"),
        ([4, 0, 9], "each at least 1"),
        ([8, 4, 9], "start 8 must be below the global batch 8"),
        ([2, 4, 9], "increment 4 does not lead from 2 to the global batch 8; nearest legal: 3 or 6"),
    ],
)
def test_what_is_no_ramp_is_refused(ramp: list[int], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        plan_mixture(config(stage("one", 40, rampup_batch_size=ramp)))


def test_fewer_tokens_than_trained_would_run_backwards() -> None:
    plan = plan_mixture(config(stage("one", 80), stage("two", 80)))
    run = config(stage("one", 20), stage("two", 80))
    with pytest.raises(
        ConfigError, match="has trained 320 tokens, more than the 160 now given; it cannot run back"
    ):
        resume_plan(run, ledger(plan, 40), 40)
    run.data.stages[0].tokens = 320  # what the message says ends it here
    assert resume_plan(run, ledger(plan, 40), 40)[0].stage_at(40) == "two"
    mock = RunConfig(
        data=DataConfig(mock=True, seq_length=8),
        train=TrainConfig(train_iters=10, rampup_batch_size=[4, 4, 8]),
    )
    plan = plan_mixture(mock)
    assert plan.train_iters == 10 and batches(plan) == [4, 4] + [8] * 8
    mock.train.train_iters = 3
    with pytest.raises(ConfigError, match=r"train\.train_iters: stage mock has trained"):
        resume_plan(mock, ledger(plan, 32), 32)


# --- legs and branches ------------------------------------------------------------------------------------------


def test_stages_that_need_another_engine_begin_a_leg_and_values_carry_on() -> None:
    run = config(stage("a", 8), stage("b", 8, seq_length=16, global_batch_size=4), stage("c", 8, rotary_base=5e5),
                 stage("d", 8), stage("e", 8, train_only=["embedding.*"]), stage("f", 8),
                 stage("g", 8, reset_optimizer=True), stage("h", 8, max_position_embeddings=64))  # fmt: skip
    assert legs(run) == [["a", "b"], ["c", "d"], ["e"], ["f"], ["g"], ["h"]]
    assert [leg_config(run, name).model.rotary_base for name in "abcdeh"] == [None, None, 5e5, 5e5, 5e5, 5e5]
    assert leg_config(run, "e").optimizer.train_only == ["embedding.*"]
    assert leg_config(run, "f").optimizer.train_only == []
    with pytest.raises(ConfigError, match="no stage 'z'; there are a, b"):
        leg_config(run, "z")


def test_a_branch_takes_up_every_source_and_is_then_a_run_like_any() -> None:
    stable = plan_mixture(config(stage("one", 80), stage("two", 80)))
    run = config(StageConfig("decay", 320, {"a": 0.5, "c": 0.5}))
    del run.data.sources["b"]
    run.data.sources["b"] = SourceConfig("b")
    plan = branch_plan(run, ledger(stable, 120), 120)
    assert [(s.stage, s.first_sample, s.samples, s.reason) for s in plan.segments] == [
        ("one", 0, 80, "configuration"), ("two", 80, 40, "configuration"), ("decay", 120, 40, "branch")
    ]  # fmt: skip
    assert [plan.locate(n) for n in range(120)] == [stable.locate(n) for n in range(120)]
    assert plan.segments[-1].bases == (90 * 8, 30 * 8, 0) and plan.inherited == 2
    assert [s.tokens_asked for s in plan.stages] == [640, 320, 320]
    # an ordinary resume; its own stages may change, and it may be branched off itself
    assert resume_plan(run, ledger(plan, 136), 136) == (plan, [])
    run.data.stages.append(stage("more", 8))
    again, words = resume_plan(run, ledger(plan, 136), 136)
    assert words == ["stage more added"] and again.inherited == 2
    twig = branch_plan(config(stage("twig", 16)), ledger(plan, 136), 136)
    assert [s.stage for s in twig.segments] == ["one", "two", "decay", "twig"] and twig.inherited == 3
    run.data.stages[0].tokens = 8
    with pytest.raises(ConfigError, match=r"data\.stages\.0\.tokens: stage decay has trained 128 tokens"):
        resume_plan(run, ledger(plan, 136), 136)


def test_a_branch_that_cannot_be_is_refused() -> None:
    stable = plan_mixture(config(stage("one", 80)))
    for run, part in (
        (config(stage("one", 8)), "'one' is a stage of the run that this one branched off"),
        (config(stage("new", 8), seed=7), "train.seed: 1234 -> 7"),
    ):
        with pytest.raises(ConfigError, match=part):
            branch_plan(run, ledger(stable, 40), 40)
    gone = config(StageConfig("new", 64, {"c": 1.0}))
    del gone.data.sources["a"]
    gone.data.packing = "best_fit"
    with pytest.raises(
        ConfigError, match=r"packing: concatenated -> best_fit\n.*sources.a is not there, but was read"
    ):
        branch_plan(gone, ledger(stable, 40), 40)
