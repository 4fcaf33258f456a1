"""What a training run tells of itself: its resolved configuration, how far a checkpoint is, the last evaluation.

Read from the files of the run folder (``config.yaml``, ``metrics.jsonl``, ``checkpoints/iter_*/state.json``)
as they are: for a release, on a machine that may have no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_syne.config.loader import load_config
from megatron_syne.config.schema import ParallelConfig, RunConfig
from megatron_syne.data.mixture.planning import MixturePlan
from megatron_syne.errors import DataError, MissingInput
from megatron_syne.models.json_file import read_json

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
_NAME = re.compile(r"iter_\d{7,}")


@dataclass(frozen=True)
class SourceShare:
    """One source of text in one stage."""

    source: str
    share: float
    """Of the stage's tokens, as trained so far (as planned, where the stage has not begun)."""
    tokens: int
    """Trained so far."""


@dataclass(frozen=True)
class StageDone:
    """One stage of the mixture and how much of it was trained."""

    name: str
    planned_tokens: int
    """Rounded up to whole global batches, as it is trained."""
    trained_tokens: int
    shares: tuple[SourceShare, ...]


@dataclass(frozen=True)
class RunFacts:
    """A run, at one checkpoint."""

    config: RunConfig
    step: int
    consumed_tokens: int
    parallel: ParallelConfig
    """Of the process group that wrote the checkpoint."""
    stages: tuple[StageDone, ...]
    """Empty for a run on random tokens (``data.mock``)."""
    planned_steps: int
    evaluation_step: int | None
    losses: Mapping[str, float]
    """Validation loss of each source at ``evaluation_step``."""
    origin: Mapping[str, Any] | None
    """``certificate.json`` of the weights that it started from, where they are still there."""
    start: str | None
    """Name of the folder that it started from; None = random weights."""


def locate(path: Path) -> tuple[Path, Path | None]:
    """(folder of weights, run folder or None) of a run folder, one of its checkpoints, or any weights.

    Of a run it is the newest checkpoint. Raises MissingInput where the run has none.
    """
    if (path / CONFIG).is_file() and not (path / "config.json").exists():
        root = path / CHECKPOINTS
        found = sorted(
            (p for p in root.glob("iter_*") if _NAME.fullmatch(p.name)), key=lambda p: int(p.name[5:])
        )
        if not found:
            raise MissingInput(f"{root}: no checkpoint (iter_*) to release")
        return found[-1], path
    real = path.resolve()
    run_dir = real.parent.parent
    if _NAME.fullmatch(real.name) and real.parent.name == CHECKPOINTS and (run_dir / CONFIG).is_file():
        return path, run_dir
    return path, None


def read_run(run_dir: Path, checkpoint: Path) -> RunFacts:
    """The facts of a run at one of its checkpoints.

    Raises ConfigError or DataError where a file of the run is not what this program writes.
    """
    config = load_config(run_dir / CONFIG)
    where = checkpoint / "state.json"
    raw = read_json(where)
    try:
        step, tokens = (int(raw["state"][n]) for n in ("step", "consumed_tokens"))
        parallel = ParallelConfig(**raw["layout"])
        ledger = raw["data"]
        plan = MixturePlan.from_dict(ledger["plan"], f"{where}: data.plan")
        counters = {str(k): dict(v) for k, v in ledger["counters"].items()}
        stages = () if config.data.mock else tuple(_stages(plan, counters))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DataError(
            f"{where}: expected state (step, consumed_tokens), layout and data (plan, counters)"
        ) from None
    at, losses = _last_evaluation(run_dir / "metrics.jsonl", step)
    start = config.checkpoint.initialize_from
    return RunFacts(
        config=config,
        step=step,
        consumed_tokens=tokens,
        parallel=parallel,
        stages=stages,
        planned_steps=plan.train_iters,
        evaluation_step=at,
        losses=losses,
        origin=_certificate(Path(start)) if start else None,
        start=Path(start).name if start else None,
    )


def _stages(plan: MixturePlan, counters: Mapping[str, Any]) -> Iterator[StageDone]:
    """Each stage of the plan with what the ledger counted; only whole counts, so it also tells of changed shares."""
    for stage in plan.stages:
        done = {name: int(row["tokens"]) for name, row in counters.get(stage.name, {}).items()}
        trained = sum(done.values())
        if trained:
            shares = {name: tokens / trained for name, tokens in done.items()}
        else:
            last = [segment for segment in plan.segments if segment.stage == stage.name][-1:]
            shares = {
                name: share
                for segment in last
                for name, share in zip(plan.sources, segment.shares, strict=True)
                if share
            }
        parts = tuple(SourceShare(name, share, done.get(name, 0)) for name, share in shares.items())
        yield StageDone(stage.name, stage.tokens, trained, parts)


def _last_evaluation(path: Path, step: int) -> tuple[int | None, dict[str, float]]:
    """(step, loss by source) of the last evaluation up to a step; a torn last line is passed over."""
    found: tuple[int | None, dict[str, float]] = (None, {})
    if not path.is_file():
        return found
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if '"validation"' not in line:
                continue
            try:
                row = json.loads(line)
                at, losses = int(row["step"]), {str(k): float(v) for k, v in row["validation"].items()}
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
            if at <= step:
                found = (at, losses)
    return found


def _certificate(folder: Path) -> dict[str, Any] | None:
    path = folder / "certificate.json"
    return read_json(path) if path.is_file() else None
