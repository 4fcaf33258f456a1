"""Exactly once: 1,000 random histories of a run, simulated down to the micro-batches of every rank.

A history is a row of lives. Each begins with the configuration of its time (layout, batches, mixture, budget,
sequence length may have changed) and the ledger of the last checkpoint, trains, may re-weight its sources,
and is killed anywhere; what it trained after its last checkpoint is lost and trained again by the next. What
stands at the end is, for every source, the pieces of its stream that the final model has seen.
"""

from __future__ import annotations

import copy
import json
import random
from dataclasses import dataclass, field

from megatron_syne.config.schema import DataConfig, RunConfig, SourceConfig, StageConfig, TrainConfig
from megatron_syne.data.mixture.ledger import make_ledger
from megatron_syne.data.mixture.planning import MixturePlan, plan_mixture, resume_plan

SCHEDULES = 1000
NAMES = ("a", "b", "c", "d")
Read = tuple[int, str, int, int]  # sample of the run, source, first token in its stream, tokens


@dataclass
class History:
    """What the final model has seen, and the last checkpoint; ``replanned``: something was changed."""

    config: RunConfig
    seen: list[Read] = field(default_factory=list)
    saved: str = ""
    consumed: int = 0
    lives: int = 0
    changes: list[str] = field(default_factory=list)


def shares(rng: random.Random, names: tuple[str, ...]) -> dict[str, float]:
    used = rng.sample(names, rng.randint(1, len(names)))
    weights = [rng.randint(1, 9) for _ in used]
    return {name: weight / sum(weights) for name, weight in zip(used, weights, strict=True)}


def first_config(rng: random.Random) -> RunConfig:
    stages = [
        StageConfig(f"s{n}", rng.randint(1, 250) * 8, shares(rng, NAMES[:3]), rng.choice([None, None, 4, 16]))
        for n in range(rng.randint(1, 3))
    ]
    data = DataConfig(seq_length=8, sources={name: SourceConfig(name) for name in NAMES[:3]}, stages=stages)
    data.packing = rng.choice(["concatenated", "concatenated", "best_fit"])
    run = RunConfig(data=data, train=TrainConfig(global_batch_size=rng.choice([4, 8, 24])))
    for stage in stages:
        own_batch(rng, stage, run.train.global_batch_size)
    return run


def own_batch(rng: random.Random, stage: StageConfig, usual: int) -> None:
    """Now and then a stage has a batch of its own, or one that grows."""
    stage.global_batch_size = rng.choice([None, None, 4, 12, 48])
    batch = stage.global_batch_size or usual
    start = rng.choice([size for size in (1, 2, 4, 8, 12) if size < batch])
    increment = rng.choice([size for size in range(1, batch) if (batch - start) % size == 0])
    ramp = [start, increment, rng.randint(1, 300)]
    stage.rampup_batch_size = ramp if rng.random() < 0.4 else []


def change(rng: random.Random, config: RunConfig, plan: MixturePlan, consumed: int) -> RunConfig:
    """Another configuration; of the stages, the one reached (if it lacks tokens) and those to come are touched."""
    config = copy.deepcopy(config)
    data = config.data
    names = [stage.name for stage in data.stages]
    reached = names.index(plan.stage_at(consumed - 1))
    if plan.consumed(consumed) == plan.consumed(plan.num_samples):
        data.stages[-1].tokens += rng.randint(1, 100) * 8  # complete: train on
        data.stages[-1].tokens += plan.stages[-1].tokens
    elif consumed == plan.stages[reached].first_sample + plan.stages[reached].samples:
        reached += 1
    for kind in rng.sample(["batch", "mixture", "budget", "length", "source", "stage"], rng.randint(1, 3)):
        stage = data.stages[rng.randint(reached, len(data.stages) - 1)]
        if kind == "batch":
            config.train.global_batch_size = rng.choice([4, 8, 12, 24, 48])
            for number, each in enumerate(data.stages):
                if number >= reached:
                    own_batch(rng, each, config.train.global_batch_size)
                elif each.global_batch_size is None:  # over: what it was trained in is not the new default
                    each.rampup_batch_size = []
        elif kind == "mixture":
            stage.mixture = shares(rng, tuple(data.sources))
        elif kind == "budget":
            stage.tokens = stage.tokens + rng.randint(0, 100) * 8
        elif kind == "length":
            stage.seq_length = rng.choice([4, 8, 16, 32])
        elif kind == "source" and "d" not in data.sources:
            data.sources = {"d": SourceConfig("d"), **data.sources}
        elif kind == "stage" and len(data.stages) < 4:
            data.stages.append(
                StageConfig(f"n{len(data.stages)}", rng.randint(1, 100) * 8, shares(rng, NAMES[:3]))
            )
    return config


def reweighted(seed: int, plan: MixturePlan, sample: int) -> MixturePlan:
    """The plan with other shares from a sample on, now and then: a function of the sample, as the losses are."""
    rng = random.Random(f"{seed} {sample}")
    if rng.random() > 0.05:
        return plan
    segment = plan.segment_at(sample)
    used = [name for name, share in zip(plan.sources, segment.shares, strict=True) if share]
    weights = [rng.uniform(0.1, 1) for _ in used]
    new = {name: weight / sum(weights) for name, weight in zip(used, weights, strict=True)}
    return plan.with_shares(sample, new, "re-weighting")


def train(rng: random.Random, seed: int, history: History, plan: MixturePlan, kill: bool = True) -> None:
    """One life: from the last checkpoint to the end or to a kill; saves at random iterations."""
    sample, unsaved = history.consumed, []
    killed_at = rng.randint(sample, plan.num_samples) if kill and rng.random() < 0.6 else plan.num_samples
    every = rng.choice([1, 3, 7, 1000])
    iteration = plan.iteration_at(sample)
    while sample < plan.num_samples:
        batch = plan.segment_at(sample).global_batch_size
        plan = reweighted(seed, plan, sample)
        dp = rng.choice([size for size in (1, 2, 3, 4, 8) if batch % size == 0])
        micro = rng.choice([size for size in (1, 2, 3, 4) if batch % (size * dp) == 0])
        indices = [
            sample + m * micro * dp + rank * micro + j
            for rank in range(dp)
            for m in range(batch // (micro * dp))
            for j in range(micro)
        ]
        for index in indices:
            at = plan.locate(index)
            unsaved.append((index, at.source, at.position, plan.seq_length_at(index)))
        sample, iteration = sample + batch, iteration + 1
        assert plan.iteration_at(sample) == iteration and plan.sample_at(iteration) == sample
        if sample > killed_at:
            return  # what was not saved is lost
        if iteration % every == 0 or sample == plan.num_samples:
            history.seen += unsaved
            unsaved = []
            history.saved, history.consumed = json.dumps(make_ledger(plan, sample, {})), sample


def live(seed: int, changing: bool) -> tuple[History, MixturePlan]:
    rng = random.Random(seed)
    history = History(first_config(rng))
    plan = plan_mixture(history.config)
    while history.consumed < plan.num_samples or (changing and rng.random() < 0.3):
        history.lives += 1
        if history.lives > 40:
            break
        if history.saved:
            if changing and history.lives < 6:
                history.config = change(rng, history.config, plan, history.consumed)
            plan, words = resume_plan(history.config, json.loads(history.saved), history.consumed)
            history.changes += words
        train(rng, seed, history, plan)
        if history.saved:
            plan = MixturePlan.from_dict(json.loads(history.saved)["plan"])
    return history, plan


def gaps_and_repeats(seen: list[Read], best_fit: bool) -> tuple[int, int]:
    """(tokens missed, tokens read twice) over the streams, each of which must be one range from 0."""
    streams: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for _, source, begin, length in seen:  # with best_fit each sequence length has its own pass
        streams.setdefault((source, length if best_fit else 0), []).append((begin, length))
    missed = repeated = 0
    for ranges in streams.values():
        at = 0
        for begin, length in sorted(ranges):
            missed += max(0, begin - at)
            repeated += max(0, at - begin)
            at = max(at, begin + length)
    return missed, repeated


def test_a_thousand_histories_read_every_token_once() -> None:
    lives = changes = missed = repeated = ramps = 0
    for seed in range(SCHEDULES):
        changing = seed % 4 != 0
        history, plan = live(seed, changing)
        lives, changes = lives + history.lives, changes + len(history.changes)
        ramps += any(segment.reason == "ramp" for segment in plan.segments)
        gap, twice = gaps_and_repeats(history.seen, plan.packing == "best_fit")
        missed, repeated = missed + gap, repeated + twice
        assert (gap, twice) == (0, 0), f"schedule {seed}"
        assert sorted(read[0] for read in history.seen) == list(range(history.consumed)), f"schedule {seed}"
        tokens = dict.fromkeys(plan.sources, 0)
        for _, source, _, length in history.seen:
            tokens[source] += length
        assert tokens == plan.consumed(history.consumed), f"schedule {seed}"
        for stage in plan.stages if history.consumed == plan.num_samples else ():
            # its budget, to less than a global batch; one that is complete when its batch changes keeps its own
            assert 0 <= stage.tokens - stage.tokens_asked < 48 * 32, f"schedule {seed}"
        if not changing:
            alone = History(history.config)
            train(random.Random(-seed), seed, alone, plan_mixture(history.config), kill=False)
            assert sorted(alone.seen) == sorted(history.seen), f"schedule {seed}"
            assert not history.changes
    assert ramps > SCHEDULES / 10
    print(f"schedules={SCHEDULES} lives={lives} changes={changes} data_dup={repeated} data_missed={missed}")
    assert lives > 2 * SCHEDULES and changes > SCHEDULES
