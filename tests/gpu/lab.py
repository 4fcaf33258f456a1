"""Start the worker processes of the GPU tests, each for many jobs, and hand out what a job found.

A process costs 15-20 s of imports on a GPU machine, twenty steps of the demo model less than one: so four
processes do nearly everything (``plan.py`` says what), three of them side by side.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from distributed.test_fp8_training import prepared

from . import plan

REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name != "TORCH_COMPILE_DISABLE"},
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "PYTHONPATH": os.pathsep.join(
        [str(REPOSITORY), str(REPOSITORY / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    ),
}
"""Of every process: without what ``tests/conftest.py`` sets, so that the engine compiles its functions as in a run."""
TIMEOUT, REHEARSAL_TIMEOUT = 450.0, 1200.0
"""Seconds until a worker is ended."""


class Lab:
    """The workers of a session; ``rehearse`` None, ``cpu`` or ``stand-in``: see ``conftest.py``."""

    def __init__(self, folder: Path, rehearse: str | None, shared: Path) -> None:
        self.folder, self.rehearse = folder, rehearse
        self.stories = shared / "stories260k"
        self.config = prepared(folder)
        self.plan = plan.Plan(folder, self.config, rehearse, self.stories)
        self.platform = self.plan.platform
        self.running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
        self.results: dict[str, dict[str, Any]] = {}
        for group in ("reference", "main", "exact"):
            self.start(group)

    def start(self, group: str) -> None:
        """Start a worker, after those whose results it reads."""
        for needed in plan.NEEDS.get(group, ()):
            self.wait(needed)
        path = self.folder / f"{group}.json"
        jobs = self.plan.jobs(group)
        path.write_text(json.dumps(jobs))
        stands_in = self.rehearse == "stand-in" and jobs[0]["platform"] == "cuda"
        with path.with_suffix(".log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "gpu.stand_in" if stands_in else "gpu.worker", str(path)],
                env={**ENVIRONMENT, **plan.VARIABLES.get(group, {})},
                stdout=log, stderr=subprocess.STDOUT, cwd=REPOSITORY, start_new_session=True,
            )  # fmt: skip
        self.running[group] = process, time.monotonic()

    def wait(self, group: str) -> dict[str, Any]:
        """What each job of a worker found; a worker that fails or hangs leaves what it had until then."""
        if group in self.results:
            return self.results[group]
        if group not in self.running:
            self.start(group)
        process, began = self.running[group]
        limit = REHEARSAL_TIMEOUT if self.rehearse else TIMEOUT
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(1.0, limit - (time.monotonic() - began)))
        self.end(process)
        path = self.folder / f"{group}.json"
        lines = (
            path.with_suffix(".results").read_text().splitlines()
            if path.with_suffix(".results").exists()
            else []
        )
        found = {name: each for line in lines for name, each in json.loads(line).items()}
        found["log"] = path.with_suffix(".log").read_text(errors="replace")[-3000:]
        self.results[group] = found
        seconds = {name: each["seconds"] for name, each in found.items() if name != "log"}
        self.figure(
            f"seconds of {group}", exit_code=process.returncode, total=sum(seconds.values()), **seconds
        )
        return found

    def result(self, group: str, name: str) -> dict[str, Any]:
        """What a job found; its own error, or its worker's, fails the test that asks, what it lacks skips it."""
        found = self.wait(group)
        if name not in found:
            pytest.fail(f"{group} ended before {name} was done; the end of its log:\n{found['log']}")
        if "unable" in found[name]:
            pytest.skip(found[name]["unable"])
        if "error" in found[name]:
            pytest.fail(f"{group}, {name}: {found[name]['error']}")
        return found[name]

    def losses(self, group: str, name: str) -> list[float]:
        """Loss of each step of a training."""
        return [float.fromhex(loss) for loss in self.hexes(group, name)]

    def hexes(self, group: str, name: str) -> list[str]:
        """The same to the bit."""
        return [row["loss_hex"] for row in self.result(group, name)["rows"]]

    def needs_stories(self) -> Path:
        """The trained Llama of 260k parameters; skips where it is not there."""
        if not self.stories.is_dir():
            pytest.skip(f"real inputs are absent: expected {self.stories}")
        return self.stories

    def steps(self, count: int) -> int:
        """How many steps a training of ``count`` steps has here: a rehearsal's are shorter."""
        return self.plan.steps(count)

    def figure(self, test: str, **values: Any) -> None:
        """Print what a test measured, and append it to the file ``MEGATRON_SYNE_GPU_FIGURES``."""
        told = {"test": test, "platform": self.rehearse or self.platform, **values}
        print(json.dumps(told))
        if path := os.environ.get("MEGATRON_SYNE_GPU_FIGURES"):
            with Path(path).open("a") as stream:
                stream.write(json.dumps(told) + "\n")

    def stop(self) -> None:
        """End what still runs."""
        for process, _ in self.running.values():
            self.end(process)

    @staticmethod
    def end(process: subprocess.Popen[bytes]) -> None:
        """A worker and what it started for saving."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
