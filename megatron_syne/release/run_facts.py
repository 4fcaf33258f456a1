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

from megatron_syne.config.arithmetic import tokens_per_step
from megatron_syne.config.loader import load_config
from megatron_syne.config.schema import ParallelConfig, RunConfig
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
    """Of the stage's tokens; groups multiplied out."""


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
    planned_steps: int | None
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
        step, samples, tokens = (
            int(raw["state"][n]) for n in ("step", "consumed_samples", "consumed_tokens")
        )
        parallel = ParallelConfig(**raw["layout"])
    except (KeyError, TypeError, ValueError):
        raise DataError(
            f"{where}: expected state (step, consumed_samples, consumed_tokens) and layout"
        ) from None
    stages = tuple(_stages(config, samples))
    planned = config.train.train_iters
    if planned is None and stages:
        planned = sum(stage.planned_tokens for stage in stages) // tokens_per_step(config)
    at, losses = _last_evaluation(run_dir / "metrics.jsonl", step)
    start = config.checkpoint.initialize_from
    return RunFacts(
        config=config,
        step=step,
        consumed_tokens=tokens,
        parallel=parallel,
        stages=stages,
        planned_steps=planned,
        evaluation_step=at,
        losses=losses,
        origin=_certificate(Path(start)) if start else None,
        start=Path(start).name if start else None,
    )


def _stages(config: RunConfig, consumed_samples: int) -> Iterator[StageDone]:
    """A stage is a whole number of global batches, as ``data.mixture`` plans it."""
    if config.data.mock:
        return
    left = consumed_samples * config.data.seq_length
    for stage in config.data.stages:
        step = tokens_per_step(config)
        planned = -(-stage.tokens // step) * step
        trained = min(left, planned)
        left -= trained
        shares = tuple(SourceShare(name, share) for name, share in _flat(stage.mixture, 1.0))
        yield StageDone(stage.name, planned, trained, shares)


def _flat(mixture: Mapping[str, Any], whole: float) -> Iterator[tuple[str, float]]:
    for name, part in mixture.items():
        if isinstance(part, Mapping):
            yield from _flat(part["of"], whole * float(part["share"]))
        else:
            yield name, whole * float(part)


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
