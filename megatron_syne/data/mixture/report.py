"""A plan for people: a table for the console, and the shares over tokens for a picture. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_syne.data.mixture.plan import MixturePlan
from megatron_syne.data.mixture.supply import epochs_read


def describe_plan(plan: MixturePlan, token_counts: Mapping[str, int] | None = None) -> dict[str, Any]:
    """The plan in numbers. ``token_counts``: tokens of one epoch of each source, where known.

    Per stage and source: share (by samples, as re-weighting may move what was asked), samples, tokens,
    ``epochs`` in the stage and ``epochs_so_far`` at its end (None where unknown). Per source of the run:
    tokens, epochs, and ``unread``: tokens of the first epoch that are never reached.
    """
    known = token_counts or {}
    stages, so_far = [], epochs_read(plan, known, 0)
    for stage in plan.stages:
        end = stage.first_sample + stage.samples
        before, after = plan.consumed(stage.first_sample), plan.consumed(end)
        asked = dict(next(each for each in plan.asked if each.name == stage.name).shares)
        own = [segment for segment in plan.segments if segment.stage == stage.name]
        moved = any(segment.shares != own[0].shares for segment in own)
        samples = {
            name: sum(segment.counts[column] for segment in own) for column, name in enumerate(plan.sources)
        }
        now = epochs_read(plan, known, end)
        rows = {
            name: {
                "share": samples[name] / stage.samples if moved else asked.get(name, 0.0),
                "samples": samples[name],
                "tokens": after[name] - before[name],
                "epochs": now[name] - so_far[name] if name in known else None,
                "epochs_so_far": now.get(name),
            }
            for name in plan.sources
            if name in asked or samples[name]
        }
        lengths = list(dict.fromkeys(segment.seq_length for segment in own))
        stages.append(
            {
                "name": stage.name,
                "tokens_asked": stage.tokens_asked,
                "tokens": stage.tokens,
                "samples": stage.samples,
                "iterations": stage.iterations,
                "seq_lengths": lengths,
                "segments": len(own),
                "mixtures": sum(segment.reason != "ramp" for segment in own),
                "global_batch_sizes": list(dict.fromkeys(segment.global_batch_size for segment in own)),
                "sources": rows,
            }
        )
        so_far = now
    total = plan.consumed(plan.num_samples)
    return {
        "train_iters": plan.train_iters,
        "samples": plan.num_samples,
        "tokens": plan.num_tokens,
        "global_batch_size": plan.global_batch_size,
        "stages": stages,
        "sources": {
            name: {
                "tokens": total[name],
                "epochs": so_far.get(name),
                "unread": max(0, known[name] - total[name]) if name in known else None,
            }
            for name in plan.sources
        },
    }


def plan_table(plan: MixturePlan, token_counts: Mapping[str, int] | None = None) -> str:
    """The plan as a table; a source read more than once is marked, and what is left of each one is told."""
    numbers = describe_plan(plan, token_counts)
    width = max([len(name) for name in plan.sources] + [len(each.name) + 6 for each in plan.asked] + [12])
    heads = f"{'share':>8} {'samples':>14} {'tokens':>20} {'epochs':>8} {'so far':>8}"
    lines = [f"{'':{width}} {heads}"]
    for stage in numbers["stages"]:
        length = " then ".join(f"{length:,}" for length in stage["seq_lengths"])
        changed = f", {stage['mixtures']} mixtures" if stage["mixtures"] > 1 else ""
        sizes = stage["global_batch_sizes"]
        if sizes != [numbers["global_batch_size"]]:
            grows = f"{sizes[0]:,} to {sizes[-1]:,}" if len(sizes) > 1 else f"{sizes[0]:,}"
            changed = f" in global batches of {grows}{changed}" if sizes else changed
        lines.append(
            f"{'stage ' + stage['name']:{width}} {'':>8} {stage['samples']:>14,} {stage['tokens']:>20,}"
            f" {'':>17}  {stage['iterations']:,} iterations of sequences of {length}{changed}"
        )
        for name, row in stage["sources"].items():
            so_far = row["epochs_so_far"]
            note = ""
            if row["samples"] == 0:
                note = "  never read: the share is less than one sample"
            elif so_far is not None and so_far > 1 and row["epochs"] > 0:
                note = "  repeats"
            lines.append(
                f"{'  ' + name:{width}} {row['share']:>8.4f} {row['samples']:>14,} {row['tokens']:>20,}"
                f" {_epochs(row['epochs']):>8} {_epochs(so_far):>8}{note}"
            )
    lines.append(
        f"{'run':{width}} {'':>8} {numbers['samples']:>14,} {numbers['tokens']:>20,}"
        f" {'':>17}  {numbers['train_iters']:,} iterations"
    )
    left = [f"{name} {row['unread']:,}" for name, row in numbers["sources"].items() if row["unread"]]
    if left:
        lines.append(f"tokens never read: {', '.join(left)}")
    return "\n".join(line.rstrip() for line in lines)


def _epochs(value: float | None) -> str:
    return "?" if value is None else "inf" if math.isinf(value) else f"{value:.2f}"


def mixture_over_tokens(plan: MixturePlan) -> tuple[NDArray[np.int64], dict[str, NDArray[np.float64]]]:
    """Shares of the sources over the run, for a picture of stacked areas.

    Token positions [2 x segments]: begin and end of each segment in turn; and of each source that is read the
    share at each of them, so that lines between them are level within a segment and upright between two.
    """
    positions, at = [], 0
    for segment in plan.segments:
        positions += [at, at + segment.tokens]
        at += segment.tokens
    shares = {
        name: np.repeat([segment.counts[column] / segment.samples for segment in plan.segments], 2)
        for column, name in enumerate(plan.sources)
    }
    return np.array(positions, dtype=np.int64), {name: row for name, row in shares.items() if row.any()}
