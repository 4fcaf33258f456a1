"""The rules of what trains: freezing, groups, z-loss, noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_syne.errors import SyneError
from megatron_syne.models.parameter_names import (
    ask_for_new_layers,
    matches,
    nearest_names,
    new_layers_of,
    parameter_names,
    trains,
)
from megatron_syne.preflight.facts import Facts

Problems = Iterator[str]


def shares_are_not_negative(facts: Facts) -> Problems:
    """Multipliers, the weight of z-loss and the size of the noise are numbers of at least 0."""
    values = [(key, facts.get(key)) for key in ("train.z_loss", "train.neftune_noise_alpha")]
    for n, group in enumerate(facts.config.optimizer.groups):
        values += [(f"optimizer.groups.{n}.{name}", getattr(group, name)) for name in ("lr_mult", "wd_mult")]
    for key, value in values:
        if value is not None and not (value >= 0 and math.isfinite(value)):
            yield f"{facts.named(key, value)} must be a number of at least 0"


def patterns_fit(facts: Facts) -> Problems:
    """Every pattern fits a parameter of this model, and in every stage something trains."""
    config = facts.config
    chosen = _choices(facts)
    given = [(key, pattern) for choice in chosen for key, patterns in choice for pattern in patterns]
    given += [(f"optimizer.groups.{n}.match", group.match) for n, group in enumerate(config.optimizer.groups)]
    new_layers: list[int] | None = None
    if ask_for_new_layers(pattern for _, pattern in given):
        start = config.checkpoint.initialize_from
        if start is not None and not Path(start).exists():
            return  # the weights are not made yet: looked at again at the start, which needs them
        try:
            new_layers = new_layers_of(config)
        except SyneError as error:
            yield str(error)
            return
    known = parameter_names(facts.model)
    lost = False
    for key, pattern in dict.fromkeys(given):
        if not any(matches(name, pattern, new_layers) for name in known):
            lost = True
            yield (
                f"{facts.named(key, pattern)} fits no parameter of this model; nearest: "
                f"{nearest_names(pattern, known)}"
            )
    for (freeze_key, freeze), (only_key, only) in chosen if not lost else []:
        if not any(trains(name, freeze, only, new_layers) for name in known):
            yield (
                f"{facts.named(freeze_key, freeze)} and {facts.named(only_key, only)} leave nothing to train; "
                "freeze less"
            )


Choice = tuple[tuple[str, list[str]], tuple[str, list[str]]]


def _choices(facts: Facts) -> list[Choice]:
    """What is frozen and what alone trains, each with its key: of the run, and of each stage with its own."""
    options = facts.config.optimizer
    freeze, only = ("optimizer.freeze", options.freeze), ("optimizer.train_only", options.train_only)
    stages = [] if facts.config.data.mock else facts.config.data.stages
    own = [
        (
            freeze if stage.freeze is None else (f"data.stages.{n}.freeze", stage.freeze),
            only if stage.train_only is None else (f"data.stages.{n}.train_only", stage.train_only),
        )
        for n, stage in enumerate(stages)
    ]
    return list(
        {tuple(map(str, choice)): choice for choice in [*own, *([] if own else [(freeze, only)])]}.values()
    )


TRAINABLE_RULES: tuple[Callable[[Facts], Problems], ...] = (shares_are_not_negative, patterns_fit)
