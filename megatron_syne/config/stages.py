"""What each stage of a run changes: its batch, its model's RoPE base, what trains. No torch.

A stage that needs another engine (RoPE base, what trains, new optimizer state) begins a new *leg*. A leg is a
resume: it ends with a checkpoint, and the next one is built from that with the configuration of its own stages,
so the values of a checkpoint never win over those of the stage that begins.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, NamedTuple

from megatron_syne.config.schema import ModelConfig, RunConfig
from megatron_syne.errors import ConfigError

CARRIED = ("rotary_base", "max_position_embeddings")
"""Fields of the model that a stage may change; they hold until another stage changes them."""


class StageBatch(NamedTuple):
    """The batches of one stage."""

    micro_batch_size: int
    """Samples per forward pass of one replica."""
    global_batch_size: int
    """Samples per optimizer step, once a ramp is over."""
    rampup_batch_size: tuple[int, ...]
    """(start, increment, samples) of the ramp; () = none."""


def stage_batch(config: RunConfig, number: int) -> StageBatch:
    """The batches of stage ``number``: its own values, else those of ``train`` (the ramp of which is the first's).

    A run without stages (``data.mock``) has one, number 0, of ``train``'s values.
    """
    train = config.train
    ramp = train.rampup_batch_size if number == 0 else []
    if config.data.mock or not config.data.stages:
        return StageBatch(train.micro_batch_size, train.global_batch_size, tuple(ramp))
    stage = config.data.stages[number]
    return StageBatch(
        train.micro_batch_size if stage.micro_batch_size is None else stage.micro_batch_size,
        train.global_batch_size if stage.global_batch_size is None else stage.global_batch_size,
        tuple(stage.rampup_batch_size or ramp),
    )


def leg_config(config: RunConfig, stage: str) -> RunConfig:
    """The run as a stage sees it: its model, what trains in it and its micro-batch put in; the rest is shared.

    ``model.rotary_base`` and ``max_position_embeddings`` are those of the last stage, up to this one, that
    gives them. ConfigError for a name that no stage has (a run of ``data.mock`` is its own only leg).
    """
    if config.data.mock:
        return config
    number = _number(config, stage)
    own = config.data.stages[number]
    optimizer = replace(
        config.optimizer,
        freeze=config.optimizer.freeze if own.freeze is None else own.freeze,
        train_only=config.optimizer.train_only if own.train_only is None else own.train_only,
    )
    result = copy.copy(config)  # not replace(): a loaded configuration remembers where its values stand
    result.model = stage_model(config, config.model, stage)
    result.optimizer = optimizer
    result.train = replace(config.train, micro_batch_size=stage_batch(config, number).micro_batch_size)
    return result


def stage_model(config: RunConfig, model: ModelConfig, stage: str) -> ModelConfig:
    """``model`` (resolved or not) with what the stages up to this one change in it."""
    changes: dict[str, Any] = {}
    for each in [] if config.data.mock else config.data.stages[: _number(config, stage) + 1]:
        changes |= {name: value for name in CARRIED if (value := getattr(each, name)) is not None}
    return replace(model, **changes)


def legs(config: RunConfig) -> list[list[str]]:
    """The names of the stages in order, those that one engine trains together; [] without stages.

    A stage begins a leg where its model's RoPE base or claimed length, or what trains, is another than before
    it, and with ``reset_optimizer``.
    """
    if config.data.mock:
        return []
    found: list[list[str]] = []
    before = None
    for stage in config.data.stages:
        now = leg_config(config, stage.name)
        engine = (now.model, now.optimizer.freeze, now.optimizer.train_only)
        if before is None or engine != before or stage.reset_optimizer:
            found.append([])
        found[-1].append(stage.name)
        before = engine
    return found


def trains(config: RunConfig) -> str:
    """In words what a leg's configuration trains: ``trains all``, ``trains only embedding.*``, ``freezes ...``."""
    only, frozen = config.optimizer.train_only, config.optimizer.freeze
    words = f"trains only {', '.join(only)}" if only else "trains all"
    return f"{words} but {', '.join(frozen)}" if frozen else words


def _number(config: RunConfig, stage: str) -> int:
    names = [each.name for each in config.data.stages]
    if stage not in names:
        raise ConfigError(f"data.stages: no stage {stage!r}; there are {', '.join(names) or 'none'}")
    return names.index(stage)
