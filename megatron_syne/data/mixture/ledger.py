"""What a checkpoint says about data: the plan, what was consumed of each source, which files, what changed.

It stands in ``state.json`` under ``data``. Everything in it follows from the plan and the number of samples
consumed, so a run resumed from it goes on at the next sample in any layout. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_syne.config.schema import SourceConfig
from megatron_syne.data.mixture.plan import MixturePlan
from megatron_syne.errors import ConfigError, DataError

VERSION = 1
"""Accounts from before stages had batches of their own are of this version too: what their plan lacks has one
meaning (``plan_json``)."""
OPTIONS = ("order", "order_by", "first_tokens", "top_fraction", "top_by", "top_is")
"""Of a source: what decides which of its documents are read, and in which order."""


def source_options(source: SourceConfig) -> dict[str, Any]:
    """What decides a source's documents and their order: fixed once it was read from."""
    return {name: getattr(source, name) for name in OPTIONS}


def make_ledger(
    plan: MixturePlan,
    consumed_samples: int,
    sources: Mapping[str, Mapping[str, Any]],
    changes: Sequence[Mapping[str, Any]] = (),
    previous: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The record after ``consumed_samples`` samples, as plain JSON.

    ``sources``: by name, ``bin_sha256``, ``idx_sha256``, ``options`` and what else must stay;
    ``changes``: all so far, each with ``sample``, ``step`` and ``reason``. ``previous`` = the ledger that the
    run resumed from: it names the sources that are not open any more.
    """
    known = dict(previous["sources"]) if previous is not None else {}
    return {
        "version": VERSION,
        "seed": plan.seed,
        "consumed_samples": consumed_samples,
        "plan": plan.to_dict(),
        "counters": counters(plan, consumed_samples),
        "sources": known | {name: dict(facts) for name, facts in sources.items()},
        "changes": [dict(change) for change in changes],
    }


def counters(plan: MixturePlan, consumed_samples: int) -> dict[str, dict[str, dict[str, int]]]:
    """Samples and tokens of each source in each stage so far: ``{stage: {source: {"samples", "tokens"}}}``."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for segment, counts in plan.counts_until(consumed_samples):
        stage = found.setdefault(segment.stage, {})
        for name, count, share in zip(plan.sources, counts, segment.shares, strict=True):
            if share or count:
                row = stage.setdefault(name, {"samples": 0, "tokens": 0})
                row["samples"] += count
                row["tokens"] += count * segment.seq_length
    return found


def check_ledger(ledger: Any, consumed_samples: int) -> None:
    """Raise DataError where a record cannot be this version's, or contradicts itself or the trainer's state."""
    if not isinstance(ledger, Mapping):
        raise DataError(f"data: expected an object, found {type(ledger).__name__}")
    if ledger.get("version") != VERSION:
        raise DataError(
            f"data.version: expected {VERSION}, found {ledger.get('version')!r}; the checkpoint is of another "
            f"version of this program"
        )
    for key, kind in {"seed": int, "consumed_samples": int, "sources": dict, "changes": list}.items():
        if not isinstance(ledger.get(key), kind):
            raise DataError(f"data.{key}: expected {kind.__name__}, found {ledger.get(key)!r}")
    if ledger["consumed_samples"] != consumed_samples:
        raise DataError(
            f"data.consumed_samples: expected {consumed_samples} as in the trainer's state, found "
            f"{ledger['consumed_samples']}"
        )
    plan = MixturePlan.from_dict(ledger.get("plan"), "data.plan")
    if not 0 <= consumed_samples <= plan.num_samples:
        raise DataError(f"data.consumed_samples: {consumed_samples} of a plan of {plan.num_samples} samples")
    if plan.seed != ledger["seed"]:
        raise DataError(f"data.seed: {ledger['seed']} is not that of data.plan, {plan.seed}")
    if ledger.get("counters") != counters(plan, consumed_samples):
        raise DataError("data.counters: do not follow from data.plan; the record was changed")


def check_sources(ledger: Mapping[str, Any], sources: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise where a source that was read from is another now: its files (DataError), its options (ConfigError).

    ``sources`` as in :func:`make_ledger`, of those that are open; all problems are told at once.
    """
    consumed = {
        name for stage in ledger["counters"].values() for name, row in stage.items() if row["samples"]
    }
    changed, options = [], []
    for name, now in sources.items():
        was = ledger["sources"].get(name)
        if name not in consumed or was is None:
            continue
        for key in was.keys() & now.keys() - {"options"}:
            if was[key] != now[key]:
                changed.append(f"data.sources.{name}: {key} was {_short(was[key])}, now {_short(now[key])}")
        before, after = was.get("options", {}), now.get("options", {})
        options += [
            f"data.sources.{name}.{key}: {before.get(key)} -> {after.get(key)}"
            for key in dict.fromkeys([*before, *after])
            if before.get(key) != after.get(key)
        ]
    if changed:
        lines = "".join(f"\n  {text}" for text in sorted(changed))
        raise DataError(
            f"files that this run has read from were changed since its checkpoint:{lines}\n"
            f"put the files back, or give new text a new source name"
        )
    if options:
        lines = "".join(f"\n  {text}" for text in options)
        raise ConfigError(
            f"options of sources that this run has read from cannot change:{lines}\n"
            f"set them back, or name the files a second time as a new source"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 20 else f"{text[:12]}..."
