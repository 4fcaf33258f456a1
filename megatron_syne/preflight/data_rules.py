"""The rules of what is read: sources, stages, packing, re-weighting; as ``rules.py`` has those of the layout."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from megatron_syne.config.schema import ReweightingConfig, SourceConfig
from megatron_syne.data.mixture.plan import MixturePlan
from megatron_syne.data.mixture.planning import plan_mixture
from megatron_syne.data.mixture.reweighting import group_members
from megatron_syne.data.mixture.shares import places_of
from megatron_syne.data.mixture.supply import shortages
from megatron_syne.errors import ConfigError, DataError, MissingInput
from megatron_syne.preflight.facts import Facts, nearest_multiples
from megatron_syne.preflight.manifests import source_token_counts

Problems = Iterator[str]


def plan_or_none(facts: Facts) -> MixturePlan | None:
    """The plan, None where there is none: ``length_is_given`` or ``mixture_is_sound`` say why, the latter by
    letting MissingInput or DataError pass where the checkpoint of a branch cannot be read."""
    try:
        return plan_mixture(facts.config)
    except (ConfigError, MissingInput, DataError):
        return None


def length_is_given(facts: Facts) -> Problems:
    """The length comes from the stages or from ``train_iters``; where both are given they agree."""
    data, train = facts.config.data, facts.config.train
    if data.mock:
        if train.train_iters is None:
            yield f"train.train_iters: not given; {facts.at('data.mock')} has no token budget, so give it"
    elif not data.stages:
        yield "data.stages: not given; give at least one stage with its mixture, or data.mock: true"
    elif train.train_iters is not None:
        plan = plan_or_none(facts)
        if plan is not None and train.train_iters != plan.train_iters:
            counts = [stage.iterations for stage in plan.stages]
            terms = " + ".join(map(str, counts)) + " = " if len(counts) > 1 else ""
            steps = dict.fromkeys(each.global_batch_size * each.seq_length for each in plan.segments)
            yield (
                f"{facts.at('train.train_iters')} does not agree with the token budgets of data.stages: "
                f"{terms}{sum(counts)} iterations of {' or '.join(map(str, steps))} tokens; set train_iters "
                f"to {sum(counts)} or null (train.exit_interval stops earlier)"
            )


def mixture_is_sound(facts: Facts) -> Problems:
    """Stages name sources that exist and shares that sum to 1."""
    data = facts.config.data
    if data.stages and not data.mock:
        try:
            plan_mixture(facts.config)
        except ConfigError as error:
            yield f"{error} ({facts.origin('data.stages')})"


def sources_fit(facts: Facts) -> Problems:
    """Options of a source lie in their range and go together."""
    for room in ("sources", "validation"):
        for name, source in getattr(facts.config.data, room).items():
            yield from _source(facts, f"data.{room}.{name}", source)


def _source(facts: Facts, key: str, source: SourceConfig) -> Problems:
    def at(option: str) -> str:
        return facts.named(f"{key}.{option}", getattr(source, option))

    if not source.max_epochs > 0:
        yield f"{at('max_epochs')} must be greater than 0"
    if source.first_tokens is not None and source.first_tokens < 1:
        yield f"{at('first_tokens')} must be at least 1"
    if source.top_fraction is not None and not 0 < source.top_fraction <= 1:
        yield f"{at('top_fraction')} must be above 0 and at most 1"
    if source.order_by is not None and source.order != "ordered":
        yield f"{at('order_by')} needs order: ordered; it is shuffled: give it or set order_by to null"
    if (source.top_by is None) != (source.top_fraction is None):
        given, other = ("top_fraction", "top_by") if source.top_by is None else ("top_by", "top_fraction")
        yield f"{at(given)} needs {other} beside it; give both or neither"
    if source.top_is != "highest" and source.top_by is None:
        yield f"{at('top_is')} needs top_by and top_fraction"


def documents_are_told_apart(facts: Facts) -> Problems:
    """Positions start anew only where attention does; on CUDA such samples come one to a micro-batch."""
    data, train = facts.config.data, facts.config.train
    sizes = {
        f"data.stages.{n}.micro_batch_size": stage.micro_batch_size for n, stage in enumerate(data.stages)
    }
    sizes["train.micro_batch_size"] = train.micro_batch_size
    if data.reset_position_ids and not data.reset_attention_mask:
        yield f"{facts.at('data.reset_position_ids')} needs data.reset_attention_mask: true"
    for key, size in sizes.items():
        if data.reset_attention_mask and facts.platform == "cuda" and size not in (None, 1):
            yield (
                f"{facts.named(key, size)} with {facts.at('data.reset_attention_mask')} on CUDA: packed "
                f"sequences (THD) come one to a micro-batch; set micro_batch_size to 1"
            )
    if data.reset_attention_mask and facts.platform == "cpu" and facts.model.window_size is not None:
        yield (
            f"{facts.at('data.reset_attention_mask')} with {facts.at('model.window_size')} on the CPU: the engine's "
            f"softmax there puts the window's mask in place of the documents'; give one of them up"
        )


def sequences_fit(facts: Facts) -> Problems:
    """Sequences are not longer than the model claims to handle (a stage's: ``stage_positions_fit``); SP cuts them
    into equal parts."""
    data, tp = facts.config.data, facts.config.parallel.tensor_model_parallel_size
    stages = [] if data.mock else data.stages
    longest = facts.model.max_position_embeddings
    for stage in stages:
        longest = max(longest or 0, stage.max_position_embeddings or 0) or None
    if longest is not None and data.seq_length > longest and all(stage.seq_length for stage in stages):
        yield f"{facts.at('data.seq_length')} is greater than {facts.at('model.max_position_embeddings')}"
    for key, length in facts.seq_lengths():
        if facts.config.parallel.context_parallel_size > 1:
            continue  # context_rules.py asks for more
        if facts.config.parallel.sequence_parallel and tp > 1 and length % tp:
            yield (
                f"{facts.named(key, length)} is not a multiple of "
                f"{facts.at('parallel.tensor_model_parallel_size')}, which sequence_parallel "
                f"needs; nearest legal: {nearest_multiples(length, tp)}"
            )


def evaluation_has_data(facts: Facts) -> Problems:
    """Evaluation needs a validation source."""
    if facts.config.train.eval_interval is not None and not facts.config.data.validation:
        yield (
            f"{facts.at('train.eval_interval')} without data.validation: give a validation source or set it to null"
        )


def reweighting_can_work(facts: Facts) -> Problems:
    """A group of plain sources, each with its validation source; factors stay above 0; intervals meet."""
    if facts.config.data.mock:
        return
    groups = [each.group for each in facts.config.data.reweighting]
    for number, each in enumerate(facts.config.data.reweighting):
        key = f"data.reweighting.{number}"
        if groups.index(each.group) != number:
            yield f"{facts.named(f'{key}.group', each.group)}: data.reweighting.{groups.index(each.group)} has it"
        yield from _interval(facts, key, each)
        yield from _strength(facts, key, each)
        if plan_or_none(facts) is not None:
            yield from _group(facts, key, each)


def _interval(facts: Facts, key: str, each: ReweightingConfig) -> Problems:
    every, name = facts.config.train.eval_interval, facts.named(f"{key}.interval", each.interval)
    if each.interval < 1:
        yield f"{name} must be at least 1"
    elif every is None:
        yield f"{name} needs train.eval_interval: it is not given; set it to {each.interval}"
    elif every >= 1 and each.interval % every:
        yield (
            f"{name} is not a multiple of {facts.at('train.eval_interval')}; "
            f"nearest legal: {nearest_multiples(each.interval, every)}"
        )


def _strength(facts: Facts, key: str, each: ReweightingConfig) -> Problems:
    if not each.alpha > 0:
        yield f"{facts.named(f'{key}.alpha', each.alpha)} must be greater than 0"
    for name, weight in each.weights.items():
        if weight < 0:
            yield f"{facts.named(f'{key}.weights.{name}', weight)} must be at least 0"
    largest = max([1.0, *each.weights.values()])
    if each.alpha * largest >= 1:
        yield (
            f"{facts.named(f'{key}.alpha', each.alpha)} x the largest weight {largest:g} must be below 1: a share "
            f"could fall to 0 or under; at most {math.floor(0.999 / largest * 1000) / 1000:g}"
        )


def _group(facts: Facts, key: str, each: ReweightingConfig) -> Problems:
    data, name = facts.config.data, facts.named(f"{key}.group", each.group)
    found = [(stage, group_members(stage.mixture, each.group)) for stage in data.stages]
    if not any(members for _, members in found):
        yield f"{name}: no stage has a group of this name in its mixture"
        return
    members = dict.fromkeys(member for _, inner in found for member in inner)
    if nested := [member for member in members if member not in data.sources]:
        yield f"{name}: {', '.join(nested)}: a group that is re-weighted holds sources alone, no groups"
    for stage, inner in found:
        twice = [member for member in inner if places_of(stage.mixture, member) > 1]
        if twice:
            yield f"{name}: {', '.join(twice)} stands at another place of stage {stage.name} too"
    plain = [member for member in members if member in data.sources]
    if missing := [member for member in plain if member not in data.validation]:
        yield f"{name}: no validation source for {', '.join(missing)}; give data.validation.{missing[0]} ..."
    if unknown := [member for member in each.weights if member not in members]:
        yield f"{facts.named(f'{key}.weights', ', '.join(unknown))}: not in the group {each.group}"


def sources_last(facts: Facts) -> Problems:
    """No source is read more often than allowed: where manifests tell its size, and the run has not begun.

    A begun run is checked with the plan that it really goes on with, when its data is opened.
    """
    plan = None if facts.config.data.mock else plan_or_none(facts)
    if plan is None or any(Path(facts.config.run_dir, "checkpoints").glob("*")):
        return
    if next(sources_fit(facts), None) is None:
        yield from shortages(plan, source_token_counts(facts.config)[0], facts.config)


DATA_RULES = (
    length_is_given,
    mixture_is_sound,
    sources_fit,
    documents_are_told_apart,
    sequences_fit,
    evaluation_has_data,
    reweighting_can_work,
    sources_last,
)
