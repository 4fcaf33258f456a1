"""What a checkpoint costs training: the time that it waits, and how much slower steps are while one is written.

    python benchmarks/gpu/stall.py --case stall-async --output DIR [--rehearse]
    python benchmarks/gpu/stall.py --cpu DIR      (69 M parameters on the CPU platform, both ways, as a table)

A case whose name ends in ``async`` saves beside the training, another waits. Steps are trained without saving, then a
checkpoint is begun and training goes on until it is complete, then once more: the first save also makes the memory for
the copies. Each checkpoint is removed before the next, so the disk must hold one. Last, as many bytes (8 GiB at most)
are written to the same disk and synced by a plain program: what the disk can do. Not run on a GPU yet.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from cases import Case
from ours import build, clear, run_yaml
from process import Options, new_record, run_case
from record import Record

from megatron_syne.checkpoint.folder import checkpoint_path
from megatron_syne.training.callback import Callback

SAVES = 2
LONGEST_RUN = 4000
"""Steps after which a run ends even though a checkpoint is not complete."""
PATIENCE = 80.0
"""Seconds that a checkpoint may take; after half of it there is no second one."""
PIECE = 64 * 2**20
PLAIN_BYTES = 8 * 2**30
AFTER = 3
"""Steps after a save that are left out: the allocator settles."""


class Drive(Callback):
    """Stands in for the saving callback: saves when it has seen enough steps, and ends the run."""

    def __init__(self, saver: Any, beside: bool, warm: int, steps: int) -> None:
        self.saver, self.beside, self.warm, self.wanted = saver, beside, warm, steps
        self.losses: list[float] = []
        self.plain: list[float] = []
        self.during: list[list[float]] = []
        self.saves: list[dict[str, float]] = []
        self._left = 0.0
        self._quiet = -warm

    def on_train_start(self, trainer: Any) -> None:
        """The first step begins."""
        self._left = time.perf_counter()

    def on_step_end(self, trainer: Any, metrics: dict[str, float]) -> None:
        """Keep the loss."""
        self.losses.append(metrics["loss"])

    def on_step_boundary(self, trainer: Any) -> None:
        """Count the step where it belongs, then save, look whether a save is complete, or end."""
        came = time.perf_counter()
        step = came - self._left
        if self.saver.manager.pending is not None:
            self.during[-1].append(step)
            path = self.saver.manager.progress(trainer.platform.device)
            self.saves[-1]["looking_seconds"] += time.perf_counter() - came
            if path is not None:
                self.complete(path)
        else:
            self._quiet += 1
            if self._quiet > 0:
                self.plain.append(step)
            if self._quiet >= self.wanted:
                self.next(trainer)
        waiting = self.saver.manager.pending is not None and came - self.saves[-1]["begun"] > PATIENCE
        if waiting or trainer.state.step >= LONGEST_RUN:
            trainer.stop_reason = "it takes too long"
        self._left = time.perf_counter()

    def next(self, trainer: Any) -> None:
        """Begin the next save, or end the run after the last."""
        if len(self.saves) == SAVES or (self.saves and self.saves[-1]["complete_seconds"] > PATIENCE / 2):
            trainer.stop_reason = "measured"
            return
        self.during.append([])
        begun = time.perf_counter()
        self.saver.save(trainer, beside=self.beside)
        self.saves.append({"stall_seconds": time.perf_counter() - begun, "looking_seconds": 0.0})
        self.saves[-1]["begun"] = begun
        if not self.beside:
            self.complete(checkpoint_path(self.saver.manager.root, trainer.state.step))

    def complete(self, path: Path) -> None:
        """Note when, and how large; make room for the next."""
        save = self.saves[-1]
        save["complete_seconds"] = time.perf_counter() - save["begun"]
        save["bytes"] = float(sum(file.stat().st_size for file in path.rglob("*") if file.is_file()))
        shutil.rmtree(path)
        self._quiet = -AFTER

    def on_train_end(self, trainer: Any) -> None:
        """Leave what is not complete, give back the memory for copies."""
        self.saver.on_exception(trainer, RuntimeError(str(trainer.stop_reason)))


def plain_write(folder: Path, size: int) -> float:
    """Bytes a second that one program writes to this disk, synced."""
    path = folder / "plain_write"
    piece = os.urandom(PIECE)
    began = time.perf_counter()
    with path.open("wb") as stream:
        for start in range(0, size, PIECE):
            stream.write(piece[: min(PIECE, size - start)])
        stream.flush()
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return size / seconds


def without_begin(save: dict[str, float]) -> dict[str, float]:
    """What is told of a save."""
    return {name: value for name, value in save.items() if name != "begun"}


def measure(case: Case, options: Options) -> Record:
    """Train, save, and tell the seconds."""
    from megatron_syne.preflight.size import model_parameters

    beside = case.name.endswith("async")
    long = replace(case, steps=LONGEST_RUN)
    path = run_yaml(long, options.output, options.rehearse)
    run_dir = path.parent / "run"
    clear(run_dir)
    trainer = build(long, path, options.rehearse)
    needed = 16 * model_parameters(trainer.model_config)
    free = shutil.disk_usage(options.output).free
    if free < needed:
        raise OSError(f"{free:,} bytes free on the disk, a checkpoint needs up to {needed:,}")
    from megatron_syne.checkpoint.callback import CheckpointCallback
    from megatron_syne.checkpoint.manager import CheckpointManager

    saver = CheckpointCallback(CheckpointManager(run_dir / "checkpoints", run_dir / "hf", keep_latest=0))
    drive = Drive(saver, beside, case.warm, case.steps)
    trainer.callbacks = [*trainer.callbacks, drive]
    trainer.fit()
    trainer.train_data.close()
    complete = [save for save in drive.saves if "bytes" in save]
    size = int(complete[-1]["bytes"]) if complete else 0
    rate = plain_write(options.output, min(size or needed, PLAIN_BYTES))
    quiet = statistics.median(drive.plain)
    during = [
        step for steps in drive.during for step in steps[:-1]
    ]  # in the last one it was complete already
    return new_record(
        case,
        options,
        step_seconds=drive.plain,
        losses=drive.losses,
        found={
            "beside": beside,
            "saves": {str(number): without_begin(save) for number, save in enumerate(drive.saves, start=1)},
            "bytes": size,
            "bytes_per_second": size / complete[-1]["complete_seconds"] if complete else None,
            "plain_bytes_per_second": rate,
            "step_seconds_without": quiet,
            "steps_during": len(during),
            "step_seconds_during": statistics.median(during) if during else None,
            "slower_by": statistics.median(during) / quiet - 1 if during else None,
            "platform": trainer.platform.describe(),
        },
    )


CPU_MODEL = {
    "hidden_size": 640,
    "ffn_hidden_size": 1792,
    "num_attention_heads": 10,
    "num_query_groups": 5,
    "kv_channels": 64,
    "vocab_size": 32000,
}
"""With 6 layers 69 M parameters: 41 of embedding and output, 28 of layers."""


def on_a_cpu(output: Path) -> None:
    """A model of some size on the CPU platform, waiting and beside: a table for ``benchmarks/results``."""
    import cases
    import process

    process.TINY_MODEL.update(CPU_MODEL)
    cases.TINY.update({name: CPU_MODEL[name] for name in cases.TINY})
    print(
        "| way | save | waits s | complete after s | MB | MB/s | plain write MB/s | step s | during s (steps) |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name in sys.argv[3:] or ("sync", "async"):
        case = Case(
            f"cpu-{name}", kind="stall", num_layers=6, seq_length=128, precision="fp32", steps=10, warm=3
        )
        record = measure(case, Options(output, rehearse=True))
        found = record.found
        slower = found["step_seconds_during"]
        during = "-" if slower is None else f"{slower:.3f} ({found['steps_during']})"
        for number, save in found["saves"].items():
            print(
                f"| {name} | {number} | {save['stall_seconds'] + save['looking_seconds']:.2f} "
                f"| {save['complete_seconds']:.2f} | {save['bytes'] / 1e6:.0f} "
                f"| {save['bytes'] / 1e6 / save['complete_seconds']:.0f} "
                f"| {found['plain_bytes_per_second'] / 1e6:.0f} | {found['step_seconds_without']:.3f} "
                f"| {during} |"
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--cpu"]:
        on_a_cpu(Path(sys.argv[2]).resolve())
    else:
        sys.exit(run_case(measure, __doc__))
