"""Train several recipes in one world, each through all its legs: ``recipes_worker.py jobs.json``.

Rank 0 writes ``results.json`` beside the jobs: by name, for each leg its first step, what each step's loss and
learning rate were, and before and after it the validation losses and the SHA-256 of every parameter. A job with
``saves: false`` writes no checkpoint. World 1, or a layout that does not cut the weights: the names are those of
the whole model.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from distributed.jobs import leave_results


def main() -> None:
    jobs_file = Path(sys.argv[1])
    from megatron_syne.platform.base import select

    platform = select("cpu")
    import torch

    from megatron_syne.assembly import each_leg, open_inputs, release
    from megatron_syne.checkpoint.callback import CheckpointCallback
    from megatron_syne.config.loader import load_config
    from megatron_syne.models.config import resolve_model
    from megatron_syne.models.gpt import unwrap
    from megatron_syne.parallel.ranks import rank_info
    from megatron_syne.parallel.setup import start_distributed, stop_distributed, stop_model_parallel
    from megatron_syne.preflight.rules import check
    from megatron_syne.training.callback import Callback

    class Record(Callback):
        def __init__(self) -> None:
            self.losses: list[float] = []
            self.rates: list[float] = []

        def on_step_start(self, trainer) -> None:
            self.rates.append(trainer.learning_rate(trainer.state.consumed_samples))

        def on_step_end(self, trainer, metrics) -> None:
            self.losses.append(metrics["loss"])

    def fingerprints(trainer) -> dict[str, str]:
        return {
            name: hashlib.sha256(parameter.detach().contiguous().view(torch.uint8).numpy()).hexdigest()
            for name, parameter in unwrap(trainer.chunks[0]).named_parameters()
        }

    info = rank_info()
    jobs = json.loads(jobs_file.read_text())
    platform.start(info.local_rank, load_config(jobs[0]["config"], jobs[0]["overrides"]).precision)
    start_distributed(platform, info, 120)
    results = {}
    for job in jobs:
        config = load_config(job["config"], job["overrides"])
        model = resolve_model(config.model)
        check(config, model, info.world_size, "cpu")
        open_inputs(config, model)
        legs = []
        for trainer in each_leg(config, model, platform, info):
            record = Record()
            saves = job.get("saves", True)
            kept = [c for c in trainer.callbacks if saves or not isinstance(c, CheckpointCallback)]
            trainer.callbacks = [*kept, record]
            leg = {"first_step": trainer.state.step, "before": fingerprints(trainer)}
            leg["validation_before"] = trainer.evaluate()
            trainer.fit()
            leg |= {"losses": record.losses, "rates": record.rates, "after": fingerprints(trainer)}
            leg["validation_after"] = trainer.evaluate()
            legs.append(leg)
        release(trainer)
        results[job["name"]] = legs
        stop_model_parallel()
    stop_distributed()
    if info.rank == 0:
        leave_results(jobs_file, results)


if __name__ == "__main__":  # checkpoint saving starts helper processes that import this file again
    main()
