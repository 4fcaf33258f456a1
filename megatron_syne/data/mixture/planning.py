"""From the configuration to the plan of a run, and from a changed configuration to the rest of a begun one.

A stage's budget is in tokens, so it holds whatever batch or sequence length it is trained in. No torch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_syne.config.schema import RunConfig
from megatron_syne.config.stages import stage_batch
from megatron_syne.data.mixture.changes import differences, named, reading_refused, same, with_the_past
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
    new_segments,
)
from megatron_syne.data.mixture.ramp import batch_rows
from megatron_syne.data.mixture.requests import stage_requests
from megatron_syne.data.mixture.supply import check_supply
from megatron_syne.errors import ConfigError, DataError, MissingInput

__all__ = [
    "Location",
    "MixturePlan",
    "Segment",
    "StagePlan",
    "StageRequest",
    "branch_plan",
    "check_supply",
    "plan_mixture",
    "resume_plan",
]


def plan_mixture(config: RunConfig) -> MixturePlan:
    """The plan of a run from its start; with ``data.mock`` one stage ``mock`` of ``train.train_iters`` iterations.

    With ``checkpoint.branch_from`` the past that the run branches off comes first (or, of a branch that has
    checkpoints already, its own). Raises ConfigError naming the stage and the field; MissingInput and DataError
    for the checkpoint of a branch.
    """
    if config.checkpoint.branch_from is not None:
        return planned_branch(config)
    return _from_the_start(config)


def _from_the_start(config: RunConfig) -> MixturePlan:
    sources = ("mock",) if config.data.mock else tuple(config.data.sources)
    batch = config.train.global_batch_size
    seed, packing = config.train.seed, config.data.packing
    plan = MixturePlan(seed, sources, packing, batch, stage_requests(config, ()), ())
    return _completed(config, plan, {}, "configuration")


def resume_plan(
    config: RunConfig, ledger: Mapping[str, Any], consumed_samples: int
) -> tuple[MixturePlan, list[str]]:
    """The plan of a run that goes on after ``consumed_samples`` samples, and in words what changed in it.

    The past stays as it was; where nothing changed, so does the future. Otherwise the stage that was reached
    gets the rest of its budget, and every source goes on at the very token where it stands. ConfigError
    (all at once) for what cannot change: a stage that is over, a budget below what was trained, the seed, the
    packing once text was read, the absence of a source once read; DataError for a damaged ledger.
    """
    old, past = _read(ledger, consumed_samples)
    inherited = old.asked[: old.inherited]
    asked, refused = (*inherited, *stage_requests(config, past)), []
    _names_are_new(config, inherited)
    if old.seed != config.train.seed:
        refused.append(f"train.seed: {old.seed} -> {config.train.seed}")
    if past:
        asked, more = with_the_past(config, old, past, asked)
        refused += more + reading_refused(config, old, past)
    _raise_refused(refused, consumed_samples)
    batch = config.train.global_batch_size
    changes = differences(old, asked, batch, config.data.packing)
    if not changes:
        return with_micro_batches(config, old, consumed_samples), []
    if not past:
        return _from_the_start(config), changes
    kept: Sequence[Segment] = past
    reached = past[-1].stage
    if same(named(old.asked, reached), named(asked, reached)):
        started = {
            segment.stage for segment in past
        }  # the change is in later stages: this one goes on as it is
        kept = [segment for segment in old.segments if segment.stage in started]
    plan = _after(config, old, kept, asked)
    shares = _shares_in_force(old, asked, consumed_samples)
    plan = _completed(config, plan, shares, "; ".join(changes))
    return with_micro_batches(config, plan, consumed_samples), changes


def branch_plan(config: RunConfig, ledger: Mapping[str, Any], consumed_samples: int) -> MixturePlan:
    """The plan of a new run that branches off another after ``consumed_samples`` samples of it.

    What was trained stays as it was, its last stage ended there; ``data.stages`` follow it, and every source
    goes on at the very token where it stands. ConfigError (all at once) for a stage named as one of the past,
    another seed or packing, and a source that was read and is not there; DataError for a damaged ledger.
    """
    old, past = _read(ledger, consumed_samples)
    if not past:
        raise ConfigError(
            "checkpoint.branch_from: nothing was trained there yet; give initialize_from instead"
        )
    done = {segment.stage for segment in past}
    inherited = tuple(stage for stage in old.asked if stage.name in done)
    trained = sum(segment.tokens for segment in past if segment.stage == inherited[-1].name)
    inherited = (*inherited[:-1], inherited[-1]._replace(tokens=min(inherited[-1].tokens, trained)))
    asked = (*inherited, *stage_requests(config, ()))
    _names_are_new(config, inherited)
    seed = [f"train.seed: {old.seed} -> {config.train.seed}"] if old.seed != config.train.seed else []
    _raise_refused(seed + reading_refused(config, old, past), consumed_samples)
    plan = dataclasses.replace(_after(config, old, past, asked), inherited=len(inherited))
    return _completed(config, plan, {}, "branch")


def with_micro_batches(config: RunConfig, plan: MixturePlan, consumed_samples: int) -> MixturePlan:
    """The plan with the configuration's micro-batches in what is still to come: they decide no sample."""
    micro = _micro_batches(config)
    return dataclasses.replace(
        plan,
        segments=tuple(
            dataclasses.replace(segment, micro_batch_size=micro.get(segment.stage, segment.micro_batch_size))
            if segment.end > consumed_samples
            else segment
            for segment in plan.segments
        ),
    )


def _read(ledger: Mapping[str, Any], consumed_samples: int) -> tuple[MixturePlan, list[Segment]]:
    """(plan of a ledger, its segments so far); DataError for a damaged one."""
    check_ledger(ledger, consumed_samples)
    old = MixturePlan.from_dict(ledger["plan"], "data.plan")
    past = closed(old.segments, consumed_samples)
    if any(segment.samples % segment.global_batch_size for segment in past):
        raise DataError(f"data.plan: {consumed_samples} samples are no whole number of its global batches")
    return old, past


def _raise_refused(refused: Sequence[str], consumed_samples: int) -> None:
    if refused:
        lines = "".join(f"\n  {text}" for text in refused)
        raise ConfigError(
            f"this run has trained {consumed_samples} samples; what cannot change in it any more:{lines}\n"
            f"set it back, or start a new run with this one's checkpoint as checkpoint.initialize_from"
        )


def _names_are_new(config: RunConfig, inherited: Sequence[StageRequest]) -> None:
    taken = [stage.name for stage in inherited]
    for number, stage in enumerate(config.data.stages):
        if stage.name in taken:
            raise ConfigError(
                f"data.stages[{number}].name: {stage.name!r} is a stage of the run that this one branched off "
                f"({', '.join(taken)}); give the branch's stages names of their own"
            )


def _after(
    config: RunConfig, old: MixturePlan, kept: Sequence[Segment], asked: tuple[StageRequest, ...]
) -> MixturePlan:
    """A plan that begins with the kept segments of another and asks for something else; to be completed."""
    added = () if config.data.mock else tuple(name for name in config.data.sources if name not in old.sources)
    return dataclasses.replace(
        old,
        sources=old.sources + added,
        packing=config.data.packing,
        global_batch_size=config.train.global_batch_size,
        asked=asked,
        segments=tuple(_widened(segment, len(added)) for segment in kept),
    )


def _completed(
    config: RunConfig, plan: MixturePlan, shares: Mapping[str, tuple[float, ...]], reason: str
) -> MixturePlan:
    """The plan with segments for what each stage still lacks; ``shares``: of stages that have their own."""
    segments, micro = list(plan.segments), _micro_batches(config)
    branches = reason == "branch"  # so begins the first new segment
    for number, stage in enumerate(plan.asked):
        own = [each for each in segments if each.stage == stage.name]
        rest = stage.tokens - sum(each.tokens for each in own)
        if rest <= 0:
            continue
        rows = _rows(stage, sum(each.samples for each in own), rest)
        samples = sum(batch * iterations for batch, iterations in rows)
        if samples > MOST_SAMPLES:
            raise ConfigError(
                f"data.stages[{number - plan.inherited}] ({stage.name}).tokens: {samples} samples; cut it into "
                f"stages of at most {MOST_SAMPLES}"
            )
        asked = dict(stage.shares)
        mixed = shares.get(stage.name) or tuple(asked.get(name, 0.0) for name in plan.sources)
        begun = bool(own) and segments[-1].stage == stage.name
        like = Segment(
            stage=stage.name,
            first_sample=segments[-1].end if segments else 0,
            samples=0,
            iterations=0,
            global_batch_size=stage.global_batch_size,
            seq_length=stage.seq_length,
            shares=mixed + (0.0,) * (len(plan.sources) - len(mixed)),
            counts=(),
            bases=(),
            pattern=(),
            reason=reason if begun or (branches and len(segments) == len(plan.segments)) else "configuration",
            micro_batch_size=micro[stage.name],
        )
        segments += new_segments(like, rows)
    return dataclasses.replace(plan, segments=based(plan.sources, plan.packing, segments))


def _rows(stage: StageRequest, done: int, tokens: int) -> list[tuple[int, int]]:
    """(global batch, iterations) of the rest of a stage: ``tokens``, after ``done`` samples of it."""
    rows = []
    for batch, most in batch_rows(stage.global_batch_size, stage.rampup_batch_size, done):
        needed = -(-tokens // (batch * stage.seq_length))
        iterations = needed if most is None else min(needed, most)
        rows.append((batch, iterations))
        tokens -= batch * iterations * stage.seq_length
        if tokens <= 0:
            break
    return rows


def _micro_batches(config: RunConfig) -> dict[str, int]:
    """Micro-batch of each stage by its name."""
    names = ["mock"] if config.data.mock else [stage.name for stage in config.data.stages]
    return {name: stage_batch(config, number).micro_batch_size for number, name in enumerate(names)}


def planned_branch(config: RunConfig) -> MixturePlan:
    """The plan of a run with ``checkpoint.branch_from``, from that checkpoint or, once it has any, from its own.

    Only ``state.json`` is read. MissingInput, DataError, ConfigError.
    """
    own = sorted(Path(config.run_dir, "checkpoints").glob("iter_*[0-9]/state.json"))
    file = own[-1] if own else Path(config.checkpoint.branch_from or "") / "state.json"
    try:
        run = json.loads(file.read_text())
        ledger, consumed = run["data"], int(run["state"]["consumed_samples"])
    except OSError as error:
        raise MissingInput(f"checkpoint.branch_from: {file}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"checkpoint.branch_from: {file}: not the state of a checkpoint ({error!r})"
        ) from None
    return resume_plan(config, ledger, consumed)[0] if own else branch_plan(config, ledger, consumed)


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
