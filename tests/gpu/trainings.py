"""The jobs of ``worker.py`` that build a whole trainer: ``train`` and ``resave``."""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from distributed.slow_writing import written_after_the_next_step

from megatron_syne import assembly
from megatron_syne.checkpoint.callback import CheckpointCallback
from megatron_syne.config.loader import load_config
from megatron_syne.models import gpt
from megatron_syne.models.config import resolve_model
from megatron_syne.parallel.ranks import rank_info
from megatron_syne.parallel.setup import stop_model_parallel
from megatron_syne.preflight.rules import check
from megatron_syne.training.callback import Callback

KEPT = ("loss", "grad_norm", "validation", "fp8/loss_gap", "fp8/bf16_layers")
SETTLED = 10
"""Steps after which nothing is compiled, cached or allocated for the first time any more."""


class Abandoned(Exception):
    """The training has gone far enough."""


class Record(Callback):
    """Keeps what each step told, and abandons the training after ``stop_after`` steps."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.rows: list[dict[str, Any]] = []
        self.validation: list[dict[str, float]] = []
        self.syncs: Counter[str] = Counter()
        self.counted = 0
        self.allocated: list[int] = []

    def on_train_start(self, trainer: Any) -> None:
        self.keep_fp8(trainer, "start")

    def on_step_end(self, trainer: Any, metrics: dict[str, float]) -> None:
        kept = {name: value for name, value in metrics.items() if name in KEPT or "norm" in name}
        self.rows.append({"step": trainer.state.step, "loss_hex": metrics["loss"].hex(), **kept})

    def on_evaluation(self, trainer: Any, losses: dict[str, float]) -> None:
        self.validation.append(losses)

    def on_step_boundary(self, trainer: Any) -> None:
        if self.job.get("watch_device") and trainer.state.step >= SETTLED:
            self.allocated.append(torch.cuda.memory_allocated())
        if trainer.state.step == self.job.get("stop_after"):
            raise Abandoned

    def on_train_end(self, trainer: Any) -> None:
        self.keep_fp8(trainer, "end")

    def keep_fp8(self, trainer: Any, when: str) -> None:
        """The FP8 state and the layers in bf16, beside the run folder: ``state.first.start.pt``."""
        if not self.job.get("keep_fp8"):
            return
        state = {key: value.cpu() for key, value in trainer.fp8.state().items()}
        path = Path(trainer.config.run_dir).parent / f"{self.job['name']}.{when}.pt"
        torch.save({"state": state, "bf16_layers": sorted(trainer.fp8.bf16_layers)}, path)


def train(job: dict[str, Any], platform: Any) -> dict[str, Any]:
    """``rows`` of the steps, ``validation``, ``engine``'s choices; with ``watch_device`` the waits of the host for the
    device by place in the program, per step, and the bytes allocated after each step."""
    with built(job, platform) as trainer:
        record = Record(job)
        saves = "stop_after" not in job
        kept = [c for c in trainer.callbacks if saves or not isinstance(c, CheckpointCallback)]
        trainer.callbacks = [*kept, record]
        engine = gpt.unwrap(trainer.chunks[0]).config
        found: dict[str, Any] = {"first_step": trainer.state.step}
        found["deterministic_mode"] = engine.deterministic_mode
        fusing = [m for c in trainer.chunks for m in c.modules() if hasattr(m, "fuse_wgrad_accumulation")]
        for module in fusing if job.get("unfused") else ():
            module.fuse_wgrad_accumulation = False
        found["fused"] = sum(bool(module.fuse_wgrad_accumulation) for module in fusing)
        watch = counted_syncs(trainer, record) if job.get("watch_device") else contextlib.nullcontext()
        slow = written_after_the_next_step(trainer) if job.get("slow_writing") else contextlib.nullcontext([])
        with watch, slow as held_back, contextlib.suppress(Abandoned):
            trainer.fit()
        found["held_back"] = held_back
        counted = max(1, record.counted)
        found["syncs"] = {place: count / counted for place, count in record.syncs.most_common()}
        found |= {"rows": record.rows, "validation": record.validation, "allocated": record.allocated}
        if platform.name == "cuda":
            found["peak_memory_bytes"] = platform.peak_memory()
    return found


def resave(job: dict[str, Any], platform: Any) -> dict[str, Any]:
    """Load the checkpoint ``goes_on_from`` and write it again, without a step, in its place."""
    with built(job, platform) as trainer:
        (saver,) = (c for c in trainer.callbacks if isinstance(c, CheckpointCallback))
        shutil.rmtree(saver.manager.root)
        saver.save(trainer)
        saver.on_train_end(trainer)  # an asynchronous one is waited for
        return {"step": trainer.state.step}


@contextmanager
def built(job: dict[str, Any], platform: Any) -> Iterator[Any]:
    """The trainer of a job, checked as a run is; let go of afterwards, with megatron-core's groups."""
    config = load_config(job["config"], job["overrides"])
    model, info = resolve_model(config.model), rank_info()
    check(config, model, info.world_size, platform.name)
    if "goes_on_from" in job:
        folder, step = job["goes_on_from"]
        name = f"checkpoints/iter_{step:07d}"
        shutil.copytree(Path(folder) / name, Path(config.run_dir) / name)
    trainer = None
    try:
        if platform.name == "cuda":
            torch.cuda.reset_peak_memory_stats()
        trainer = assembly.build_trainer(config, model, platform, info)
        yield trainer
    finally:
        if trainer is not None:
            assembly.release(trainer)
        with contextlib.suppress(Exception):  # after an error they may be half there
            stop_model_parallel()


@contextmanager
def counted_syncs(trainer: Any, record: Record) -> Iterator[None]:
    """Count, from step ``SETTLED`` on, what torch sees of the host waiting for the device, by file and line."""
    whole_step = trainer.train_step

    def step() -> Any:
        if trainer.state.step < SETTLED:
            return whole_step()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                result = whole_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        record.counted += 1
        record.syncs.update(
            f"{'/'.join(Path(w.filename).parts[-3:])}:{w.lineno}"
            for w in told
            if "synchroniz" in str(w.message)
        )
        return result

    trainer.train_step = step
    yield
