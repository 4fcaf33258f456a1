"""What a run trains one after another: each stage as the predictions see it, one length and one batch. No torch."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

from megatron_syne.config.schema import ModelConfig, OptimizerConfig, RunConfig
from megatron_syne.config.stages import leg_config, stage_batch, stage_model
from megatron_syne.data.mixture.planning import plan_mixture


@dataclass(frozen=True)
class Shape:
    """One stage: what the bytes and the seconds of its steps follow from, and how many steps it has."""

    name: str
    """Of the stage; empty for a run of ``data.mock``."""
    model: ModelConfig
    """Resolved, as this stage trains it."""
    optimizer: OptimizerConfig
    seq_length: int
    micro_batch_size: int | None
    """The stage's own; None = ``train``'s."""
    batches: tuple[tuple[int, int], ...]
    """(global batch, iterations): one, or each size of a ramp; the last is the stage's."""
    tokens: int
    """Of the stage, whole global batches."""

    @property
    def global_batch_size(self) -> int:
        """Samples per step, once a ramp is over."""
        return self.batches[-1][0]

    @property
    def iterations(self) -> int:
        """Steps of the stage."""
        return sum(count for _, count in self.batches)

    def view(self, config: RunConfig, global_batch_size: int | None = None) -> RunConfig:
        """``config`` as a run of this stage alone, with no other stages: what the predictions take."""
        result = copy.copy(config)  # not replace(): a loaded configuration remembers where its values stand
        result.optimizer = self.optimizer
        result.data = replace(config.data, seq_length=self.seq_length, mock=True, stages=[])
        result.train = replace(
            config.train,
            global_batch_size=global_batch_size or self.global_batch_size,
            micro_batch_size=self.micro_batch_size or config.train.micro_batch_size,
            train_iters=self.iterations,
        )
        return result


def shapes(config: RunConfig, model: ModelConfig) -> list[Shape]:
    """The stages that a run still trains (of a branch: its own), in order; of ``data.mock`` the one that it is.

    ``model`` is the resolved one. Raises what :func:`plan_mixture` does for a mixture that is not sound.
    """
    plan = plan_mixture(config)
    found = []
    for stage in plan.stages[plan.inherited :]:
        segments = [each for each in plan.segments if each.stage == stage.name]
        batches: dict[int, int] = {}
        for each in segments:
            batches[each.global_batch_size] = batches.get(each.global_batch_size, 0) + each.iterations
        mock = config.data.mock
        leg = leg_config(config, stage.name)
        number = 0 if mock else [each.name for each in config.data.stages].index(stage.name)
        found.append(
            Shape(
                name="" if mock else stage.name,
                model=stage_model(config, model, stage.name),
                optimizer=leg.optimizer,
                seq_length=segments[-1].seq_length,
                micro_batch_size=None if mock else config.data.stages[number].micro_batch_size,
                batches=_ending_with(stage_batch(config, number).global_batch_size, batches),
                tokens=stage.tokens,
            )
        )
    return found


def _ending_with(size: int, batches: dict[int, int]) -> tuple[tuple[int, int], ...]:
    """The batches of a ramp, and at last the full one, also where the stage ends before it is reached."""
    return (
        *((batch, count) for batch, count in batches.items() if batch != size),
        (size, batches.get(size, 0)),
    )
