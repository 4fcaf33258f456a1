"""The rules of schedules and of what a stage may change: learning rate, batch, sequence length, rotary base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_syne.config.learning_rate import Schedule, rates_of, schedules
from megatron_syne.config.schema import StageConfig, StageScheduleConfig
from megatron_syne.data.mixture.plan import MixturePlan
from megatron_syne.preflight.data_rules import plan_or_none
from megatron_syne.preflight.facts import Facts, nearest, nearest_multiples

Problems = Iterator[str]

_UNIT = {"iters": "iterations", "tokens": "tokens"}
_LENGTHS = ("lr_warmup_iters", "lr_warmup_tokens", "lr_wsd_decay_iters", "lr_wsd_decay_tokens")


def lengths_are_given_once(facts: Facts) -> Problems:
    """A length stands in iterations or in tokens, not in both."""
    for place, own in _own_schedules(facts):
        for name in ("lr_warmup", "lr_wsd_decay"):
            if getattr(own, f"{name}_iters") is not None and getattr(own, f"{name}_tokens") is not None:
                yield (
                    f"{_at(facts, place, own, f'{name}_iters')} and {_at(facts, place, own, f'{name}_tokens')}: "
                    f"give one of them, set the other to null"
                )


def stage_schedules_have_effect(facts: Facts) -> Problems:
    """A stage's own learning rate needs a schedule begun anew in each stage, which then ends with its stage."""
    schedule = facts.config.schedule
    if schedule.span == "run":
        for n, stage in _stages(facts):
            if stage.schedule is not None:
                yield (
                    f"data.stages.{n}.schedule ({facts.origin(f'data.stages.{n}')}) of stage {stage.name} with "
                    f"{facts.at('schedule.span')}: one schedule goes over all stages; set schedule.span to stage, "
                    f"or the stage's schedule to null"
                )
    elif schedule.lr_decay_iters is not None:
        yield (
            f"{facts.at('schedule.lr_decay_iters')} with {facts.at('schedule.span')}: each stage's decay ends with "
            f"the stage; set lr_decay_iters to null"
        )


def rates_are_in_order(facts: Facts) -> Problems:
    """Learning rates and lengths are no less than 0; 0 < lr, min_lr <= lr and lr_warmup_init <= lr, in each stage."""
    for place, own in _own_schedules(facts)[1:]:  # the run's own are seen to by ``sizes_are_positive``
        for name in ("min_lr", "lr_warmup_init", *_LENGTHS):
            if (getattr(own, name) or 0) < 0:
                yield f"{_at(facts, place, own, name)} must be at least 0"
        if own.lr is not None and own.lr <= 0:
            yield f"{_at(facts, place, own, 'lr')} must be greater than 0"
    run = facts.config.schedule
    for name in ("lr_warmup_tokens", "lr_wsd_decay_tokens"):
        if (getattr(run, name) or 0) < 0:
            yield f"{facts.at(f'schedule.{name}')} must be at least 0"
    places = [""] if run.span == "run" else [stage.name for _, stage in _stages(facts)]
    for place in places or [""]:
        rates = rates_of(facts.config, place)
        top = _of_rates(facts, place, "lr")
        for name in ("min_lr", "lr_warmup_init"):
            if getattr(rates, name) > rates.lr:
                yield f"{_of_rates(facts, place, name)} is greater than {top}"


def schedules_fit(facts: Facts) -> Problems:
    """Warm-up, decay and WSD's final decay come one after the other within the run, or within each stage."""
    if any(next(rule(facts), None) for rule in (lengths_are_given_once, rates_are_in_order)):
        return
    plan = plan_or_none(facts)
    if plan is None:
        return
    past = {stage.name for stage in plan.stages[: plan.inherited]}  # of a branch: begun under other values
    for schedule in schedules(facts.config, plan):
        if schedule.name not in past:
            yield from _fits(facts, plan, schedule)


def _fits(facts: Facts, plan: MixturePlan, schedule: Schedule) -> Problems:
    rates, place = schedule.rates, schedule.name
    first, end = schedule.first_sample, schedule.decay_end
    iters, tokens = _between(plan, first, end)
    given = facts.config.schedule.lr_decay_iters and not place
    where = "schedule.lr_decay_iters" if given else f"stage {place}" if place else "the length of the run"
    limit = f"{where}, {iters} iterations of {tokens:,} tokens"
    warmup = _length_name("lr_warmup", rates.lr_warmup_tokens)
    wsd = _length_name("lr_wsd_decay", rates.lr_wsd_decay_tokens)
    decays = rates.lr_decay_style == "WSD" and schedule.decay.length > 0
    if schedule.warmup_end >= end:
        most = f"{iters - 1} iterations"
        if warmup == "lr_warmup_tokens":
            most = f"{tokens - plan.seq_length_at(min(end, plan.num_samples) - 1)} tokens"
        yield f"{_of_rates(facts, place, warmup)}: the warm-up does not end before {limit}; at most {most}"
    elif decays and _decay_start(plan, schedule) < schedule.warmup_end:
        begin = plan.iteration_at(schedule.warmup_end)
        begin = plan.sample_at(begin + (plan.sample_at(begin) < schedule.warmup_end))
        rest = _between(plan, begin, end)
        most = f"{_between(plan, schedule.warmup_end, end)[1]} tokens"
        if wsd == "lr_wsd_decay_iters":
            most = f"{rest[0]} iterations"
        yield (
            f"{_of_rates(facts, place, wsd)} does not fit between the warm-up "
            f"({getattr(rates, warmup) or 0} {_UNIT[warmup.rpartition('_')[2]]}) and the end of {limit}; at most {most}"
        )
    elif rates.lr_decay_style == "WSD" and not decays and end < first + schedule.samples:
        yield (
            f"{facts.at('schedule.lr_decay_iters')} is below the {plan.train_iters} iterations of the run and WSD "
            f"has no final decay: the learning rate would drop from {rates.lr:g} to {rates.min_lr:g} at once; give "
            f"schedule.lr_wsd_decay_iters or set lr_decay_iters to null"
        )
    elif rates.lr_decay_style == "inverse-square-root" and schedule.warmup_end == first:
        yield (
            f"{_of_rates(facts, place, 'lr_decay_style')} without a warm-up: its rate is lr x sqrt(warm-up / samples "
            f"so far), which would fall from {rates.lr:g} at the first step; give lr_warmup_iters or lr_warmup_tokens"
        )


def _decay_start(plan: MixturePlan, schedule: Schedule) -> int:
    """Sample of the run at which WSD's decay begins."""
    decay = schedule.decay
    if not decay.in_tokens:
        return decay.start
    return plan.sample_at_tokens(decay.start) if decay.start >= 0 else -1


def _between(plan: MixturePlan, first: int, end: int) -> tuple[int, int]:
    """(iterations, tokens) between two samples of a run."""
    tokens = [
        sum(
            (min(sample, each.end) - each.first_sample) * each.seq_length
            for each in plan.segments
            if each.first_sample < sample
        )
        for sample in (first, end)
    ]
    return plan.iteration_at(end) - plan.iteration_at(first), tokens[1] - tokens[0]


def _length_name(name: str, tokens: int | None) -> str:
    return f"{name}_iters" if tokens is None else f"{name}_tokens"


def stage_batches_divide(facts: Facts) -> Problems:
    """Each batch that a stage goes through is a whole number of micro-batches; a ramp reaches its stage's batch."""
    train, parallel = facts.config.train, facts.config.parallel
    places: list[tuple[str, StageConfig | None, list[int]]] = [("train", None, train.rampup_batch_size)]
    places += [(f"data.stages.{n}", stage, stage.rampup_batch_size) for n, stage in _stages(facts)]
    for key, stage, ramp in places:
        batch, micro = train.global_batch_size, train.micro_batch_size
        if stage is not None:
            batch, micro = stage.global_batch_size or batch, stage.micro_batch_size or micro
            small = [
                facts.named(f"{key}.{name}", value)
                for name in ("global_batch_size", "micro_batch_size", "max_position_embeddings")
                if (value := getattr(stage, name)) is not None and value < 1
            ]
            yield from (f"{text} must be at least 1" for text in small)
            if small:
                continue
        unit, rule = micro * facts.dp, f"micro_batch_size {micro} x DP {facts.dp}"
        if facts.vpp is not None and parallel.pipeline_model_parallel_size > 1:
            unit *= parallel.pipeline_model_parallel_size
            rule += f" x PP {parallel.pipeline_model_parallel_size} (the interleaved schedule of VPP)"
        own = stage is not None and (
            stage.global_batch_size is not None or stage.micro_batch_size is not None
        )
        if own and batch % unit:
            given = (
                "global_batch_size" if stage and stage.global_batch_size is not None else "micro_batch_size"
            )
            value = batch if given == "global_batch_size" else micro
            yield (
                f"{facts.named(f'{key}.{given}', value)}: a global batch of {batch} is not a multiple of {rule} = "
                f"{unit}; nearest legal global batch: {nearest_multiples(batch, unit)}"
            )
        if ramp:
            yield from _ramp(facts, f"{key}.rampup_batch_size", ramp, batch, unit, rule)
    first = next((stage for _, stage in _stages(facts)), None)
    if train.rampup_batch_size and first is not None and first.rampup_batch_size:
        yield (
            f"{facts.at('train.rampup_batch_size')} is the first stage's, which has its own "
            f"data.stages.0.rampup_batch_size = {first.rampup_batch_size}; give one of them"
        )


def _ramp(facts: Facts, key: str, ramp: list[int], batch: int, unit: int, rule: str) -> Problems:
    name = facts.named(key, ramp)
    if len(ramp) != 3 or min(ramp) < 1:
        yield f"{name}: expected [start, increment, samples], three numbers of at least 1"
        return
    start, increment, samples = ramp
    if start >= batch:
        yield f"{name}: the ramp does not start below the global batch of {batch}; start lower, or give no ramp"
    elif (batch - start) % increment:
        legal = [
            size for size in range(1, batch - start + 1) if not (batch - start) % size and not size % unit
        ]
        yield (
            f"{name}: from {start} to the global batch of {batch} is no whole number of steps of {increment}; "
            f"nearest legal increment: {nearest(increment, legal)}"
        )
    if start % unit or increment % unit:
        which, value = ("start", start) if start % unit else ("increment", increment)
        yield (
            f"{name}: its {which} {value} is not a multiple of {rule} = {unit}; nearest legal: "
            f"{nearest_multiples(value, unit)}"
        )
    if samples < (steps := (batch - start) // increment):
        yield f"{name}: {samples} samples are too few for {steps} steps of the batch; at least {steps}"


def stage_positions_fit(facts: Facts) -> Problems:
    """A rotary base is above 1; a stage's sequences are not longer than what the model then claims to handle."""
    longest, key = facts.model.max_position_embeddings, "model.max_position_embeddings"
    told = set()
    for n, stage in _stages(facts):
        if stage.rotary_base is not None and not stage.rotary_base > 1:
            yield f"{facts.named(f'data.stages.{n}.rotary_base', stage.rotary_base)} must be greater than 1"
        if stage.max_position_embeddings is not None:
            longest, key = stage.max_position_embeddings, f"data.stages.{n}.max_position_embeddings"
        own = "data.seq_length" if stage.seq_length is None else f"data.stages.{n}.seq_length"
        length = facts.config.data.seq_length if stage.seq_length is None else stage.seq_length
        if longest is not None and length > longest and (own, key) not in told:
            told.add((own, key))
            yield (
                f"{facts.named(own, length)} is greater than {facts.named(key, longest)}, in stage {stage.name}; a "
                f"model for longer sequences says so: data.stages.{n}.max_position_embeddings: {length} or more"
            )


def branch_has_its_past(facts: Facts) -> Problems:
    """A branch starts from a checkpoint that is there, and from nothing else."""
    check, run_dir = facts.config.checkpoint, Path(facts.config.run_dir)
    if check.branch_from is None:
        return
    if check.initialize_from is not None:
        yield (
            f"{facts.at('checkpoint.branch_from')} and {facts.at('checkpoint.initialize_from')}: a branch takes its "
            f"weights from the checkpoint that it branches off; set initialize_from to null"
        )
    if facts.config.data.mock:
        yield f"{facts.at('checkpoint.branch_from')} with {facts.at('data.mock')}: a branch has stages of its own"
    if Path(check.branch_from).resolve().is_relative_to(run_dir.resolve()):
        yield (
            f"{facts.at('checkpoint.branch_from')} lies in {facts.at('run_dir')}: a run goes on from its own folder "
            f"by itself; choose another run_dir for the branch"
        )


def _stages(facts: Facts) -> list[tuple[int, StageConfig]]:
    """The stages with their numbers; none in a run on random tokens."""
    return [] if facts.config.data.mock else list(enumerate(facts.config.data.stages))


def _own_schedules(facts: Facts) -> list[tuple[str, StageScheduleConfig]]:
    """(stage, what is given there) of the run (stage empty) and of each stage with a schedule."""
    run = facts.config.schedule
    values = {name: getattr(run, name) for name in _LENGTHS}
    found = [("", StageScheduleConfig(**values))]
    return found + [(stage.name, stage.schedule) for _, stage in _stages(facts) if stage.schedule]


def _at(facts: Facts, place: str, own: StageScheduleConfig, name: str) -> str:
    return facts.named(_key(facts, place, name), getattr(own, name))


def _of_rates(facts: Facts, place: str, name: str) -> str:
    """``key = value (run.yaml:12)`` of a value in force in a stage, by the key that gave it."""
    own = next((stage.schedule for _, stage in _stages(facts) if stage.name == place), None)
    given = own is not None and getattr(own, name) is not None
    value = getattr(rates_of(facts.config, place), name)
    text = facts.named(_key(facts, place if given else "", name), value)
    return f"{text} (stage {place})" if place and not given else text


def _key(facts: Facts, place: str, name: str) -> str:
    if not place:
        return f"optimizer.{name}" if name in ("lr", "min_lr") else f"schedule.{name}"
    return f"data.stages.{next(n for n, stage in _stages(facts) if stage.name == place)}.schedule.{name}"


STAGE_RULES: tuple[Callable[[Facts], Problems], ...] = (
    lengths_are_given_once,
    stage_schedules_have_effect,
    rates_are_in_order,
    schedules_fit,
    stage_batches_divide,
    stage_positions_fit,
    branch_has_its_past,
)
