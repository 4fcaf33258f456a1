"""Train short jobs on ``CudaPlatform`` over the stand-in: ``worker.py jobs.json``; leaves ``results.json`` beside it.

A job: ``name``, ``config``, ``overrides``; ``probe`` names what else is looked at (``probes.py``), ``saves`` whether
checkpoints are written. ``platform`` ``cpu`` for the CPU platform, then for all jobs of the file.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
from pathlib import Path
from typing import Any


def main() -> None:
    file = Path(sys.argv[1])
    jobs = json.loads(file.read_text())
    from megatron_syne.platform.base import select

    extension: Any = None
    if jobs[0].get("platform", "cuda") == "cuda":
        from te_cpu.harness import install

        extension = install()
        from megatron_syne.platform.cuda import CudaPlatform

        platform: Any = CudaPlatform()
    else:
        platform = select("cpu")
    gc.freeze()  # each job collects its garbage: not what was imported
    results = {}
    for job in jobs:
        try:
            results[job["name"]] = run(job, platform, extension)
        except Exception:
            results[job["name"]] = {"error": traceback.format_exc()}
    file.with_name("results.json").write_text(json.dumps(results))


def run(job: dict[str, Any], platform: Any, extension: Any) -> dict[str, Any]:
    """Train one job; its losses and gradient norms, and what its probe found."""
    from megatron_syne.assembly import build_trainer, release
    from megatron_syne.checkpoint.callback import CheckpointCallback
    from megatron_syne.config.loader import load_config
    from megatron_syne.models.config import resolve_model
    from megatron_syne.parallel.ranks import RankInfo
    from megatron_syne.parallel.setup import stop_model_parallel
    from megatron_syne.preflight.rules import check
    from megatron_syne.training.callback import Callback
    from te_cpu import probes

    rows: list[dict[str, float]] = []

    class Record(Callback):
        def on_step_end(self, trainer: Any, metrics: dict[str, float]) -> None:
            rows.append({"loss": metrics["loss"], "grad_norm": metrics["grad_norm"]})

    config = load_config(job["config"], job["overrides"])
    model = resolve_model(config.model)
    check(config, model, 1, platform.name)
    if extension is not None:
        extension.CALLS.clear()
    trainer = build_trainer(config, model, platform, RankInfo(0, 1, 0))
    saves = job.get("saves", False)  # saving takes longer than the steps
    kept = [each for each in trainer.callbacks if saves or not isinstance(each, CheckpointCallback)]
    probe: Any = getattr(probes, job["probe"])(extension) if "probe" in job else None
    trainer.callbacks = [*kept, *([probe] if probe else []), Record()]
    trainer.fit()
    found = {
        "steps": rows,
        "described": platform.describe(),
        "calls": dict(extension.CALLS) if extension else {},
        "found": probe.found if probe else {},
    }
    release(trainer)
    stop_model_parallel()
    return found


if __name__ == "__main__":  # checkpoint saving starts helper processes that import this file again
    main()
