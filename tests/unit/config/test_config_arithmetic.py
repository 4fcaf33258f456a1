"""Batch and learning-rate arithmetic, held against megatron-core's own scheduler."""

from __future__ import annotations

import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_syne.config.arithmetic import (
    ScheduleSamples,
    batch_arithmetic,
    learning_rate,
    resolved_deallocate_pipeline_outputs,
    resolved_overlap_p2p_comm,
    run_schedule,
)
from megatron_syne.config.schema import (
    DataConfig,
    ParallelConfig,
    RunConfig,
    SourceConfig,
    StageConfig,
    TrainConfig,
)
from megatron_syne.data.mixture.ledger import make_ledger
from megatron_syne.data.mixture.planning import MixturePlan, plan_mixture, resume_plan


def run(**fields: object) -> RunConfig:
    """A run with dotted fields set (dots written as ``__``)."""
    config = RunConfig(run_dir="out")
    for key, value in fields.items():
        section, name = key.split("__")
        assert hasattr(getattr(config, section), name)
        setattr(getattr(config, section), name, value)
    return config


def plan_of(config: RunConfig, iters: int) -> MixturePlan:
    """A plan of so many iterations."""
    config.data.mock, config.train.train_iters = True, iters
    return plan_mixture(config)


@settings(max_examples=200, deadline=None)
@given(
    style=st.sampled_from(["constant", "linear", "cosine", "inverse-square-root", "WSD"]),
    wsd_style=st.sampled_from(["exponential", "linear", "cosine", "minus_sqrt"]),
    warmup=st.integers(0, 9),
    decay=st.integers(10, 20),
    wsd=st.integers(0, 10),
    step=st.integers(0, 25),
    init=st.floats(0, 1e-3),
    floor=st.floats(0, 1e-3),
)
def test_learning_rate_is_megatron_cores(style, wsd_style, warmup, decay, wsd, step, init, floor):
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    config = run(
        optimizer__lr=1e-3,
        optimizer__min_lr=floor,
        schedule__lr_decay_style=style,
        schedule__lr_warmup_init=init,
        schedule__lr_warmup_iters=warmup,
        schedule__lr_decay_iters=decay,
        schedule__lr_wsd_decay_iters=min(wsd, decay - warmup),
        schedule__lr_wsd_decay_style=wsd_style,
        train__global_batch_size=4,
    )
    samples = run_schedule(config, plan_of(config, 20))
    assert samples == ScheduleSamples(warmup * 4, decay * 4, min(wsd, decay - warmup) * 4)
    engine = OptimizerParamScheduler(
        types.SimpleNamespace(param_groups=[{}]),
        init_lr=init,
        max_lr=1e-3,
        min_lr=floor,
        lr_warmup_steps=samples.warmup,
        lr_decay_steps=samples.decay,
        lr_decay_style=style,
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=1,
        wd_incr_style="constant",
        wsd_decay_steps=samples.wsd_decay,
        lr_wsd_decay_style=wsd_style,
    )
    engine.step(step * 4)
    assert learning_rate(config, samples, step * 4) == pytest.approx(engine.get_lr({}), rel=1e-12, abs=1e-18)


def test_trainer_builds_the_same_schedule():
    from megatron_syne.training.optimizer import build_scheduler

    config = run(
        optimizer__lr=1e-5,
        schedule__lr_warmup_init=1e-7,
        schedule__lr_warmup_tokens=1000,
        schedule__lr_wsd_decay_iters=3,
        data__seq_length=64,
    )
    engine = build_scheduler(types.SimpleNamespace(param_groups=[{}]), config, plan_of(config, 12))
    samples = run_schedule(config, plan_of(config, 12))
    assert samples.warmup == 16  # 1000 / 64 rounded up
    assert (samples.warmup, samples.decay, samples.wsd_decay) == (
        engine.lr_warmup_steps,
        engine.lr_decay_steps,
        engine.wsd_decay_steps,
    )


def test_wsd_without_final_decay_stays_at_the_peak():
    config = run(optimizer__lr=1e-5, schedule__lr_warmup_init=1e-7, schedule__lr_warmup_iters=5)
    samples = run_schedule(config, plan_of(config, 20))
    rates = [learning_rate(config, samples, step * 8) for step in range(20)]
    assert rates[0] == 1e-7
    assert rates[5:] == [1e-5] * 15


def test_schedule_over_stages_of_other_lengths_and_another_batch():
    """A warm-up in tokens ends at the sample that holds them, whatever stages and batches it goes through."""
    data = DataConfig(
        seq_length=8,
        sources={"a": SourceConfig("a")},
        stages=[StageConfig("one", 64, {"a": 1.0}), StageConfig("two", 640, {"a": 1.0}, seq_length=32)],
    )
    config = RunConfig(data=data, train=TrainConfig(global_batch_size=4))
    plan = plan_mixture(config)  # 2 iterations of 4 x 8 tokens, 5 of 4 x 32
    config.schedule.lr_warmup_tokens = 64 + 33
    config.schedule.lr_wsd_decay_iters = 2
    assert run_schedule(config, plan) == ScheduleSamples(warmup=8 + 2, decay=28, wsd_decay=8)
    config.schedule.lr_warmup_tokens, config.schedule.lr_warmup_iters = None, 3
    config.schedule.lr_decay_iters = 5
    assert run_schedule(config, plan) == ScheduleSamples(warmup=12, decay=20, wsd_decay=8)
    config.train.global_batch_size = 8
    changed, _ = resume_plan(config, make_ledger(plan, 8, {}), 8)
    assert changed.train_iters == 2 + 3
    assert run_schedule(config, changed) == ScheduleSamples(warmup=16, decay=32, wsd_decay=16)


def test_batch_arithmetic():
    config = run(train__global_batch_size=1024, train__micro_batch_size=2, data__seq_length=8192)
    batch = batch_arithmetic(config, 16)
    assert batch.num_microbatches == 32
    assert batch.tokens_per_step == 8_388_608


@pytest.mark.parametrize(
    ("vpp", "platform", "overlap", "deallocate"),
    [
        (None, "cpu", False, True),
        (None, "cuda", False, True),
        (2, "cpu", True, False),
        (2, "cuda", True, True),
    ],
)
def test_automatic_pipeline_choices(vpp, platform, overlap, deallocate):
    parallel = ParallelConfig(virtual_pipeline_model_parallel_size=vpp)
    assert resolved_overlap_p2p_comm(parallel) is overlap
    assert resolved_deallocate_pipeline_outputs(parallel, platform) is deallocate


@pytest.mark.parametrize("given", [True, False])
def test_given_pipeline_choices_are_kept(given):
    parallel = ParallelConfig(overlap_p2p_comm=given, deallocate_pipeline_outputs=given)
    assert resolved_overlap_p2p_comm(parallel) is given
    assert resolved_deallocate_pipeline_outputs(parallel, "cpu") is given
