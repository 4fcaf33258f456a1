"""Golden files: the figures that a run must give again, small enough to be kept beside the code.

    {"version": 1, "name": "toy", "created_by": "megatron-syne 0.5",
     "series": {"loss": {"steps": [1, 2], "values": [7.87, 7.86], "hex": ["0x1.f7b39fp+2", "0x1.f7beba0p+2"]}}}

Read strictly: a golden file that is not what was written must not pass for equal. ``hex`` may be left out.
"""

from __future__ import annotations

import contextlib
import math
import os
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from megatron_syne import __version__
from megatron_syne.errors import DISK_ERRNOS, CannotCreate, ConfigError, DataError
from megatron_syne.runs.recorder import Series

VERSION = 1
_FIELDS = ("version", "name", "created_by", "series")
_SERIES_FIELDS = ("steps", "values", "hex")


def write_golden(path: str | Path, name: str, series: Mapping[str, Series]) -> None:
    """Write the file whole. ConfigError where its name does not end in ``.json``, DataError for a value that is NaN
    or infinite (naming it), CannotCreate."""
    path = Path(path)
    if path.suffix != ".json":
        raise ConfigError(f"{path}: golden files are written as .json")
    for metric, each in series.items():
        for step, value in zip(each.steps, each.values, strict=True):
            if not math.isfinite(value):
                raise DataError(f"{name}: {metric} is {value} at step {step}; a golden run has finite values")
    content = {
        "version": VERSION,
        "name": name,
        "created_by": f"megatron-syne {__version__}",
        "series": {
            metric: {
                "steps": each.steps.tolist(),
                "values": each.values.tolist(),
                "hex": [value.hex() for value in each.values],
            }
            for metric, each in series.items()
        },
    }
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(orjson.dumps(content) + b"\n")
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in DISK_ERRNOS:
            raise
        raise CannotCreate(f"{path}: cannot be created: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_golden(path: Path) -> tuple[str, dict[str, Series]]:
    """(name, series); DataError names the field that is not as it must be."""
    try:
        content = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise DataError(f"{path}: no JSON: {error}") from None
    _fields(path, "the file", content, _FIELDS, _FIELDS)
    version = content["version"]
    if type(version) is not int or version != VERSION:
        raise DataError(f"{path}: version: expected {VERSION}, found {version!r:.40}")
    for field in ("name", "created_by"):
        if not isinstance(content[field], str):
            raise DataError(f"{path}: {field}: expected text, found {content[field]!r:.40}")
    if not isinstance(content["series"], dict) or not content["series"]:
        raise DataError(f"{path}: series: expected at least one metric")
    return content["name"], {
        metric: _series(path, f"series.{metric}", each) for metric, each in content["series"].items()
    }


def _series(path: Path, where: str, raw: Any) -> Series:
    _fields(path, where, raw, _SERIES_FIELDS[:2], _SERIES_FIELDS)
    for field in raw:
        if not isinstance(raw[field], list):
            raise DataError(f"{path}: {where}.{field}: expected a list, found {type(raw[field]).__name__}")
        if len(raw[field]) != len(raw["steps"]):
            raise DataError(
                f"{path}: {where}.{field}: {len(raw[field]):,} entries for {len(raw['steps']):,} steps"
            )
    if not raw["steps"]:
        raise DataError(f"{path}: {where}.steps: is empty")
    before = -1
    for number, step in enumerate(raw["steps"]):
        if type(step) is not int or not before < step < 1 << 62:
            raise DataError(
                f"{path}: {where}.steps[{number}]: expected a number above {before}, found {step!r:.40}"
            )
        before = step
    for number, value in enumerate(raw["values"]):
        if type(value) not in (int, float) or not math.isfinite(value):
            found = "null or NaN" if value is None else f"{value!r:.40}"
            raise DataError(f"{path}: {where}.values[{number}]: expected a finite number, found {found}")
    for number, text in enumerate(raw.get("hex", [])):
        try:
            same = float.fromhex(text) == raw["values"][number]
        except (ValueError, TypeError, OverflowError):
            same = False
        if not same:
            raise DataError(f"{path}: {where}.hex[{number}]: {text!r:.40} is not {raw['values'][number]!r}")
    return Series(array("q", raw["steps"]), array("d", raw["values"]))


def _fields(path: Path, where: str, raw: Any, needed: tuple[str, ...], known: tuple[str, ...]) -> None:
    if not isinstance(raw, dict):
        raise DataError(f"{path}: {where}: expected an object, found {type(raw).__name__}")
    for field in needed:
        if field not in raw:
            raise DataError(f"{path}: {where}: no field {field!r}; a golden file has {', '.join(known)}")
    for field in raw:
        if field not in known:
            raise DataError(f"{path}: {where}: unknown field {field!r}; known are {', '.join(known)}")
