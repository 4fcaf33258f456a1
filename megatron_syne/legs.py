"""Where in its run a process stands: which leg is trained from a checkpoint on, and what it changes.

A leg is what one engine trains (``config.stages``). It follows from the plan and the checkpoint's counters alone,
so a run that was killed anywhere goes on in the leg that it was in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_syne.config.schema import ModelConfig, RunConfig
from megatron_syne.config.stages import CARRIED, leg_config, legs, stage_model, trains
from megatron_syne.data.mixture.plan import MixturePlan
from megatron_syne.errors import ConfigError
from megatron_syne.training.state import TrainState

if TYPE_CHECKING:
    from megatron_syne.convert.weights import WeightSource


@dataclass(frozen=True)
class Leg:
    """One leg as its engine is built."""

    config: RunConfig
    """The run as the stage sees it that is trained next."""
    model: ModelConfig
    """The resolved model with what the stages up to that one changed."""
    end: int
    """Step after which the next leg begins, or the run is over."""
    begins: bool
    """Whether a stage begins at the very place where the run stands."""
    reset_optimizer: bool
    """Whether it begins with new moments."""


def leg_at(config: RunConfig, model: ModelConfig, plan: MixturePlan, state: TrainState) -> Leg:
    """The leg that goes on from ``state``.

    An evaluation that a stop left undone belongs to the engine that trained up to it: with one due, the leg is
    that of the step before, which may have ended there.
    """
    if config.data.mock:
        return Leg(config, model, plan.train_iters, False, False)
    consumed = state.consumed_samples
    own = plan.stages[plan.inherited :]
    sample = min(consumed, plan.num_samples - 1)
    if consumed > own[0].first_sample and _evaluation_is_open(config, state):
        sample = consumed - 1
    stage = plan.stage_at(sample)
    last = next(names for names in legs(config) if stage in names)[-1]
    end = next(each.first_sample + each.samples for each in own if each.name == last)
    begins = next(each.first_sample for each in own if each.name == stage) == consumed
    asked = next(each for each in config.data.stages if each.name == stage)
    return Leg(
        leg_config(config, stage),
        stage_model(config, model, stage),
        plan.iteration_at(end),
        begins,
        begins and asked.reset_optimizer,
    )


def _evaluation_is_open(config: RunConfig, state: TrainState) -> bool:
    interval = config.train.eval_interval
    due = interval is not None and state.step % interval == 0 and bool(config.data.validation)
    return due and state.step != state.evaluated_step


def model_changes(before: Mapping[str, Any], model: ModelConfig) -> list[str]:
    """What a model has otherwise than it was before, of the fields that a stage may change."""
    return [
        f"{name} {_short(before[name])} -> {_short(getattr(model, name))}"
        for name in CARRIED
        if name in before and before[name] != getattr(model, name)
    ]


def are_given(before: Mapping[str, Any], config: RunConfig, model: ModelConfig) -> bool:
    """Whether all that :func:`model_changes` finds is written in the configuration, or one of its stages: a base that
    only follows from ``model.hf_path`` or ``preset`` never takes the place of a checkpoint's."""
    return all(
        getattr(config.model, name) is not None
        for name in CARRIED
        if before.get(name) != getattr(model, name)
    )


def overrides(run: Mapping[str, Any], leg: Leg) -> str:
    """In words what a leg trains otherwise than the checkpoint whose ``state.json`` this is; "" = the same."""
    words = model_changes(run["model"], leg.model)
    before = run.get("trains", "trains all")
    if trains(leg.config) != before:
        words.append(trains(leg.config))
    if leg.reset_optimizer:
        words.append("new optimizer state")
    return "; ".join(words)


def fit_source(source: WeightSource, config: RunConfig, model: ModelConfig) -> str:
    """Hold the weights that a run starts from to its model; in words what that one overrides.

    The base of the rotary embedding and the claimed length have no weights: where the configuration gives them
    they may be others than the weights were trained with. Raises ConfigError for any other difference.
    """
    given = [name for name in CARRIED if getattr(config.model, name) is not None]
    theirs = {name: getattr(source.model, name) for name in given}
    source.check_model(replace(model, **theirs))
    return "; ".join(model_changes(theirs, model))


def check_branch(config: RunConfig, checkpoint: Path) -> None:
    """ConfigError where a branch names another tokenizer than the run that it branches off."""
    from megatron_syne.data.tokenizer import tokenizer_fingerprint

    theirs, ours = checkpoint / "hf", config.data.tokenizer_path
    kept = [theirs / name for name in ("tokenizer.json", "tokenizer.model") if (theirs / name).is_file()]
    if ours and kept and tokenizer_fingerprint(ours) != tokenizer_fingerprint(theirs):
        raise ConfigError(
            f"data.tokenizer_path: {ours} is another tokenizer than that of checkpoint.branch_from ({theirs}); a "
            "branch goes on with the same one. Take its weights alone with checkpoint.initialize_from instead"
        )


def _short(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
