"""The record in a checkpoint: back as it was, damage refused by name, and what may change on a resume."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_syne.config.schema import DataConfig, RunConfig, SourceConfig, StageConfig, TrainConfig
from megatron_syne.data.mixture.ledger import check_ledger, check_sources, make_ledger, source_options
from megatron_syne.data.mixture.planning import MixturePlan, plan_mixture, resume_plan
from megatron_syne.data.mixture.supply import check_supply
from megatron_syne.errors import ConfigError, DataError

FACTS = {
    "a": {"bin_sha256": "1" * 64, "idx_sha256": "2" * 64, "options": source_options(SourceConfig("a"))},
    "b": {"bin_sha256": "3" * 64, "idx_sha256": "4" * 64, "options": source_options(SourceConfig("b"))},
}


def config() -> RunConfig:
    stages = [
        StageConfig("one", 640, {"a": 0.75, "b": 0.25}),
        StageConfig("two", 640, {"b": 0.5, "c": 0.5}, seq_length=16),
    ]
    data = DataConfig(seq_length=8, sources={name: SourceConfig(name) for name in "abc"}, stages=stages)
    return RunConfig(data=data, train=TrainConfig(global_batch_size=4))


def stored(plan: MixturePlan, sample: int) -> dict[str, Any]:
    ledger: dict[str, Any] = json.loads(json.dumps(make_ledger(plan, sample, FACTS)))
    check_ledger(ledger, sample)
    return ledger


def located(plan: MixturePlan, first: int = 0) -> list[tuple[str, int, int]]:
    """(source, place in its stream, tokens) of each sample."""
    places = [plan.locate(n) for n in range(first, plan.num_samples)]
    return [(at.source, at.position, plan.segments[at.segment].seq_length) for at in places]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 29), st.integers(1, 9), st.integers(1, 9)), max_size=4))
def test_a_plan_comes_back_from_json_with_all_its_changes(changes: list[tuple[int, int, int]]) -> None:
    plan = plan_mixture(config())
    for batch, one, other in sorted(changes):
        used = ("a", "b") if plan.stage_at(batch * 4) == "one" else ("b", "c")
        shares = dict(zip(used, (one / (one + other), other / (one + other)), strict=True))
        before = located(plan)[: batch * 4]
        plan = plan.with_shares(batch * 4, shares, "test")
        assert located(plan)[: batch * 4] == before
        assert plan.num_samples == 120 and sum(plan.consumed(120).values()) == plan.num_tokens == 1280
    again = MixturePlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan and located(again) == located(plan)


def test_counters_are_what_was_located() -> None:
    plan = plan_mixture(config()).with_shares(40, {"a": 0.5, "b": 0.5}, "test")
    ledger = make_ledger(plan, 100, FACTS)
    count: dict[str, dict[str, dict[str, int]]] = {"one": {}, "two": {}}
    for sample in range(100):
        row = count[plan.stage_at(sample)].setdefault(plan.locate(sample).source, {"samples": 0, "tokens": 0})
        row["samples"] += 1
        row["tokens"] += plan.seq_length_at(sample)
    assert ledger["counters"] == count
    assert ledger["seed"] == 1234 and ledger["consumed_samples"] == 100 and ledger["sources"] == FACTS
    assert make_ledger(plan, 0, {}, previous=ledger)["sources"] == FACTS  # of what is not open any more too


def put(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(record: dict[str, Any]) -> None:
        at: Any = record
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (put("version", value=2), "data.version: expected 1, found 2"),
        (put("seed", value=7), "data.seed: 7 is not that of data.plan"),
        (put("seed", value="x"), "data.seed: expected int"),
        (put("consumed_samples", value=44), "data.consumed_samples: expected 40"),
        (put("counters", "one", "a", "tokens", value=0), "data.counters: do not follow"),
        (put("sources", value=[]), "data.sources: expected dict"),
        (put("plan", value=None), "data.plan: expected an object"),
        (put("plan", "sources", 0, value=3), r"data.plan.sources\[0\]: expected str, found 3"),
        (put("plan", "sources", value=["a"]), r"data.plan.asked\[0\].shares: \['b'\] not in"),
        (put("plan", "packing", value="tight"), "data.plan.packing: expected concatenated or best_fit"),
        (put("plan", "asked", 0, "tokens", value=650), "data.plan.request: is not the digest"),
        (put("plan", "asked", 0, "name", value="uno"), r"segments\[0\].stage: 'one' is not in"),
        (put("plan", "segments", value=[]), "data.plan.segments: empty"),
        (put("plan", "segments", 0, value={}), r"data.plan.segments\[0\].stage: missing"),
        (put("plan", "segments", 0, "counts", value=[60, 20]), r"segments\[0\].counts: expected 3 numbers"),
        (put("plan", "segments", 0, "counts", value=[59, 20, 1]), r"segments\[1\].bases: expected"),
        (put("plan", "segments", 0, "counts", value=[60, 20, 1]), r"segments\[0\].counts: are not what the|bases"),
        (put("plan", "segments", 0, "counts", 0, value=True), r"counts\[0\]: expected int, found True"),
        (put("plan", "segments", 0, "counts", 0, value=-1), r"counts\[0\]: expected a number of at least 0"),
        (put("plan", "segments", 0, "samples", value=84), r"segments\[0\].samples: expected .* 80, found 84"),
        (put("plan", "segments", 0, "global_batch_size", value=0), "must be at least 1, found 0"),
        (put("plan", "segments", 1, "first_sample", value=84), r"segments\[1\].first_sample: expected 80"),
        (put("plan", "segments", 1, "bases", 1, value=0), r"segments\[1\].bases: expected \[480, 0|bases"),
    ],
)  # fmt: skip
def test_damaged_records_are_refused_by_the_field(
    damage: Callable[[dict[str, Any]], None], part: str
) -> None:
    record = stored(plan_mixture(config()), 40)
    damage(record)
    with pytest.raises(DataError, match=part):
        check_ledger(record, 40)


def test_a_cut_segment_cannot_be_made_longer_than_its_pattern() -> None:
    plan = plan_mixture(config()).with_shares(40, {"a": 0.5, "b": 0.5}, "test")
    record = stored(plan, 40)
    record["plan"]["segments"][0]["pattern"] = [1, 1, 0]
    with pytest.raises(DataError, match=r"segments\[0\].pattern: its sum 2 does not reach 40"):
        check_ledger(record, 40)


def test_changed_files_and_options_are_caught_where_they_were_read() -> None:
    ledger = stored(plan_mixture(config()), 40)  # read from a and b, not yet from c
    check_sources(ledger, FACTS | {"c": {"bin_sha256": "new"}})
    other = copy.deepcopy(FACTS)
    other["a"]["bin_sha256"], other["b"]["idx_sha256"] = "5" * 64, "6" * 64
    with pytest.raises(
        DataError, match=r"(?s)sources.a: bin_sha256 was 1{12}\.\.\., now 5.*sources.b: idx_sha256"
    ):
        check_sources(ledger, other)
    other = copy.deepcopy(FACTS)
    other["a"]["options"]["order"] = "ordered"
    with pytest.raises(ConfigError, match=r"data.sources.a.order: shuffled -> ordered"):
        check_sources(ledger, other)
    unread = stored(plan_mixture(config()), 0)
    check_sources(unread, other)


# --- going on with another configuration ----------------------------------------------------------------------


def test_nothing_changed_is_the_same_plan_with_its_reweighting() -> None:
    plan = plan_mixture(config()).with_shares(40, {"a": 0.5, "b": 0.5}, "re-weighting")
    assert resume_plan(config(), stored(plan, 60), 60) == (plan, [])
    reordered = config()
    reordered.data.sources = dict(reversed(reordered.data.sources.items()))
    reordered.data.stages[0].mixture = {"b": 0.25, "a": 0.75}
    assert resume_plan(reordered, stored(plan, 60), 60) == (plan, [])


def test_another_batch_keeps_the_past_the_budgets_and_moved_shares() -> None:
    plan = plan_mixture(config()).with_shares(40, {"a": 0.5, "b": 0.5}, "re-weighting")
    changed = config()
    changed.train.global_batch_size = 8
    again, words = resume_plan(changed, stored(plan, 60), 60)
    assert words == ["train.global_batch_size 4 -> 8"]
    assert located(again)[:60] == located(plan)[:60]
    assert [(s.first_sample, s.samples, s.global_batch_size) for s in again.segments] == [
        (0, 40, 4), (40, 20, 4), (60, 24, 8), (84, 40, 8)
    ]  # fmt: skip
    assert again.segments[2].shares == (0.5, 0.5, 0.0)
    assert again.segments[2].reason == "train.global_batch_size 4 -> 8"
    assert again.train_iters == 10 + 5 + 3 + 5
    # shares that re-weighting moved at the very sample where the run stopped go on too
    at_once = plan_mixture(config()).with_shares(60, {"a": 0.25, "b": 0.75}, "re-weighting")
    again, _ = resume_plan(changed, stored(at_once, 60), 60)
    assert again.segments[1].shares == (0.25, 0.75, 0.0)


def test_another_mixture_of_the_stage_that_was_reached() -> None:
    plan = plan_mixture(config())
    changed = config()
    changed.data.sources = {"new": SourceConfig("new"), **changed.data.sources}
    changed.data.stages[0].mixture = {"new": 0.5, "b": 0.5}
    changed.data.stages[0].tokens = 800
    again, words = resume_plan(changed, stored(plan, 40), 40)
    assert words == [
        "stage one: tokens 640 -> 800",
        "stage one: share of a 0.75 -> 0",
        "stage one: share of b 0.25 -> 0.5",
        "stage one: share of new 0 -> 0.5",
    ]
    assert again.sources == ("a", "b", "c", "new")  # the columns of the past stay
    assert located(again)[:40] == located(plan)[:40]
    rest = located(again, 40)[:60]
    assert {source for source, _, _ in rest} == {"b", "new"} and len(rest) == 60
    assert [at for source, at, _ in rest if source == "b"] == list(range(10 * 8, 40 * 8, 8))
    assert [at for source, at, _ in rest if source == "new"] == list(range(0, 30 * 8, 8))
    # and once more, from the changed run
    assert resume_plan(changed, stored(again, 44), 44) == (again, [])


def test_a_change_of_what_comes_leaves_the_stage_that_was_reached_alone() -> None:
    plan = plan_mixture(config())
    changed = config()
    changed.data.stages[1].tokens = 1280
    changed.data.stages.append(StageConfig("three", 64, {"a": 1.0}))
    again, words = resume_plan(changed, stored(plan, 40), 40)
    assert words == ["stage two: tokens 640 -> 1280", "stage three added"]
    assert again.segments[0] == plan.segments[0]
    assert [segment.reason for segment in again.segments] == ["configuration"] * 3
    del changed.data.stages[1:]
    again, words = resume_plan(changed, stored(plan, 40), 40)
    assert words == ["stage two removed"] and again.num_samples == 80


def test_a_complete_run_is_trained_on_by_a_larger_budget() -> None:
    plan = plan_mixture(config())
    changed = config()
    changed.data.stages[1].tokens = 800
    again, words = resume_plan(changed, stored(plan, 120), 120)
    assert words == ["stage two: tokens 640 -> 800"]
    assert located(again)[:120] == located(plan) and again.num_samples == 120 + 12


def test_the_mixture_of_a_stage_that_just_ended_is_past() -> None:
    changed = config()
    changed.data.stages[0].mixture = {"b": 1.0}
    with pytest.raises(ConfigError, match=r"data\.stages\.0 is over: stage one: share of a 0\.75 -> 0"):
        resume_plan(changed, stored(plan_mixture(config()), 80), 80)
    changed.data.stages[0].tokens = 672  # with more to train it goes on, in the new mixture
    again, _ = resume_plan(changed, stored(plan_mixture(config()), 80), 80)
    assert [(s.stage, s.counts) for s in again.segments][1] == ("one", (0, 4, 0))


def test_a_budget_that_is_used_up_already_ends_the_stage() -> None:
    changed = config()
    changed.data.stages[0].tokens = 320
    again, words = resume_plan(changed, stored(plan_mixture(config()), 40), 40)
    assert words == ["stage one: tokens 640 -> 320"] and again.stage_at(40) == "two"


def test_a_new_default_length_is_meant_for_what_comes() -> None:
    plan = plan_mixture(config())
    changed = config()
    changed.data.seq_length = 32
    again, words = resume_plan(changed, stored(plan, 40), 40)
    assert words == ["stage one: seq_length 8 -> 32"] and again.segments[1].samples == 12
    assert resume_plan(changed, stored(plan, 100), 100) == (plan, [])


def test_before_the_first_sample_everything_may_change() -> None:
    changed = config()
    changed.data.packing = "best_fit"
    changed.data.stages = changed.data.stages[1:]
    again, words = resume_plan(changed, stored(plan_mixture(config()), 0), 0)
    assert again == plan_mixture(changed) and words == [
        "data.packing concatenated -> best_fit",
        "stage one removed",
    ]


def test_the_past_cannot_change_and_all_of_it_is_told() -> None:
    changed = config()
    changed.train.seed = 7
    changed.data.packing = "best_fit"
    changed.data.stages[0].tokens = 720
    changed.data.stages[0].mixture = {"b": 1.0}
    del changed.data.sources["a"]
    with pytest.raises(ConfigError) as caught:
        resume_plan(changed, stored(plan_mixture(config()), 100), 100)
    text = str(caught.value)
    for part in (
        "has trained 100 samples",
        "train.seed: 1234 -> 7",
        "data.stages.0 is over: stage one: tokens 640 -> 720",
        "data.stages.0 is over: stage one: share of a 0.75 -> 0",
        "data.packing: concatenated -> best_fit",
        "data.sources.a is not there, but was read from (it may have no share)",
    ):
        assert part in text, text
    changed = config()
    changed.data.stages.reverse()
    with pytest.raises(ConfigError, match="stage one was trained as number 0 and must stay there"):
        resume_plan(changed, stored(plan_mixture(config()), 100), 100)


def test_samples_that_are_no_whole_batches_are_refused() -> None:
    with pytest.raises(DataError, match="42 samples are no whole number"):
        resume_plan(config(), stored(plan_mixture(config()), 42), 42)


def test_mock_runs_count_iterations() -> None:
    mock = RunConfig(
        data=DataConfig(mock=True, seq_length=8), train=TrainConfig(train_iters=10, global_batch_size=4)
    )
    plan = plan_mixture(mock)
    mock.train.global_batch_size = 8
    again, words = resume_plan(mock, stored(plan, 16), 16)
    assert again.train_iters == 10 and again.num_samples == 16 + 6 * 8 and words[0].startswith("train.global")
    assert resume_plan(mock, stored(again, 32), 32) == (again, [])
    mock.train.train_iters = 12
    assert resume_plan(mock, stored(again, 32), 32)[0].train_iters == 12


def test_a_source_lasts_for_exactly_its_epochs() -> None:
    """Stage one reads 480 tokens of a and 160 of b, stage two 320 of b and 320 of c."""
    run, plan = config(), plan_mixture(config())
    check_supply(plan, {"a": 480, "b": 480}, run)
    for counts, part in (
        ({"a": 479}, "a .*: needs 480 tokens and has 479"),
        ({"b": 0}, "b .*inf epochs.*add text"),
    ):
        with pytest.raises(ConfigError, match=part):
            check_supply(plan, counts, run)
    run.data.sources["a"].max_epochs = 1.5
    check_supply(plan, {"a": 320}, run)
    run.data.sources["b"].max_epochs = math.inf
    check_supply(plan, {"b": 1}, run)


# --- new shares on the way ------------------------------------------------------------------------------------


def test_new_shares_hold_from_their_sample_on_and_for_their_stage_alone() -> None:
    plan = plan_mixture(config())
    moved = plan.with_shares(40, {"a": 0.25, "b": 0.75}, "re-weighting web")
    assert [(s.stage, s.first_sample, s.counts) for s in moved.segments] == [
        ("one", 0, (30, 10, 0)), ("one", 40, (10, 30, 0)), ("two", 80, (0, 20, 20))
    ]  # fmt: skip
    assert moved.segments[1].reason == "re-weighting web"
    assert moved.request == plan.request and moved.stages == plan.stages
    assert plan.with_shares(0, {"a": 0.25, "b": 0.75}, "x").segments[0].counts == (20, 60, 0)
    assert plan.with_shares(80, {"b": 0.25, "c": 0.75}, "x").segments[1].counts == (0, 10, 30)


def test_new_shares_take_the_place_of_all_that_was_planned_behind_them_in_the_stage() -> None:
    plan = plan_mixture(config()).with_shares(60, {"a": 0.25, "b": 0.75}, "later")
    moved = plan.with_shares(40, {"a": 0.5, "b": 0.5}, "now")
    assert [(s.stage, s.first_sample, s.reason) for s in moved.segments] == [
        ("one", 0, "configuration"), ("one", 40, "now"), ("two", 80, "configuration")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("sample", "shares", "part"),
    [
        (42, {"a": 0.5, "b": 0.5}, "not the first of a global batch"),
        (40, {"a": 0.5}, "must sum to 1, found 0.75"),
        (40, {"a": 0.5, "b": 0.25, "c": 0.25}, "source c in stage one: not a share of one that it reads"),
        (40, {"q": 1.0}, "source q"),
        (40, {"a": 1.5, "b": -0.5}, "share -0.5 of source b"),
        (40, {"a": float("nan")}, "share nan of source a"),
    ],
)
def test_shares_that_cannot_be_are_refused(sample: int, shares: dict[str, float], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        plan_mixture(config()).with_shares(sample, shares, "test")


def test_many_changes_stay_quick() -> None:
    """A run re-weighted 500 times over 20 sources: its plan is small and a location costs no more."""
    names = [f"s{n}" for n in range(20)]
    data = DataConfig(
        seq_length=8192,
        sources={name: SourceConfig(name) for name in names},
        stages=[StageConfig("one", 10**11, {name: 0.05 for name in names})],
    )
    plan = plan_mixture(RunConfig(data=data, train=TrainConfig(global_batch_size=512)))
    step = plan.train_iters // 500 * 512
    for n in range(1, 500):
        shares = {"s0": 0.05 + 1e-4 * (n % 7), "s1": 0.05 - 1e-4 * (n % 7)}
        plan = plan.with_shares(n * step, shares, "re-weighting")
    assert len(plan.segments) == 500
    record = json.dumps(plan.to_dict())
    assert len(record) < 2_000_000
    assert MixturePlan.from_dict(json.loads(record)) == plan
    assert sum(plan.consumed(plan.num_samples).values()) == plan.num_tokens
    for sample in (0, plan.num_samples // 2, plan.num_samples - 1):
        assert plan.consumed(sample + 1)[plan.locate(sample).source] == plan.locate(sample).position + 8192
