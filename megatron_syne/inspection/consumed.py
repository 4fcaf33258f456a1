"""``consumed``: what a run has read up to its newest checkpoint, by the checkpoint's own ledger."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from megatron_syne.checkpoint.folder import newest, read_run
from megatron_syne.config.loader import load_config
from megatron_syne.data.mixture.ledger import check_ledger
from megatron_syne.data.mixture.plan import MixturePlan
from megatron_syne.data.mixture.supply import epochs_read
from megatron_syne.errors import DataError, MissingInput
from megatron_syne.inspection.text import say
from megatron_syne.preflight.manifests import source_token_counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("run_dir", help="folder of the run")
    parser.add_argument("--output", metavar="PNG", help="also write a picture")


def run(options: argparse.Namespace) -> int:
    """Print, and draw where asked; returns the exit code."""
    folder, ledger, step = ledger_of(options.run_dir)
    plan, sample = MixturePlan.from_dict(ledger["plan"], "data.plan"), ledger["consumed_samples"]
    say(f"{folder}: step {step:,} of {plan.train_iters:,}, {sample:,} of {plan.num_samples:,} samples")
    known = epoch_tokens(options.run_dir)
    say(consumed_table(ledger, plan, known))
    for change in ledger["changes"]:
        say(described(change))
    if options.output:
        from megatron_syne.inspection.mixture import draw

        tokens = sum(plan.consumed(sample).values())
        draw(options.output, plan, epochs_read(plan, known, sample), tokens)
        say(f"picture: {options.output}")
    return 0


def ledger_of(run_dir: str | Path) -> tuple[Path, dict[str, Any], int]:
    """(checkpoint, ledger, step) of the newest whole checkpoint; MissingInput, DataError."""
    root = Path(run_dir) / "checkpoints"
    folder = newest(root) if root.is_dir() else None
    if folder is None:
        raise MissingInput(f"{root}: no checkpoint; nothing is known to be consumed")
    run = read_run(folder)
    if "data" not in run:
        raise DataError(f"{folder}: was written before checkpoints kept an account of the data")
    try:
        check_ledger(run["data"], run["state"]["consumed_samples"])
    except DataError as error:
        raise DataError(f"{folder / 'state.json'}: {error}") from None
    return folder, run["data"], int(run["state"]["step"])


def epoch_tokens(run_dir: str | Path) -> dict[str, int]:
    """Tokens of one epoch of each source whose manifest is still where the run's configuration says."""
    config = Path(run_dir) / "config.yaml"
    return source_token_counts(load_config(config))[0] if config.is_file() else {}


def consumed_table(ledger: dict[str, Any], plan: MixturePlan, known: dict[str, int]) -> str:
    """Samples, tokens, share and epochs of each source in each stage, and of each source in all.

    ``known``: tokens of one epoch of each source, where they are known.
    """
    names = [*plan.sources, *(f"stage {stage}" for stage in ledger["counters"])]
    width = max(12, *(len(name) + 2 for name in names))
    lines = [f"{'':{width}} {'samples':>12} {'tokens':>18} {'share':>8} {'epochs':>8}"]

    def block(title: str, rows: dict[str, dict[str, int]], epochs: dict[str, float]) -> None:
        samples = sum(row["samples"] for row in rows.values())
        tokens = sum(row["tokens"] for row in rows.values())
        lines.append(f"{title:{width}} {samples:>12,} {tokens:>18,}")
        for name, row in rows.items():
            share = row["tokens"] / tokens if tokens else 0.0
            passes = f"{epochs[name]:.3f}" if name in epochs else "?"
            lines.append(
                f"{'  ' + name:{width}} {row['samples']:>12,} {row['tokens']:>18,} {share:>8.4f} {passes:>8}"
            )

    whole: dict[str, dict[str, int]] = {}
    for stage, rows in ledger["counters"].items():
        own = {name: row["tokens"] / known[name] for name, row in rows.items() if name in known}
        block(f"stage {stage}", rows, own)
        for name, row in rows.items():
            sums = whole.setdefault(name, {"samples": 0, "tokens": 0})
            for key in sums:
                sums[key] += row[key]
    block("all", whole, epochs_read(plan, known, ledger["consumed_samples"]))
    return "\n".join(line.rstrip() for line in lines)


def described(change: dict[str, Any]) -> str:
    """One change in a line: where, why, and what it says beside."""
    words = [str(change.get("reason"))]
    for key, value in change.items():
        if key not in ("sample", "step", "reason"):
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            words.append(text if key == "detail" else f"{key} {text}")
    return f"changed at sample {change.get('sample')}, step {change.get('step')}: {', '.join(words)}"
