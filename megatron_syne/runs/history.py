"""A run's figures, read back from its folder or a file: whole, or up to where it breaks off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_syne.errors import DISK_ERRNOS, DataError, MissingInput
from megatron_syne.runs.golden import read_golden
from megatron_syne.runs.recorder import Recorder, Series, chosen
from megatron_syne.runs.text import readable

__all__ = ["History", "Series", "read_history"]


@dataclass
class History:
    """All figures of one run."""

    name: str
    path: Path
    series: dict[str, Series]
    """By the name in ``metrics.jsonl`` (``loss``, ``loss/zh``, ``validation/zh``, ...)."""
    stages: list[tuple[str, int]]
    """(name, first step) of each stage."""
    problems: list[str]
    """What could not be read, with file and line, and steps that were logged twice."""
    broken: bool = False
    """Something is damaged before the end, so good figures may have been left out."""
    single_precision: bool = False
    """Values were rounded to float32 when they were written (tensorboard)."""
    names: list[str] = field(default_factory=list)
    """All metrics that were met, also those that were not kept."""

    @property
    def steps(self) -> Sequence[int]:
        """The steps of the series that has most."""
        return max((series.steps for series in self.series.values()), key=len, default=())

    @property
    def last_step(self) -> int:
        """The newest step of any series that was kept; -1 = none was."""
        return max((series.steps[-1] for series in self.series.values()), default=-1)


def read_history(path: str | Path, keep: Sequence[str] | None = None) -> History:
    """Of a run folder, a ``metrics.jsonl``, tensorboard's folder or event file, or a golden JSON file.

    A run folder's ``metrics.jsonl`` comes first; without one, its tensorboard events. ``keep``: only the series that
    match one of these shell patterns are held in memory. Raises MissingInput where there is nothing, DataError where
    there is nothing that can be read.
    """
    path = Path(path)
    try:
        return _read(path, keep)
    except OSError as error:
        if error.errno in DISK_ERRNOS:
            raise
        raise MissingInput(f"{error.filename or path}: cannot be read: {error.strerror}") from None


def _read(path: Path, keep: Sequence[str] | None) -> History:
    if not path.exists():
        raise MissingInput(f"{path}: no such run folder or file")
    if path.suffix == ".json" and path.is_file():
        return _of_golden(path, keep)
    source, events = _source(path)
    if events:
        from megatron_syne.runs.event_files import read_events

        recorder, problems, broken = read_events(events, keep)
    else:
        from megatron_syne.runs.metrics_file import read_metrics

        recorder, problems, broken = read_metrics(source, keep)
    series = {name: each for name, each in recorder.series.items() if each.steps}
    if recorder.newest < 0:
        why = problems[0] if problems else f"{source}: holds no step"
        raise DataError(f"{why}; nothing to show")
    if not recorder.stages and path.is_dir():
        recorder.stages, remark = _planned_stages(path / "config.yaml", recorder)
        problems += remark
    return History(
        _name(path), path, series, recorder.stages, problems, broken, bool(events), recorder.names()
    )


def _of_golden(path: Path, keep: Sequence[str] | None) -> History:
    name, series = read_golden(path)
    kept = {each: series[each] for each in chosen(list(series), keep)}
    return History(name, path, kept, [], [], names=list(series))


def _source(path: Path) -> tuple[Path, list[Path]]:
    """The ``metrics.jsonl``, or the event files, that a path means."""
    if path.is_file():
        return path, [path] if "tfevents" in path.name else []
    metrics = path / "metrics.jsonl"
    if metrics.is_file():
        return metrics, []
    from megatron_syne.runs.event_files import event_files

    for folder in (path / "tensorboard", path):
        if folder.is_dir() and (found := event_files(folder)):
            return folder, found
    raise MissingInput(
        f"{path}: no metrics.jsonl and no tensorboard events in it; give the folder of a run "
        "(run_dir of its configuration), a metrics.jsonl or a golden .json file"
    )


def _name(path: Path) -> str:
    """A run is known by its folder."""
    real = path.resolve()
    inner = path.is_file() or real.name == "tensorboard"
    return readable(real.parent.name if inner and real.parent.name else real.name)


def _planned_stages(path: Path, recorder: Recorder) -> tuple[list[tuple[str, int]], list[str]]:
    """(stages, remarks) by the token budgets in the run's configuration, for runs that did not log the stage."""
    tokens = recorder.series.get("consumed_tokens")
    if tokens is None or not path.is_file():
        return [], []
    import yaml

    try:
        data: Mapping[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))["data"]
        plan = [(readable(str(stage["name"])), float(stage["tokens"])) for stage in data.get("stages") or []]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError):
        return [], [f"{path}: no stages could be read from it"]
    found: list[tuple[str, int]] = []
    before, end = 0.0, 0.0
    for step, consumed in zip(tokens.steps, tokens.values, strict=True):
        # a stage ends with the global batch that fills its budget, so the next one begins at what was consumed
        while len(found) < len(plan) and before >= end:
            name, budget = plan[len(found)]
            found.append((name, step))
            end = before + budget
            if budget > 0:
                break
        before = consumed
    return found, []
