"""Online re-weighting: after an evaluation, the sources of a group get new shares from the next sample on.

All ranks get the same losses and come to the same plan. What was decided, and the perplexities that the next
decision needs, are in the ledger's ``changes``, so a resumed run goes on as if it had not stopped. The first
evaluation at an interval only gives the perplexities to compare with. Shares that would read a source more
often than its ``max_epochs`` are not taken: the old ones stay, and the record says why.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from megatron_syne.config.schema import ReweightingConfig, RunConfig
from megatron_syne.data.mixture.reweighting import group_members, reweighted
from megatron_syne.data.mixture.supply import shortages
from megatron_syne.training.callback import Callback

if TYPE_CHECKING:
    from megatron_syne.training.trainer import Trainer


class Reweighting(Callback):
    """``data.reweighting``, on every rank."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.groups = config.data.reweighting
        self.mixtures = {stage.name: stage.mixture for stage in config.data.stages}

    def on_evaluation(self, trainer: Trainer, losses: dict[str, float]) -> None:
        """Adjust each group whose interval has come."""
        for options in self.groups:
            if trainer.state.step % options.interval == 0 and trainer.state.step < trainer.train_iters:
                self.adjust(trainer, options, losses)

    def adjust(self, trainer: Trainer, options: ReweightingConfig, losses: dict[str, float]) -> None:
        """New shares for one group, and a record of it; nothing where the stage to come has no such group."""
        data, sample = trainer.train_data, trainer.state.consumed_samples
        stage = data.plan.segment_at(sample).stage
        members = group_members(self.mixtures[stage], options.group)
        if not members:
            return
        now = {name: math.exp(min(losses[name], 50.0)) for name in members}
        reason = f"reweighting {options.group}"
        before = next((c["perplexity"] for c in reversed(data.changes) if c["reason"] == reason), None)
        record: dict[str, Any] = {"sample": sample, "step": trainer.state.step, "reason": reason}
        record |= {"detail": f"stage {stage}", "perplexity": now}
        if before is not None and set(before) >= set(members):
            segment = data.plan.segment_at(sample)
            old = {name: segment.shares[data.plan.sources.index(name)] for name in members}
            new = reweighted(old, before, now, options.alpha, options.weights)
            plan = data.plan.with_shares(sample, new, reason)
            if short := shortages(plan, data.dataset.epoch_tokens(), self.config):
                record["detail"] += f", shares kept: {'; '.join(short)}"
            else:
                record["shares"] = new
                data.replace_plan(plan)
        data.changes.append(record)
