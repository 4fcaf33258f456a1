"""Whole runs with all their stages in one world: ``stages_worker.py jobs.json``.

As ``worker.py``, but each job goes through all legs of its run, as ``train.py`` does. A job with ``stop_at`` is
asked to stop during that step, as by a signal; one with ``abandon_at`` ends after that step as a killed one does.
Rank 0 writes ``results.json``: per job each step's number, loss, learning rate, batch and RoPE base, the validation
losses by step, the changes, and what the run refused, if it did.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from distributed.jobs import leave_results


def main() -> None:
    jobs_file = Path(sys.argv[1])
    from megatron_syne.platform.base import select

    platform = select("cpu")
    from megatron_syne.assembly import each_leg, open_inputs, release
    from megatron_syne.config.loader import load_config
    from megatron_syne.errors import SyneError
    from megatron_syne.models.config import resolve_model
    from megatron_syne.parallel.ranks import rank_info
    from megatron_syne.parallel.setup import start_distributed, stop_distributed, stop_model_parallel
    from megatron_syne.preflight.rules import check
    from megatron_syne.training.callback import Callback

    class Abandoned(Exception):
        pass

    class Record(Callback):
        def __init__(self, job, result) -> None:
            self.job, self.result, self.before = job, result, 0

        def on_step_start(self, trainer) -> None:
            self.before = trainer.state.consumed_samples
            if trainer.state.step + 1 == self.job.get("stop_at"):
                trainer.stop_requested = 1.0

        def on_batch(self, trainer, batches) -> None:
            if trainer.state.step + 1 == self.job.get("nan_at"):
                for chunk in trainer.chunks:
                    for parameter in chunk.parameters():
                        parameter.data.fill_(float("nan"))

        def on_step_boundary(self, trainer) -> None:
            if trainer.state.step == self.job.get("abandon_at"):
                raise Abandoned

        def on_step_end(self, trainer, metrics) -> None:
            row = {
                "step": trainer.state.step,
                "loss": metrics["loss"].hex(),
                "rate": metrics["learning_rate"],
                "batch": trainer.state.consumed_samples - self.before,
                "base": trainer.model_config.rotary_base,
            }
            self.result["steps"].append(row)

        def on_evaluation(self, trainer, losses) -> None:
            self.result["validation"][str(trainer.state.step)] = {k: v.hex() for k, v in losses.items()}

    info = rank_info()
    jobs = json.loads(jobs_file.read_text())
    platform.start(info.local_rank, load_config(jobs[0]["config"]).precision)
    start_distributed(platform, info, 120)
    results = {}
    for job in jobs:
        result = results[job["name"]] = {"steps": [], "validation": {}, "changes": [], "refused": ""}
        trainer = None
        try:
            config = load_config(job["config"], job["overrides"])
            model = resolve_model(config.model)
            check(config, model, info.world_size, "cpu")
            open_inputs(config, model)
            for trainer in each_leg(config, model, platform, info):
                trainer.callbacks = [*trainer.callbacks, Record(job, result)]
                trainer.fit()
        except Abandoned:
            pass
        except SyneError as error:
            result["refused"] = f"{type(error).__name__}: {error}"
        if trainer is not None:
            result["changes"] = trainer.train_data.changes
            release(trainer)
        stop_model_parallel()
    stop_distributed()
    if info.rank == 0:
        leave_results(jobs_file, results)


if __name__ == "__main__":  # checkpoint saving starts helper processes that import this file again
    main()
