"""Run several short trainings in one world: ``worker.py jobs.json``.

Starting processes and importing torch costs more than twenty steps of a tiny model, so one world trains one
layout after another, taking megatron-core's groups down in between. Rank 0 writes ``results.json`` beside the
jobs: per job the losses (``float.hex``) and gradient norms of each step, the validation losses, and the plan
and changes at the end. A job with ``stop_at`` is asked to stop during that step, as by a signal; one with
``abandon_at`` ends after that step as a killed one does: nothing more is saved. One with ``saves: false``
writes no checkpoint at all: saving takes long, twenty steps of a tiny model hardly longer. With ``slow_writing``
what is written beside the training waits for the next step. ``engine``
and ``late_engine`` put fields of megatron-core's ``TransformerConfig`` where no option and no rule lets them
be, before and after DDP is built; where the loss is no number then, the job ends.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

from distributed.jobs import leave_results
from distributed.slow_writing import written_after_the_next_step


def main() -> None:
    jobs_file = Path(sys.argv[1])
    from megatron_syne.platform.base import select

    platform = select("cpu")
    from megatron_syne.assembly import build_trainer, release
    from megatron_syne.checkpoint.callback import CheckpointCallback
    from megatron_syne.config.loader import load_config
    from megatron_syne.errors import DataError
    from megatron_syne.models import gpt
    from megatron_syne.models.config import resolve_model
    from megatron_syne.parallel.ranks import rank_info
    from megatron_syne.parallel.setup import (
        start_distributed,
        stop_distributed,
        stop_model_parallel,
    )
    from megatron_syne.preflight.rules import check
    from megatron_syne.training.callback import Callback

    class Abandoned(Exception):
        pass

    class Record(Callback):
        def __init__(self, job) -> None:
            self.job = job
            self.rows: list[dict[str, object]] = []
            self.validation: list[dict[str, float]] = []

        def on_step_start(self, trainer) -> None:
            if trainer.state.step + 1 == self.job.get("stop_at"):
                trainer.stop_requested = 1.0

        def on_step_boundary(self, trainer) -> None:
            if trainer.state.step == self.job.get("abandon_at"):
                raise Abandoned

        def on_step_end(self, trainer, metrics) -> None:
            self.rows.append({"loss": metrics["loss"].hex(), "grad_norm": metrics["grad_norm"]})

        def on_evaluation(self, trainer, losses) -> None:
            self.validation.append(losses)

    right_engine_config = gpt.engine_config

    def engine_config_with(fields):
        def engine_config(*arguments):
            engine = right_engine_config(*arguments)
            for name, value in fields.items():
                assert hasattr(engine, name)
                setattr(engine, name, value)
            return engine

        return engine_config

    info = rank_info()
    config = load_config(json.loads(jobs_file.read_text())[0]["config"])
    platform.start(info.local_rank, config.precision)
    start_distributed(platform, info, 120)
    results = {}
    for job in json.loads(jobs_file.read_text()):
        config = load_config(job["config"], job["overrides"])
        model = resolve_model(config.model)
        check(config, model, info.world_size, "cpu")
        gpt.engine_config = engine_config_with(job.get("engine", {}))
        trainer = build_trainer(config, model, platform, info)
        for name, value in job.get("late_engine", {}).items():
            setattr(gpt.unwrap(trainer.chunks[0]).config, name, value)
        saves = job.get("saves", True)
        kept = [c for c in trainer.callbacks if saves or not isinstance(c, CheckpointCallback)]
        record = Record(job)
        trainer.callbacks = [*kept, record]
        first = trainer.state.step
        expected = (Abandoned, DataError) if "engine" in job else (Abandoned,)
        slow = written_after_the_next_step(trainer) if job.get("slow_writing") else contextlib.nullcontext([])
        with slow as held_back, contextlib.suppress(*expected):
            trainer.fit()
        results[job["name"]] = {
            "held_back": held_back,
            "first_step": first,
            "steps": record.rows,
            "validation": record.validation,
            "plan": trainer.train_data.plan.to_dict(),
            "changes": trainer.train_data.changes,
        }
        release(trainer)
        stop_model_parallel()
    stop_distributed()
    if info.rank == 0:
        leave_results(jobs_file, results)


if __name__ == "__main__":
    main()
