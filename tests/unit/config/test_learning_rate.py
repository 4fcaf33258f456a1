"""Every schedule against its formula at every step, megatron-core's own scheduler, and Llama-3-SynE's lambda."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_syne.config.learning_rate import LearningRate
from megatron_syne.config.schema import (
    DataConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    SourceConfig,
    StageConfig,
    StageScheduleConfig,
    TrainConfig,
)
from megatron_syne.data.mixture.plan import MixturePlan, Segment
from megatron_syne.data.mixture.planning import plan_mixture

LR, MIN, INIT = 1e-3, 1e-4, 2e-5
BATCH, LENGTH = 4, 16


def mock_run(iters: int, schedule: ScheduleConfig, lr: float = LR, min_lr: float = MIN) -> RunConfig:
    return RunConfig(
        run_dir="out",
        data=DataConfig(seq_length=LENGTH, mock=True),
        optimizer=OptimizerConfig(lr=lr, min_lr=min_lr),
        schedule=schedule,
        train=TrainConfig(global_batch_size=BATCH, train_iters=iters),
    )


def staged_run(*stages: StageConfig, schedule: ScheduleConfig, batch: int = BATCH) -> RunConfig:
    data = DataConfig(seq_length=LENGTH, sources={"a": SourceConfig("a")}, stages=list(stages))
    return RunConfig(
        run_dir="out",
        data=data,
        optimizer=OptimizerConfig(lr=LR, min_lr=MIN),
        schedule=schedule,
        train=TrainConfig(global_batch_size=batch),
    )


def steps(config: RunConfig, plan: MixturePlan | None = None) -> list[float]:
    """The learning rate of every step of a run."""
    plan = plan or plan_mixture(config)
    rate = LearningRate(config, plan)
    return [rate.at(plan.sample_at(step)) for step in range(plan.train_iters)]


def line(a: float, b: float, x: float) -> float:
    return a + (b - a) * x


# Written out by hand: rate of step n (from 0) of 20, warm-up of 4 steps, WSD's decay the last 8, from step 12.
W, D, N = 4, 8, 20
FORMULAS: dict[str, tuple[ScheduleConfig, Callable[[int], float]]] = {
    "constant": (ScheduleConfig(lr_decay_style="constant"), lambda n: LR),
    "linear": (ScheduleConfig(lr_decay_style="linear"), lambda n: line(LR, MIN, (n - W) / (N - W))),
    "cosine": (
        ScheduleConfig(lr_decay_style="cosine"),
        lambda n: MIN + (LR - MIN) / 2 * (1 + math.cos(math.pi * (n - W) / (N - W))),
    ),
    "inverse-square-root": (
        ScheduleConfig(lr_decay_style="inverse-square-root"),
        lambda n: max(MIN, LR * math.sqrt(W / n)),
    ),
    "WSD never decaying": (ScheduleConfig(), lambda n: LR),
    **{
        f"WSD {style}": (ScheduleConfig(lr_wsd_decay_iters=D, lr_wsd_decay_style=style), formula)
        for style, formula in {
            "linear": lambda n: line(LR, MIN, max(0, n - 12) / 8),
            "cosine": lambda n: MIN + (LR - MIN) / 2 * (1 + math.cos(math.pi * max(0, n - 12) / 8)),
            "exponential": lambda n: MIN + (LR - MIN) * (2 * 0.5 ** (max(0, n - 12) / 8) - 1),
            "minus_sqrt": lambda n: MIN + (LR - MIN) * (1 - math.sqrt(max(0, n - 12) / 8)),
            "clipped_linear": lambda n: LR if n < 12 else max(MIN, LR * (20 - n) / 8),
        }.items()
    },
}


@pytest.mark.parametrize("in_tokens", [False, True], ids=["iterations", "tokens"])
@pytest.mark.parametrize("name", FORMULAS)
def test_every_step_is_its_formula(name: str, in_tokens: bool) -> None:
    schedule, formula = FORMULAS[name]
    schedule = replace(schedule, lr_warmup_init=INIT)
    if in_tokens:
        wsd = None if schedule.lr_wsd_decay_iters is None else D * BATCH * LENGTH
        schedule = replace(
            schedule, lr_warmup_tokens=W * BATCH * LENGTH, lr_wsd_decay_iters=None, lr_wsd_decay_tokens=wsd
        )
    else:
        schedule = replace(schedule, lr_warmup_iters=W)
    expected = [line(INIT, LR, n / W) if n < W else formula(n) for n in range(N)]
    assert steps(mock_run(N, schedule)) == pytest.approx(expected, rel=1e-12)


def test_straight_to_zero_goes_in_a_line_to_zero() -> None:
    """arXiv 2502.15938; the rate after the last step would be 0."""
    config = mock_run(N, ScheduleConfig(lr_decay_style="linear", lr_warmup_iters=W), min_lr=0.0)
    assert steps(config) == pytest.approx(
        [LR * n / W if n < W else LR * (N - n) / (N - W) for n in range(N)], rel=1e-12
    )
    assert LearningRate(config, plan_mixture(config)).at(N * BATCH) == 0


def syne_lambda(step: int, warmup: int, total: int, stable_ratio: float) -> float:
    """Llama-3-SynE's ``get_wsd_scheduler`` as its released code computes it: a factor on the peak rate."""
    if step < warmup:
        return step / max(1, warmup)
    stable = int(total * stable_ratio)
    if step < stable:
        return 1.0
    return max(0.1, (total - step) / max(1, total - stable))


@pytest.mark.parametrize("stable_ratio", [0.8, 0.5, 1.0])
def test_clipped_linear_is_synes_own_lambda(stable_ratio: float) -> None:
    total, warmup = 100, 10
    decay = total - int(total * stable_ratio)
    schedule = ScheduleConfig(
        lr_wsd_decay_style="clipped_linear", lr_warmup_iters=warmup, lr_wsd_decay_iters=decay
    )
    expected = [LR * syne_lambda(n, warmup, total, stable_ratio) for n in range(total)]
    assert steps(mock_run(total, schedule, min_lr=LR / 10)) == pytest.approx(expected, rel=1e-12)


@settings(max_examples=200, deadline=None)
@given(
    style=st.sampled_from(["constant", "linear", "cosine", "inverse-square-root", "WSD"]),
    wsd_style=st.sampled_from(["exponential", "linear", "cosine", "minus_sqrt"]),
    warmup=st.integers(0, 9),
    decay=st.integers(10, 20),
    wsd=st.integers(0, 10),
    init=st.floats(0, 1e-3),
    floor=st.floats(0, 1e-3),
)
def test_every_step_is_megatron_cores(style, wsd_style, warmup, decay, wsd, init, floor):
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    wsd = min(wsd, decay - warmup)
    schedule = ScheduleConfig(
        lr_decay_style=style,
        lr_warmup_init=init,
        lr_warmup_iters=warmup,
        lr_decay_iters=decay,
        lr_wsd_decay_iters=wsd,
        lr_wsd_decay_style=wsd_style,
    )
    engine = OptimizerParamScheduler(
        types.SimpleNamespace(param_groups=[{}]),
        init_lr=init,
        max_lr=LR,
        min_lr=floor,
        lr_warmup_steps=warmup * BATCH,
        lr_decay_steps=decay * BATCH,
        lr_decay_style=style,
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=1,
        wd_incr_style="constant",
        wsd_decay_steps=wsd * BATCH,
        lr_wsd_decay_style=wsd_style,
    )
    expected = []
    for _ in range(25):
        expected.append(engine.get_lr({}))
        engine.step(BATCH)
    config = mock_run(20, schedule, min_lr=floor)
    rate = LearningRate(config, plan_mixture(config))
    assert [rate.at(n * BATCH) for n in range(25)] == pytest.approx(expected, rel=1e-12, abs=1e-18)


# Two stages: 2 steps of 4 x 16 tokens, then 5 of 4 x 32.
def two_lengths(schedule: ScheduleConfig) -> RunConfig:
    second = StageConfig("two", 640, {"a": 1.0}, seq_length=32)
    return staged_run(StageConfig("one", 128, {"a": 1.0}), second, schedule=schedule)


def test_warmup_in_tokens_is_exact_over_another_sequence_length() -> None:
    """The rise is in proportion to the tokens consumed: 0, 64, 128, then 128 a step; 300 tokens in all."""
    schedule = ScheduleConfig(lr_warmup_tokens=300, lr_warmup_init=INIT)
    consumed = [0, 64, 128, 256, 384, 512, 640]
    expected = [line(INIT, LR, min(1, tokens / 300)) for tokens in consumed]
    assert steps(two_lengths(schedule)) == pytest.approx(expected, rel=1e-12)


def test_decay_in_tokens_is_exact_over_another_sequence_length() -> None:
    """The last 700 of 768 tokens: it begins 68 tokens into the run, in its second step."""
    schedule = ScheduleConfig(lr_wsd_decay_tokens=700, lr_wsd_decay_style="linear")
    consumed = [0, 64, 128, 256, 384, 512, 640]
    expected = [line(LR, MIN, max(0, tokens - 68) / 700) for tokens in consumed]
    assert steps(two_lengths(schedule)) == pytest.approx(expected, rel=1e-12)


def ramped(plan: MixturePlan, batches: list[tuple[int, int]]) -> MixturePlan:
    """A plan of one stage cut into segments of (iterations, global batch)."""
    first, segments = 0, []
    for iterations, batch in batches:
        samples = iterations * batch
        old: Segment = plan.segments[0]
        segments.append(
            replace(
                old, first_sample=first, samples=samples, iterations=iterations, global_batch_size=batch,
                counts=(samples,), pattern=(samples,),
            )
        )  # fmt: skip
        first += samples
    return replace(plan, segments=tuple(segments))


def test_schedule_over_a_growing_batch_goes_by_samples() -> None:
    """4 steps of 2, 2 of 4, 3 of 8 samples: a warm-up in iterations ends with its iteration, and rises by samples."""
    config = mock_run(10, ScheduleConfig(lr_decay_style="linear", lr_warmup_iters=5, lr_warmup_init=INIT))
    plan = ramped(plan_mixture(config), [(4, 2), (2, 4), (3, 8)])
    before = [
        0,
        2,
        4,
        6,
        8,
        12,
        16,
        24,
        32,
    ]  # samples before each step; the warm-up ends at 12, the run at 40
    expected = [line(INIT, LR, n / 12) if n < 12 else line(LR, MIN, (n - 12) / 28) for n in before]
    assert steps(config, plan) == pytest.approx(expected, rel=1e-12)
    tokens = replace(config.schedule, lr_warmup_iters=None, lr_warmup_tokens=10 * LENGTH)
    expected = [line(INIT, LR, n / 10) if n < 10 else line(LR, MIN, (n - 10) / 30) for n in before]
    assert steps(replace(config, schedule=tokens), plan) == pytest.approx(expected, rel=1e-12)


def test_each_stage_begins_anew_with_its_own_values() -> None:
    """INF-34B's manner: cosine from 1e-3 to 1e-4 with a warm-up, then a line from 8e-4 to 1e-5 without one, then the
    run's own values with a warm-up in tokens in the place of the run's in iterations."""
    schedule = ScheduleConfig(lr_decay_style="cosine", span="stage", lr_warmup_iters=2, lr_warmup_init=INIT)
    config = staged_run(
        StageConfig("one", 10 * 64, {"a": 1.0}),
        StageConfig("two", 5 * 128, {"a": 1.0}, seq_length=32, schedule=StageScheduleConfig(
            lr=8e-4, min_lr=1e-5, lr_decay_style="linear", lr_warmup_iters=0)),
        StageConfig("three", 8 * 64, {"a": 1.0}, schedule=StageScheduleConfig(lr_warmup_tokens=3 * 64)),
        schedule=schedule,
    )  # fmt: skip

    def cosine(n: int, warmup: int, total: int) -> float:
        return MIN + (LR - MIN) / 2 * (1 + math.cos(math.pi * (n - warmup) / (total - warmup)))

    one = [line(INIT, LR, n / 2) if n < 2 else cosine(n, 2, 10) for n in range(10)]
    two = [line(8e-4, 1e-5, n / 5) for n in range(5)]
    three = [line(INIT, LR, n / 3) if n < 3 else cosine(n, 3, 8) for n in range(8)]
    assert steps(config) == pytest.approx(one + two + three, rel=1e-12)
    assert steps(config)[10] == 8e-4 and steps(config)[0] == INIT


def test_a_stage_decays_at_its_own_end() -> None:
    schedule = ScheduleConfig(span="stage", lr_wsd_decay_style="minus_sqrt", lr_wsd_decay_iters=4)
    config = staged_run(
        StageConfig("one", 6 * 64, {"a": 1.0}, schedule=StageScheduleConfig(lr_wsd_decay_iters=0)),
        StageConfig("two", 8 * 64, {"a": 1.0}, schedule=StageScheduleConfig(lr_wsd_decay_tokens=2 * 64)),
        StageConfig("three", 6 * 64, {"a": 1.0}),
        schedule=schedule,
    )
    half = MIN + (LR - MIN) * (1 - math.sqrt(0.5))
    quarters = [MIN + (LR - MIN) * (1 - math.sqrt(n / 4)) for n in range(4)]
    assert steps(config) == pytest.approx([LR] * 13 + [half] + [LR] * 2 + quarters, rel=1e-12)


def test_wsd_without_final_decay_stays_at_the_peak() -> None:
    """As Llama-3-SynE's released code ran (recipes: its stable_ratio was never passed)."""
    rates = steps(mock_run(20, ScheduleConfig(lr_warmup_init=1e-7, lr_warmup_iters=5), lr=1e-5, min_lr=1e-6))
    assert rates[0] == 1e-7
    assert rates[5:] == [1e-5] * 15
