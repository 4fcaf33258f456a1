"""Do the jobs of one worker process: ``python -m gpu.worker jobs.json``.

Leaves a line ``{name: {..., "seconds": s}}`` per job in ``jobs.results`` at once: what a job found, or ``error`` with
its traceback, or ``unable`` with the reason why it cannot run here. A job that fails leaves the others alone.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any


def main() -> None:
    jobs_file = Path(sys.argv[1])
    jobs = json.loads(jobs_file.read_text())
    from megatron_syne.platform.base import select

    platform = select(jobs[0]["platform"])
    from gpu.pieces import describe, kernels, logits, marks
    from gpu.trainings import resave, train

    if platform.name == "cuda":
        import torch._dynamo

        # the engine's compiled functions see more dtypes and shapes here than in any run; past the limit they would
        # run uncompiled, with other roundings
        torch._dynamo.config.recompile_limit = 64
    kinds = {
        "describe": describe,
        "kernels": kernels,
        "logits": logits,
        "marks": marks,
        "resave": resave,
        "train": train,
    }
    with jobs_file.with_suffix(".results").open("w", buffering=1) as results:
        for job in jobs:
            began = time.perf_counter()
            print(f"--- {job['name']}", flush=True)
            found: dict[str, Any]
            try:
                reason = unable(job)
                found = {"unable": reason} if reason else kinds[job["kind"]](job, platform)
            except Exception as error:  # CUDA's own, too: the figures of the jobs before it are kept
                lacks = "has no stand-in" in str(error)
                found = {"unable": str(error)} if lacks else {"error": traceback.format_exc()}
                print(*found.values(), flush=True)
            found["seconds"] = round(time.perf_counter() - began, 2)
            results.write(json.dumps({job["name"]: found}) + "\n")
    from megatron_syne.parallel.setup import stop_distributed

    stop_distributed()


def unable(job: dict[str, Any]) -> str | None:
    """Why a job cannot run here, or None."""
    if "unable" in job or job["platform"] == "cpu" or not job.get("recipe"):
        return job.get("unable")
    from transformer_engine.pytorch import is_fp8_available, is_fp8_block_scaling_available

    ask = is_fp8_block_scaling_available if job["recipe"] == "blockwise" else is_fp8_available
    able, reason = ask(return_reason=True)
    return None if able else f"{job['recipe']}: {reason}"


if __name__ == "__main__":  # saving starts helper processes that import this file again
    main()
