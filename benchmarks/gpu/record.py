"""What every measurement on a GPU leaves behind: one JSON object a case, with the machine that it was taken on.

Read by ``report.py`` (tables), ``planned.py`` (beside the planner) and by people. No torch at import: a result is read
anywhere.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

UNKNOWN = "unknown"


@dataclass
class Record:
    """One case measured. Times in seconds, memory in bytes; ``None`` = not measured here."""

    case: str
    """Name of the case, unique in a folder of results."""
    kind: str
    """``ours``, ``transformers``, ``compiled``, ``torchtitan``, or what else was measured (``machine``, ``loader``)."""
    command: str
    """What to type to measure it again, from the root of the checkout."""
    shape: dict[str, int] = field(default_factory=dict)
    """``num_layers``, ``hidden_size``, ``ffn_hidden_size``, ``num_attention_heads``, ``num_query_groups``,
    ``vocab_size``, ``seq_length``, ``micro_batch_size``, ``global_batch_size``."""
    precision: str = ""
    """``bf16``, ``fp32``, ``delayed``, ``tensorwise``, ``blockwise``."""
    step_seconds: list[float] = field(default_factory=list)
    """Of each step after the warm ones."""
    warm_steps: int = 0
    """Steps left out before them."""
    losses: list[float] = field(default_factory=list)
    """Of every step, the warm ones too."""
    tokens_per_step: int = 0
    model_flops_per_token: float = 0.0
    """``megatron_syne/models/flops.py``: forward and backward, no recomputation, causal attention counted by half."""
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    """Median of the parts of a step: ``data``, ``forward_backward``, ``optimizer``, ``watching``, ..."""
    config: dict[str, Any] | None = None
    """The run as the planner takes it (``config_of`` of its YAML), where it was ours."""
    found: dict[str, Any] = field(default_factory=dict)
    """Whatever else the case is about, by name."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Of :func:`environment`."""
    error: str | None = None
    """Why there are no figures: the last lines of what failed."""

    @property
    def median_seconds(self) -> float | None:
        """Of a step."""
        return statistics.median(self.step_seconds) if self.step_seconds else None

    @property
    def tokens_per_second(self) -> float | None:
        """At the median step."""
        seconds = self.median_seconds
        return self.tokens_per_step / seconds if seconds else None

    @property
    def model_flops_per_second(self) -> float | None:
        """Model FLOP/s at the median step (not counting what is computed again)."""
        rate = self.tokens_per_second
        return rate * self.model_flops_per_token if rate else None

    def write(self, folder: Path) -> Path:
        """``<folder>/<case>.json``, written whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.case}.json"
        temporary = path.with_suffix(".json.tmp")
        temporary.write_text(json.dumps(asdict(self), indent=1) + "\n")
        temporary.replace(path)
        return path


def read_records(folder: Path) -> dict[str, Record]:
    """Every case in a folder, by name, in the order of their names."""
    found = [Record(**json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]
    return {record.case: record for record in found}


def environment(device_name: str | None) -> dict[str, Any]:
    """Versions, GPU, driver, commit and date; ``device_name`` is torch's, None on a CPU. The commit is git's, or where
    the checkout came without its history what ``MEASURED_COMMIT`` says."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for package in (
        "torch",
        "megatron-core",
        "transformer_engine",
        "transformers",
        "triton",
        "nvidia-dali-cuda130",
    ):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    return {
        "device": device_name or f"CPU, {os.cpu_count()} cores",
        "driver": first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "commit": os.environ.get("MEASURED_COMMIT") or first_line(["git", "rev-parse", "--short", "HEAD"]),
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions,
    }


def first_line(command: list[str]) -> str:
    """What a command says first, or :data:`UNKNOWN` where it cannot be asked."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return UNKNOWN
    return (done.stdout.splitlines() or [UNKNOWN])[0].strip()
