"""As ``worker.py``, for runs in FP8. Two more things a job may ask for:

``spoil``: ``{"scale": name, "factor": f, "step": n}``: in step n the scale of that tensor is f times what it
should be, as if it were stale. ``goes_on_from``: another job's run folder and a step: that checkpoint is copied
into the run folder before the run begins.

Each rank leaves what it knows at the end in ``fp8_<rank>.json`` of the run folder.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from megatron_syne import assembly
from megatron_syne.training.callback import Callback


class Fault(Callback):
    """Spoils a scale, and tells at the end what fell back."""

    def __init__(self, job: dict, rank: int) -> None:
        self.spoil = job.get("spoil", {})
        self.rank = rank

    def on_batch(self, trainer, batches) -> None:
        if trainer.state.step + 1 == self.spoil.get("step"):
            state = trainer.fp8.state()
            key = f"{self.spoil['scale']}.scale"
            if key in state:
                trainer.fp8.load_state({**state, key: state[key] * self.spoil["factor"]})

    def on_train_end(self, trainer) -> None:
        if trainer.fp8 is not None:
            known = {"record": trainer.fp8_record(), "bf16_layers": sorted(trainer.fp8.bf16_layers)}
            (Path(trainer.config.run_dir) / f"fp8_{self.rank}.json").write_text(json.dumps(known))


def main() -> None:
    jobs = {job["name"]: job for job in json.loads(Path(sys.argv[1]).read_text())}
    build_trainer = assembly.build_trainer
    order = iter(jobs.values())

    def build_with_fault(config, model, platform, info):
        job = next(order)
        if "goes_on_from" in job:
            folder, step = job["goes_on_from"]
            name = f"checkpoints/iter_{step:07d}"
            shutil.copytree(Path(folder) / name, Path(config.run_dir) / name)
        trainer = build_trainer(config, model, platform, info)
        trainer.callbacks = [Fault(job, info.rank), *trainer.callbacks]
        return trainer

    assembly.build_trainer = build_with_fault
    from distributed import worker

    worker.main()


if __name__ == "__main__":
    main()
