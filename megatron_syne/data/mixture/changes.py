"""What differs between the plan of a begun run and what is asked of it now, and what of that cannot be. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_syne.config.schema import RunConfig
from megatron_syne.data.mixture.plan import MixturePlan, Segment, StageRequest


def with_the_past(
    config: RunConfig, old: MixturePlan, past: Sequence[Segment], asked: tuple[StageRequest, ...]
) -> tuple[tuple[StageRequest, ...], list[str]]:
    """The request with the stages that are over as they were, and what in it would change the past."""
    requests, refused = list(asked), []
    trained = list(dict.fromkeys(segment.stage for segment in past))
    stages = [] if config.data.mock else config.data.stages
    for number, name in enumerate(trained):
        if number >= len(asked) or asked[number].name != name:
            refused.append(f"data.stages: stage {name} was trained as number {number} and must stay there")
            continue
        was, now, own = named(old.asked, name), asked[number], number - old.inherited
        done = sum(segment.tokens for segment in past if segment.stage == name)
        if own < 0:
            continue  # trained by the run that this one branched off
        if name == trained[-1] and now.tokens > done:
            continue  # the stage that was reached: it may change
        # a new default is meant for what comes
        if config.data.mock or stages[own].seq_length is None:
            now = now._replace(seq_length=was.seq_length)
        if config.data.mock or stages[own].global_batch_size is None:
            now = now._replace(global_batch_size=was.global_batch_size)
        if config.data.mock or not stages[own].rampup_batch_size:
            now = now._replace(rampup_batch_size=was.rampup_batch_size)
        requests[number] = now
        if name == trained[-1]:
            if now.tokens < min(done, was.tokens):
                iterations = sum(segment.iterations for segment in past if segment.stage == name)
                key, end = f"data.stages.{own}.tokens", f"tokens: {done}"
                if config.data.mock:
                    key, end = "train.train_iters", f"train_iters: {iterations}"
                refused.append(
                    f"{key}: stage {name} has trained {done} tokens, more than the {now.tokens} now given; it "
                    f"cannot run backwards; with {end} it ends here"
                )
            now = now._replace(tokens=was.tokens)  # it may end here
        refused += [f"data.stages.{own} is over: {text}" for text in stage_differences(was, now)]
    return tuple(requests), refused


def reading_refused(config: RunConfig, old: MixturePlan, past: Sequence[Segment]) -> list[str]:
    """What cannot change once text was read: the packing, and that the sources are there."""
    refused = []
    if config.data.packing != old.packing:
        refused.append(f"data.packing: {old.packing} -> {config.data.packing}")
    read = {name for name, tokens in tokens_of(old, past).items() if tokens}
    if not config.data.mock:
        refused += [
            f"data.sources.{name} is not there, but was read from (it may have no share)"
            for name in old.sources
            if name in read and name not in config.data.sources
        ]
    return refused


def tokens_of(plan: MixturePlan, segments: Sequence[Segment]) -> dict[str, int]:
    return {
        name: sum(segment.counts[column] * segment.seq_length for segment in segments)
        for column, name in enumerate(plan.sources)
    }


def named(requests: Sequence[StageRequest], name: str) -> StageRequest:
    return next(each for each in requests if each.name == name)


def same(one: StageRequest, other: StageRequest) -> bool:
    return not stage_differences(one, other)


def differences(old: MixturePlan, asked: Sequence[StageRequest], batch: int, packing: str) -> list[str]:
    changes = []
    if batch != old.global_batch_size:
        changes.append(f"train.global_batch_size {old.global_batch_size} -> {batch}")
    if packing != old.packing:
        changes.append(f"data.packing {old.packing} -> {packing}")
    before = {
        stage.name: stage._replace(global_batch_size=batch)  # said once, as the run's
        if (stage.global_batch_size, stage.name) in [(old.global_batch_size, now.name) for now in asked]
        and named(asked, stage.name).global_batch_size == batch
        else stage
        for stage in old.asked
    }
    after = {stage.name: stage for stage in asked}
    changes += [f"stage {name} removed" for name in before if name not in after]
    for name, stage in after.items():
        if name not in before:
            changes.append(f"stage {name} added")
        else:
            changes += stage_differences(before[name], stage)
    if not changes and list(before) != list(after):
        changes.append(f"stages in another order: {', '.join(after)}")
    return changes


def stage_differences(was: StageRequest, now: StageRequest) -> list[str]:
    changes = [
        f"stage {was.name}: {field} {getattr(was, field)} -> {getattr(now, field)}"
        for field in ("tokens", "seq_length", "global_batch_size", "rampup_batch_size")
        if getattr(was, field) != getattr(now, field)
    ]
    before, after = dict(was.shares), dict(now.shares)
    changes += [
        f"stage {was.name}: share of {name} {before.get(name, 0.0):g} -> {after.get(name, 0.0):g}"
        for name in dict.fromkeys([*before, *after])
        if before.get(name, 0.0) != after.get(name, 0.0)
    ]
    return changes
