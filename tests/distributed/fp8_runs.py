"""Start the runs of ``fp8_worker.py``."""

from __future__ import annotations

import json
from pathlib import Path

from .ranks import run_ranks


def train_fp8(
    folder: Path, config: Path, world_size: int, jobs: dict[str, list[str]], options: dict[str, dict]
) -> dict[str, dict]:
    """Train each named list of overrides, one after the other, in one world; ``options``: by name, the job's."""
    where = folder / f"fp8_jobs_{len(list(folder.glob('fp8_jobs_*')))}"
    where.mkdir()
    listed = [
        {
            "name": name,
            "config": str(config),
            "overrides": [f"run_dir={where / name}", *overrides],
            **options.get(name, {}),
        }
        for name, overrides in jobs.items()
    ]
    (where / "jobs.json").write_text(json.dumps(listed))
    run_ranks(world_size, ["-m", "distributed.fp8_worker", str(where / "jobs.json")], timeout=1800)
    return json.loads((where / "results.json").read_text())
