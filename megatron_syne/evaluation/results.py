"""The file that an evaluation leaves: written whole or not at all, read back by the training. No torch."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from megatron_syne.errors import CannotCreate, DataError

FORMAT = {"format": "megatron_syne.evaluation", "version": 1}


def write_results(path: Path, content: dict[str, Any]) -> None:
    """Write the file and bring it to the disk; an earlier one of that name is replaced. Raises CannotCreate."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as stream:
            json.dump({**FORMAT, **content}, stream, indent=1, allow_nan=False)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError, IsADirectoryError) as error:
        raise CannotCreate(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_results(path: Path) -> dict[str, Any]:
    """What :func:`write_results` wrote; DataError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        good = {name: content[name] for name in FORMAT} == FORMAT and isinstance(content["results"], dict)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not the results of an evaluation ({error})") from None
    if not good:
        raise DataError(f"{path}: not the results of an evaluation of version {FORMAT['version']}")
    return dict(content)


def flat_metrics(content: dict[str, Any]) -> dict[str, float]:
    """``task/metric`` -> value of everything that was measured; what was not finite is left out."""
    return {
        f"{task}/{metric}": float(value)
        for task, metrics in content["results"].items()
        for metric, value in metrics.items()
        if value is not None
    }


def tables(raw: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """(values, standard errors) of the harness's results, each ``{task: {metric: number, or None}}``.

    The harness names a metric ``acc,none``: the metric, and the filter that the answers went through. "none"
    is left out of the name; a value that is not finite becomes None, as JSON knows no other.
    """
    values: dict[str, dict[str, Any]] = {}
    errors: dict[str, dict[str, Any]] = {}
    for task, row in raw.items():
        for key, value in row.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or isinstance(value, bool | str) or not isinstance(value, int | float):
                continue  # the task's name, and standard errors that it has none of ("N/A")
            into = errors if metric.endswith("_stderr") else values
            name = metric.removesuffix("_stderr") + ("" if filter_name == "none" else f",{filter_name}")
            into.setdefault(task, {})[name] = float(value) if math.isfinite(value) else None
    return values, errors
