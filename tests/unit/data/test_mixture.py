from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_syne.config.schema import DataConfig, RunConfig, SourceConfig, StageConfig, TrainConfig
from megatron_syne.data.mixture import interleave
from megatron_syne.data.mixture.planning import MixturePlan, plan_mixture
from megatron_syne.data.mixture.report import describe_plan, mixture_over_tokens, plan_table
from megatron_syne.data.mixture.shares import apportion
from megatron_syne.errors import ConfigError

ZH = {"web": 0.70, "encyclopedia": 0.05, "book": 0.20, "qa_forum": 0.05}
EN = {
    "web": 0.40,
    "encyclopedia": 0.05,
    "book": 0.15,
    "qa_forum": 0.05,
    "paper": 0.10,
    "math": 0.10,
    "code": 0.15,
}


def data_config(
    stages: list[tuple[str, int, dict[str, Any]]], sources: str, seq_length: int = 8
) -> DataConfig:
    return DataConfig(
        seq_length=seq_length,
        sources={name: SourceConfig(name) for name in sources.split()},
        stages=[StageConfig(*stage) for stage in stages],
    )


def build_plan(data: DataConfig, batch: int) -> MixturePlan:
    return plan_mixture(RunConfig(data=data, train=TrainConfig(global_batch_size=batch)))


def syne(batch: int = 512) -> MixturePlan:
    """Llama-3-SynE's two stages."""

    def group(language: str, share: float, of: dict[str, float]) -> dict[str, Any]:
        return {"share": share, "of": {f"{language}_{name}": value for name, value in of.items()}}

    names = [f"zh_{name}" for name in ZH] + [f"en_{name}" for name in EN] + ["synthesis"]
    adaptation = {"zh": group("zh", 0.2, ZH), "en": group("en", 0.8, EN)}
    enhancement = {"zh": group("zh", 0.1, ZH), "en": group("en", 0.7, EN), "synthesis": 0.2}
    stages = [("adaptation", 92_500_000_000, adaptation), ("enhancement", 7_500_000_000, enhancement)]
    return build_plan(data_config(stages, " ".join(names), 8192), batch)


def test_llama3_syne_totals() -> None:
    plan = syne()
    expected = {
        "web": 45.175,
        "encyclopedia": 4.925,
        "book": 15.7375,
        "qa_forum": 4.925,
        "paper": 7.925,
        "math": 7.925,
        "code": 11.8875,
        "synthesis": 1.5,
    }
    exact = dict.fromkeys(expected, 0.0)
    planned = dict.fromkeys(expected, 0.0)
    for column, source in enumerate(plan.sources):
        for stage, segment in zip(plan.stages, plan.segments, strict=True):
            kind = source.split("_", 1)[-1]
            exact[kind] += segment.shares[column] * stage.tokens_asked / 1e9
            planned[kind] += segment.counts[column] * segment.seq_length / 1e9
    assert exact == pytest.approx(expected, abs=1e-9)
    # whole global batches round the budgets up by at most 512 x 8192 = 4.2 M tokens a stage
    assert planned == pytest.approx(expected, abs=0.009)
    assert [stage.iterations for stage in plan.stages] == [22054, 1789]
    assert plan.num_samples == (22054 + 1789) * 512 and plan.train_iters == 23843


def test_millions_of_samples_are_quick_and_random_access_is_the_sequence() -> None:
    plan = syne()
    begin = time.process_time()
    near_the_end = [plan.locate(index) for index in range(plan.num_samples - 50_000, plan.num_samples)]
    assert time.process_time() - begin < 5
    assert near_the_end[-1].segment == 1
    assert [plan.locate(plan.num_samples - 50_000 + n) for n in (49_999, 0, 777)] == [
        near_the_end[n] for n in (49_999, 0, 777)
    ]


@st.composite
def counts_of_a_stage(draw: st.DrawFn) -> tuple[int, ...]:
    return tuple(draw(st.lists(st.integers(0, 400), min_size=1, max_size=12).filter(any)))


@settings(max_examples=60, deadline=None)
@given(counts_of_a_stage(), st.sampled_from([1, 3, 64, 8192]))
def test_every_prefix_is_near_its_shares_and_each_sample_comes_once(
    counts: tuple[int, ...], window: int
) -> None:
    total, used = sum(counts), sum(count > 0 for count in counts)
    seen = [0] * len(counts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interleave, "_WINDOW", window)
        interleave._window.cache_clear()
        places = [interleave.place(counts, position) for position in range(total)]
        before = [interleave.counts_before(counts, position) for position in range(total + 1)]
    interleave._window.cache_clear()
    for position, (source, index) in enumerate(places):
        assert index == seen[source]  # in order, none left out, none twice
        seen[source] += 1
        assert before[position + 1] == tuple(seen)
        for count, so_far in zip(counts, seen, strict=True):
            share = count / total
            assert abs(so_far - share * (position + 1)) <= (1 + share * used) / 2 + 1e-9
    assert tuple(seen) == counts


def test_order_does_not_change_silently() -> None:
    """Resumed runs depend on this order: a change of it is a change of format."""
    shares = {"a": 0.5, "b": 0.3, "c": 0.2}
    plan = build_plan(data_config([("s", 20 * 8, shares)], "a b c"), 4)
    # a at the places 1, 3, 5, ...; b at 1.7, 5, 8.3, ...; c at 2.5, 7.5, ...; the earlier source wins a tie
    assert "".join(plan.locate(n).source for n in range(20)) == "abcaabacbaabcaabacba"
    rounded_up = build_plan(data_config([("s", 153, shares)], "a b c"), 4)
    assert plan.segments == rounded_up.segments and plan.request != rounded_up.request


def test_stages_round_up_to_batches_and_sources_run_on() -> None:
    stages = [("one", 100, {"a": 0.5, "b": 0.5}), ("two", 8 * 8, {"b": 0.75, "c": 0.25})]
    plan = build_plan(data_config(stages, "a b c"), 4)
    assert [(s.first_sample, s.samples, s.iterations) for s in plan.stages] == [(0, 16, 4), (16, 8, 2)]
    located = [plan.locate(n) for n in range(plan.num_samples)]
    assert [at.segment for at in located] == [0] * 16 + [1] * 8
    for source, count in (("a", 8), ("b", 14), ("c", 2)):
        assert [at.position for at in located if at.source == source] == list(range(0, 8 * count, 8))
        assert plan.samples_of(source) == count
    for outside in (-1, 24):
        with pytest.raises(IndexError):
            plan.locate(outside)


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=30), st.integers(1, 10**7))
def test_apportion(weights: list[float], total: int) -> None:
    shares = [weight / math.fsum(weights) for weight in weights]
    counts = apportion(shares, total)
    assert sum(counts) == total
    assert all(abs(count - share * total) < 1 + 1e-6 for count, share in zip(counts, shares, strict=True))


def test_a_source_in_two_groups_gets_the_sum() -> None:
    inner = {"a": 0.2, "z": {"share": 0.8, "of": {"b": 1}}}
    mix = {"x": {"share": 0.5, "of": {"a": 1.0}}, "y": {"share": 0.5, "of": inner}}
    plan = build_plan(data_config([("s", 80, mix)], "a b"), 1)
    assert plan.segments[0].shares == pytest.approx((0.6, 0.4))


@pytest.mark.parametrize(
    ("mix", "part"),
    [
        ({}, r"data\.stages\[0\] \(s\)\.mixture: must name at least one"),
        ({"a": 0.5, "b": 0.4}, r"mixture: shares must sum to 1, found a 0.5 \+ b 0.4 = 0.9"),
        ({"g": {"share": 1, "of": {"a": 0.5, "b": 0.6}}}, r"mixture\.g\.of: shares must sum to 1"),
        ({"a": 0.0, "b": 1.0}, r"mixture\.a: a share must be above 0"),
        ({"a": -0.5, "b": 1.0}, r"mixture\.a: a share must be above 0 and at most 1, found -0.5"),
        ({"a": float("nan"), "b": 1.0}, r"mixture\.a: .*found nan"),
        ({"a": float("inf")}, r"mixture\.a"),
        ({"a": True}, r"mixture\.a: a share is a number, found True"),
        ({"a": "1"}, r"mixture\.a: a share is a number, found '1'"),
        ({"a": None}, r"mixture\.a"),
        ({"alpha_web": 1.0}, r"no source of this name in data\.sources; did you mean alpha_webs\?"),
        ({"q": 1.0}, r"mixture\.q: no source of this name.*known: a, b, alpha_webs"),
        ({"g": {"share": 1.0}}, r"mixture\.g: a group needs of"),
        ({"g": {"share": 1.0, "of": {}}}, r"mixture\.g\.of: must name at least one"),
        ({"g": {"share": 1.0, "of": {"a": 1.0}, "off": 1}}, r"mixture\.g: .*found \['off'\]"),
    ],
)
def test_bad_mixtures_name_stage_and_field(mix: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        build_plan(data_config([("s", 80, mix)], "a b alpha_webs"), 1)


def test_bad_stages() -> None:
    good = {"a": 1.0}
    for stages, part in (
        ([], "no stage"),
        ([("", 8, good)], r"stages\[0\] \(no name\)\.name"),
        ([("s", 8, good), ("s", 8, good)], r"stages\[1\] \(s\)\.name: stage 0 has this name"),
        ([("s", 0, good)], r"\(s\)\.tokens: must be at least 1"),
        ([("s", 10**14, good)], "cut it into stages"),
    ):
        with pytest.raises(ConfigError, match=part):
            build_plan(data_config(stages, "a"), 1)


def test_table_and_numbers() -> None:
    mix = {"a": 0.7, "b": 0.299, "c": 0.001}
    plan = build_plan(data_config([("one", 800, mix), ("two", 800, mix)], "a b c d"), 4)
    known = {"a": 400, "b": 10**6}
    numbers = describe_plan(plan, known)
    first, second = (stage["sources"] for stage in numbers["stages"])
    assert first["a"] == {
        "share": 0.7, "samples": 70, "tokens": 560, "epochs": 1.4, "epochs_so_far": 1.4
    }  # fmt: skip
    assert (second["a"]["epochs"], second["a"]["epochs_so_far"]) == (pytest.approx(1.4), 2.8)
    assert first["c"] == {"share": 0.001, "samples": 0, "tokens": 0, "epochs": None, "epochs_so_far": None}
    assert "d" not in first
    assert numbers["tokens"] == 1600 and numbers["train_iters"] == 50
    assert numbers["sources"]["a"] == {"tokens": 1120, "epochs": 2.8, "unread": 0}
    assert numbers["sources"]["b"]["unread"] == 10**6 - 480 and numbers["sources"]["d"]["unread"] is None
    lines = plan_table(plan, known).splitlines()
    assert [line for line in lines if "repeats" in line] == [lines[2], lines[6]]
    assert "2.80  repeats" in lines[6]
    assert "never read" in lines[4] and "?" in lines[4]
    assert "25 iterations of sequences of 8" in lines[1] and "50 iterations" in lines[-2]
    assert lines[-1] == "tokens never read: b 999,520"


def test_mixture_over_tokens_is_level_within_a_segment() -> None:
    stages = [("one", 64, {"a": 0.5, "b": 0.5}), ("two", 32, {"b": 0.75, "c": 0.25})]
    plan = build_plan(data_config(stages, "a b c d"), 4)
    tokens, shares = mixture_over_tokens(plan.with_shares(4, {"a": 0.75, "b": 0.25}, "test"))
    assert tokens.tolist() == [0, 32, 32, 64, 64, 96]
    assert {name: row.tolist() for name, row in shares.items()} == {
        "a": [0.5, 0.5, 0.75, 0.75, 0, 0],
        "b": [0.5, 0.5, 0.25, 0.25, 0.75, 0.75],
        "c": [0, 0, 0, 0, 0.25, 0.25],
    }


def test_mock_plan() -> None:
    config = RunConfig(
        data=DataConfig(mock=True, seq_length=8), train=TrainConfig(train_iters=5, global_batch_size=4)
    )
    plan = plan_mixture(config)
    assert (plan.train_iters, plan.num_samples, plan.locate(19)) == (5, 20, (0, "mock", 19 * 8))
    config.train.train_iters = None
    with pytest.raises(ConfigError, match=r"train\.train_iters"):
        plan_mixture(config)


def test_needs_no_torch(repository: Path) -> None:
    code = "import sys, megatron_syne.data.mixture.planning; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=repository).returncode == 0


def test_locations_do_not_depend_on_what_was_asked_before() -> None:
    plan = syne()
    asked = np.random.default_rng(0).integers(0, plan.num_samples, 30).tolist()
    once = [plan.locate(n) for n in asked]
    interleave._window.cache_clear()
    interleave._places_before.cache_clear()
    assert [plan.locate(n) for n in asked[::-1]] == once[::-1]
