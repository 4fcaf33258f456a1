"""From the configuration to the plan of a run, and from a changed configuration to the rest of a begun one.

A stage's budget is in tokens, so it holds whatever batch or sequence length it is trained in. No torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_syne.config.schema import RunConfig
from megatron_syne.data.mixture.interleave import MOST_SAMPLES
from megatron_syne.data.mixture.ledger import check_ledger
from megatron_syne.data.mixture.plan import (
    Location,
    MixturePlan,
    Segment,
    StagePlan,
    StageRequest,
    based,
    closed,
    new_segment,
)
from megatron_syne.data.mixture.shares import flatten_shares
from megatron_syne.data.mixture.supply import check_supply
from megatron_syne.errors import ConfigError, DataError

__all__ = [
    "Location",
    "MixturePlan",
    "Segment",
    "StagePlan",
    "StageRequest",
    "check_supply",
    "plan_mixture",
    "resume_plan",
]


def plan_mixture(config: RunConfig) -> MixturePlan:
    """The plan of a run from its start; with ``data.mock`` one stage ``mock`` of ``train.train_iters`` iterations.

    Raises ConfigError naming the stage and the field.
    """
    sources = ("mock",) if config.data.mock else tuple(config.data.sources)
    batch = config.train.global_batch_size
    seed, packing = config.train.seed, config.data.packing
    plan = MixturePlan(seed, sources, packing, batch, _requests(config, ()), ())
    return _completed(plan, {}, "configuration")


def resume_plan(
    config: RunConfig, ledger: Mapping[str, Any], consumed_samples: int
) -> tuple[MixturePlan, list[str]]:
    """The plan of a run that goes on after ``consumed_samples`` samples, and in words what changed in it.

    The past stays as it was; where nothing changed, so does the future. Otherwise the stage that was reached
    gets the rest of its budget, and every source goes on at the very token where it stands. ConfigError
    (all at once) for what cannot change: a stage that is over, the seed, the packing once text was read, the
    absence of a source once read; DataError for a damaged ledger.
    """
    check_ledger(ledger, consumed_samples)
    old = MixturePlan.from_dict(ledger["plan"], "data.plan")
    past = closed(old.segments, consumed_samples)
    if any(segment.samples % segment.global_batch_size for segment in past):
        raise DataError(f"data.plan: {consumed_samples} samples are no whole number of its global batches")
    asked, refused = _requests(config, past), []
    if old.seed != config.train.seed:
        refused.append(f"train.seed: {old.seed} -> {config.train.seed}")
    if past:
        asked, more = _with_the_past(config, old, past, asked)
        refused += more
    if refused:
        lines = "".join(f"\n  {text}" for text in refused)
        raise ConfigError(
            f"this run has trained {consumed_samples} samples; what cannot change in it any more:{lines}\n"
            f"set it back, or start a new run with this one's checkpoint as checkpoint.initialize_from"
        )
    batch = config.train.global_batch_size
    changes = _differences(old, asked, batch, config.data.packing)
    if not changes:
        return old, []
    if not past:
        return plan_mixture(config), changes
    kept: Sequence[Segment] = past
    reached = past[-1].stage
    if batch == old.global_batch_size and _same(_named(old.asked, reached), _named(asked, reached)):
        started = {
            segment.stage for segment in past
        }  # the change is in later stages: this one goes on as it is
        kept = [segment for segment in old.segments if segment.stage in started]
    added = () if config.data.mock else tuple(name for name in config.data.sources if name not in old.sources)
    plan = MixturePlan(
        seed=old.seed,
        sources=old.sources + added,
        packing=config.data.packing,
        global_batch_size=batch,
        asked=asked,
        segments=tuple(_widened(segment, len(added)) for segment in kept),
    )
    shares = _shares_in_force(old, asked, consumed_samples)
    return _completed(plan, shares, "; ".join(changes)), changes


def _completed(plan: MixturePlan, shares: Mapping[str, tuple[float, ...]], reason: str) -> MixturePlan:
    """The plan with a segment for what each stage still lacks; ``shares``: of stages that have their own."""
    segments = list(plan.segments)
    for number, stage in enumerate(plan.asked):
        rest = stage.tokens - sum(each.tokens for each in segments if each.stage == stage.name)
        if rest <= 0:
            continue
        begun = bool(segments) and segments[-1].stage == stage.name
        iterations = -(-rest // (stage.seq_length * plan.global_batch_size))
        samples = iterations * plan.global_batch_size
        if samples > MOST_SAMPLES:
            raise ConfigError(
                f"data.stages[{number}] ({stage.name}).tokens: {samples} samples; cut it into stages of at most "
                f"{MOST_SAMPLES}"
            )
        asked = dict(stage.shares)
        own = shares.get(stage.name) or tuple(asked.get(name, 0.0) for name in plan.sources)
        own += (0.0,) * (len(plan.sources) - len(own))
        first = segments[-1].end if segments else 0
        why = reason if begun else "configuration"
        segments.append(
            new_segment(stage.name, first, iterations, plan.global_batch_size, stage.seq_length, own, why)
        )
    return dataclasses.replace(plan, segments=based(plan.sources, plan.packing, segments))


def _requests(config: RunConfig, past: Sequence[Segment]) -> tuple[StageRequest, ...]:
    """What the configuration asks for; ``past``: what of it stands (a mock run's length is in iterations)."""
    data, batch = config.data, config.train.global_batch_size
    if data.seq_length < 1 or batch < 1:
        raise ConfigError(
            f"data.seq_length ({data.seq_length}) and train.global_batch_size ({batch}) must be at least 1"
        )
    if data.mock:
        if config.train.train_iters is None:
            raise ConfigError("train.train_iters: not given; data.mock has no token budget, so give it")
        left = config.train.train_iters - sum(segment.iterations for segment in past)
        tokens = sum(segment.tokens for segment in past) + left * batch * data.seq_length
        return (StageRequest("mock", tokens, data.seq_length, (("mock", 1.0),)),)
    if not data.stages:
        raise ConfigError("data.stages: no stage; give at least one with name, tokens and mixture")
    requests: list[StageRequest] = []
    for number, stage in enumerate(data.stages):
        where = f"data.stages[{number}] ({stage.name or 'no name'})"
        if not stage.name:
            raise ConfigError(f"{where}.name: must not be empty")
        names = [request.name for request in requests]
        if stage.name in names:
            raise ConfigError(f"{where}.name: stage {names.index(stage.name)} has this name already")
        if stage.tokens < 1:
            raise ConfigError(f"{where}.tokens: must be at least 1, found {stage.tokens}")
        seq_length = data.seq_length if stage.seq_length is None else stage.seq_length
        if seq_length < 1:
            raise ConfigError(f"{where}.seq_length: must be at least 1, found {seq_length}")
        shares = flatten_shares(stage.mixture, data.sources, f"{where}.mixture")
        requests.append(StageRequest(stage.name, stage.tokens, seq_length, tuple(shares.items())))
    return tuple(requests)


def _with_the_past(
    config: RunConfig, old: MixturePlan, past: Sequence[Segment], asked: tuple[StageRequest, ...]
) -> tuple[tuple[StageRequest, ...], list[str]]:
    """The request with the stages that are over as they were, and what in it would change the past."""
    requests, refused = list(asked), []
    trained = list(dict.fromkeys(segment.stage for segment in past))
    for number, name in enumerate(trained):
        if number >= len(asked) or asked[number].name != name:
            refused.append(f"data.stages: stage {name} was trained as number {number} and must stay there")
            continue
        was, now = _named(old.asked, name), asked[number]
        done = sum(segment.tokens for segment in past if segment.stage == name)
        if name == trained[-1] and now.tokens > done:
            continue  # the stage that was reached: it may change
        if config.data.mock or config.data.stages[number].seq_length is None:
            now = now._replace(seq_length=was.seq_length)  # a new default is meant for what comes
        requests[number] = now
        if name == trained[-1]:
            now = now._replace(tokens=was.tokens)  # it may end here
        refused += [f"data.stages.{number} is over: {text}" for text in _stage_differences(was, now)]
    if config.data.packing != old.packing:
        refused.append(f"data.packing: {old.packing} -> {config.data.packing}")
    read = {segment_source for segment_source, tokens in _tokens(old, past).items() if tokens}
    if not config.data.mock:
        refused += [
            f"data.sources.{name} is not there, but was read from (it may have no share)"
            for name in old.sources
            if name in read and name not in config.data.sources
        ]
    return tuple(requests), refused


def _tokens(plan: MixturePlan, segments: Sequence[Segment]) -> dict[str, int]:
    return {
        name: sum(segment.counts[column] * segment.seq_length for segment in segments)
        for column, name in enumerate(plan.sources)
    }


def _shares_in_force(
    old: MixturePlan, asked: Sequence[StageRequest], sample: int
) -> dict[str, tuple[float, ...]]:
    """Shares that each stage goes on with where those asked for are the same: re-weighting may have moved them."""
    found: dict[str, tuple[float, ...]] = {}
    for stage in asked:
        was = next((each for each in old.asked if each.name == stage.name), None)
        if was is None or dict(was.shares) != dict(stage.shares):
            continue
        own = [segment for segment in old.segments if segment.stage == stage.name]
        if own:
            found[stage.name] = next((each for each in own if each.end > sample), own[-1]).shares
    return found


def _widened(segment: Segment, columns: int) -> Segment:
    """The segment with columns for sources that it did not know."""
    rows = ("shares", "counts", "bases", "pattern")
    return dataclasses.replace(segment, **{row: getattr(segment, row) + (0,) * columns for row in rows})


def _named(requests: Sequence[StageRequest], name: str) -> StageRequest:
    return next(each for each in requests if each.name == name)


def _same(one: StageRequest, other: StageRequest) -> bool:
    return not _stage_differences(one, other)


def _differences(old: MixturePlan, asked: Sequence[StageRequest], batch: int, packing: str) -> list[str]:
    changes = []
    if batch != old.global_batch_size:
        changes.append(f"train.global_batch_size {old.global_batch_size} -> {batch}")
    if packing != old.packing:
        changes.append(f"data.packing {old.packing} -> {packing}")
    before = {stage.name: stage for stage in old.asked}
    after = {stage.name: stage for stage in asked}
    changes += [f"stage {name} removed" for name in before if name not in after]
    for name, stage in after.items():
        if name not in before:
            changes.append(f"stage {name} added")
        else:
            changes += _stage_differences(before[name], stage)
    if not changes and list(before) != list(after):
        changes.append(f"stages in another order: {', '.join(after)}")
    return changes


def _stage_differences(was: StageRequest, now: StageRequest) -> list[str]:
    changes = [
        f"stage {was.name}: {field} {getattr(was, field)} -> {getattr(now, field)}"
        for field in ("tokens", "seq_length")
        if getattr(was, field) != getattr(now, field)
    ]
    before, after = dict(was.shares), dict(now.shares)
    changes += [
        f"stage {was.name}: share of {name} {before.get(name, 0.0):g} -> {after.get(name, 0.0):g}"
        for name in dict.fromkeys([*before, *after])
        if before.get(name, 0.0) != after.get(name, 0.0)
    ]
    return changes
