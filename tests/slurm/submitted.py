"""Submitting a run through ``launch/slurm.py``, as a user does, and looking at what it left."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from cluster import Cluster, wait_until

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class Run:
    """A submitted run."""

    cluster: Cluster
    run_dir: Path
    number: int

    @property
    def status(self) -> dict[str, Any]:
        """The status file."""
        value: dict[str, Any] = json.loads((self.run_dir / "status.json").read_text())
        return value

    @property
    def log_path(self) -> Path:
        """The one log of all starts."""
        return self.run_dir / "logs" / f"slurm-{self.number}.log"

    def wait_log(self, text: str, count: int = 1, timeout: float = 90) -> None:
        """Wait until the log holds ``text`` that often."""
        self.cluster.wait_until_log(self.log_path, text, count, timeout)

    def wait_status(self, state: str, timeout: float = 90) -> None:
        """Wait until the status file says so."""
        wait_until(lambda: self.status["state"] == state, f"{state} in {self.status}", timeout)

    def signal(self) -> None:
        """What Slurm does ``signal_lead_seconds`` before the time limit (``--signal=B:USR1@..``), now."""
        self.cluster.client("scancel", "--signal=USR1", "--batch", str(self.number))

    def saved(self) -> int:
        """Newest checkpoint's iteration; 0 where there is none."""
        names = [each.name for each in (self.run_dir / "checkpoints").glob("iter_*[0-9]")]
        return max((int(re.sub(r"\D", "", name)) for name in names), default=0)


def launch(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``python launch/slurm.py`` with these arguments."""
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "launch" / "slurm.py"), *arguments],
        env=cluster.env,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def submit_run(cluster: Cluster, config: Path, *overrides: str) -> Run:
    """Submit; the run as Slurm has it."""
    done = launch(cluster, "--config", str(config), *overrides)
    assert done.returncode == 0, done.stderr
    match = re.search(r"job (\d+) submitted", done.stdout)
    log = re.search(r"^log: +(.*)/logs/slurm-\d+\.log$", done.stdout, re.M)
    assert match and log, done.stdout
    return Run(cluster, Path(log[1]), int(match[1]))


def write_config(folder: Path, run_dir: str, **launch_options: Any) -> Path:
    """A run of 2 nodes x 2 ranks whose trainer is ``fake_trainer.py``; options of ``launch`` on top."""
    folder.mkdir(parents=True, exist_ok=True)
    wrapper = folder / "fake_python"
    wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).parent}/fake_trainer.py" "$@"\n')
    os.chmod(wrapper, 0o755)
    launch_section = {
        "nodes": 2, "ntasks_per_node": 2, "gpus_per_node": 0, "time": "10", "python": str(wrapper),
        **launch_options,
    }  # fmt: skip
    config = {
        "run_dir": run_dir,
        "platform": "cpu",
        "model": {"preset": "llama3_8b"},
        "parallel": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
        "data": {"mock": True},
        "train": {"train_iters": 10},
        "launch": launch_section,
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    return file
