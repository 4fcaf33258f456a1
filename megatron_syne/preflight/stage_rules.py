"""The rules of schedules and what a stage may change."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_syne.config.arithmetic import run_schedule
from megatron_syne.preflight.data_rules import plan_or_none
from megatron_syne.preflight.facts import Facts

Problems = Iterator[str]


def schedule_fits(facts: Facts) -> Problems:
    """Learning rates in order; warm-up, decay and WSD's final decay one after the other within the run."""
    schedule, rate = facts.config.schedule, facts.config.optimizer
    if rate.min_lr > rate.lr:
        yield f"{facts.at('optimizer.min_lr')} is greater than {facts.at('optimizer.lr')}"
    if schedule.lr_warmup_init > rate.lr:
        yield f"{facts.at('schedule.lr_warmup_init')} is greater than {facts.at('optimizer.lr')}"
    if schedule.lr_warmup_iters is not None and schedule.lr_warmup_tokens is not None:
        yield (
            f"{facts.at('schedule.lr_warmup_iters')} and {facts.at('schedule.lr_warmup_tokens')}: "
            f"give one of them, set the other to null"
        )
        return
    plan = plan_or_none(facts)
    if plan is None:
        return
    iters, batch = plan.train_iters, facts.config.train.global_batch_size
    samples = run_schedule(facts.config, plan)
    end = "schedule.lr_decay_iters" if schedule.lr_decay_iters else "the length of the run"
    warmup = (
        "schedule.lr_warmup_iters" if schedule.lr_warmup_iters is not None else "schedule.lr_warmup_tokens"
    )
    if samples.warmup >= samples.decay:
        yield (
            f"{facts.at(warmup)}: the warm-up of {samples.warmup / batch:g} iterations does not end before "
            f"{end}, {samples.decay // batch} iterations; at most {samples.decay // batch - 1}"
        )
    elif schedule.lr_decay_style == "WSD" and samples.warmup + samples.wsd_decay > samples.decay:
        room = (samples.decay - samples.warmup) // batch
        yield (
            f"{facts.at('schedule.lr_wsd_decay_iters')} does not fit between the warm-up and {end}, "
            f"{samples.decay // batch} iterations; at most {room}"
        )
    elif schedule.lr_decay_style == "WSD" and not samples.wsd_decay and samples.decay < iters * batch:
        yield (
            f"{facts.at('schedule.lr_decay_iters')} is below the {iters} iterations of the run and WSD has no final "
            f"decay: the learning rate would drop from {rate.lr:g} to {rate.min_lr:g} at once; give "
            f"schedule.lr_wsd_decay_iters or set lr_decay_iters to null"
        )


STAGE_RULES: tuple[Callable[[Facts], Problems], ...] = (schedule_fits,)
