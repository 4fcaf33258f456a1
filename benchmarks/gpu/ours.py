"""A case through the real thing: token files, a YAML, ``build_trainer``, ``fit``; measured from step to step.

    python benchmarks/gpu/ours.py --case 8l-bf16 --output DIR [--rehearse] [--text JSONL --tokenizer FOLDER]

Everything that watches a run is on, as a user's has it; only the checkpoint at the end is left out. A step's seconds
are those of the host's clock from one boundary to the next. The trainer's one read of a step waits for all of it on the
GPU, but for the zeroing of the gradients, which runs on at each boundary alike while the host goes on. Not run on a GPU
yet.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cases import Case
from process import Options, new_record, run_case
from record import Record
from run_files import run_options, run_yaml, token_prefix

from megatron_syne.config.loader import load_config
from megatron_syne.training.callback import Callback

__all__ = ["Clock", "build", "clear", "measure", "run_options", "run_yaml", "token_prefix"]

PARTS = ("data", "forward_backward", "optimizer")
"""Of a step, as the trainer's metrics have them."""


def build(case: Case, path: Path, rehearse: bool) -> Any:
    """The case's trainer, ready for ``fit``: nothing saved at the end, the engine's options of the case put over ours.

    In a rehearsal these are only held to be fields of the engine: a CPU has few of their kernels.
    """
    from megatron_syne.assembly import build_trainer, open_inputs
    from megatron_syne.models.config import resolve_model
    from megatron_syne.parallel.ranks import rank_info
    from megatron_syne.platform.base import select
    from megatron_syne.preflight.rules import check

    config = load_config(path)
    model, info = resolve_model(config.model), rank_info()
    platform = select(config.platform)
    check(config, model, info.world_size, "cpu" if rehearse else "cuda")
    open_inputs(config, model)
    if not rehearse:
        put_over(platform, dict(case.engine))
    trainer = build_trainer(config, model, platform, info)
    known_to_engine(case.engine)
    if dict(case.engine).get("gradient_accumulation_fusion") is False:
        forbid_fused_weight_gradients(trainer.chunks)
    from megatron_syne.checkpoint.callback import CheckpointCallback

    trainer.callbacks = [each for each in trainer.callbacks if not isinstance(each, CheckpointCallback)]
    return trainer


def put_over(platform: Any, changes: dict[str, object]) -> None:
    """Have the platform's engine options with ``changes`` put over them."""
    original = platform.engine_options
    vars(platform)["engine_options"] = lambda config: {**original(config), **changes}
    if changes.get("cuda_graph_impl", "none") != "none":
        from megatron.core.tensor_parallel.random import initialize_rng_tracker

        # the first call counts: the seed's own, later, would make one whose state no graph can hold
        initialize_rng_tracker(use_te_rng_tracker=True)


def forbid_fused_weight_gradients(chunks: Sequence[Any]) -> None:
    """Undo what ``training.optimizer.wrap_ddp`` turns on in Transformer Engine's layers whatever the engine is told."""
    for chunk in chunks:
        for module in chunk.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = False


def known_to_engine(engine: Sequence[tuple[str, object]]) -> None:
    """Raise ValueError where one of them is no field of the engine's configuration."""
    from megatron.core.transformer import TransformerConfig

    unknown = {name for name, _ in engine} - {field.name for field in dataclasses.fields(TransformerConfig)}
    if unknown:
        raise ValueError(
            f"Case.engine: no field of megatron-core's TransformerConfig: {', '.join(sorted(unknown))}"
        )


class Clock:
    """Seconds of each step from boundary to boundary, and of them what went by inside the callbacks."""

    def __init__(self, trainer: Any, warm: int) -> None:
        self.trainer, self.warm = trainer, warm
        self.steps: list[float] = []
        self.watching: list[float] = []
        self.metrics: list[dict[str, float]] = []
        self.peak_before = 0
        self._inside, self._entered, self._boundary = 0.0, 0.0, 0.0
        trainer.callbacks = [_Edge(self.enter), *trainer.callbacks, _Edge(self.leave)]

    def enter(self, event: str, metrics: dict[str, float] | None) -> None:
        """Before all other callbacks of an event."""
        self._entered = time.perf_counter()

    def leave(self, event: str, metrics: dict[str, float] | None) -> None:
        """After all other callbacks of an event."""
        now = time.perf_counter()
        if event == "on_train_start":
            self._boundary = now
            return
        self._inside += now - self._entered
        if metrics is not None:
            self.metrics.append(metrics)
        if event == "on_step_boundary":
            self.steps.append(now - self._boundary)
            self.watching.append(self._inside)
            self._inside = 0.0
            if len(self.steps) == self.warm:
                self.peak_before = self.trainer.platform.peak_memory()
                forget_peak(self.trainer.platform)
            self._boundary = time.perf_counter()


class _Edge(Callback):
    """The first or the last of the callbacks: reports the events of a step."""

    def __init__(self, report: Any) -> None:
        self.report = report

    def on_train_start(self, trainer: Any) -> None:
        self.report("on_train_start", None)

    def on_step_start(self, trainer: Any) -> None:
        self.report("on_step_start", None)

    def on_batch(self, trainer: Any, batches: Any) -> None:
        self.report("on_batch", None)

    def on_step_end(self, trainer: Any, metrics: dict[str, float]) -> None:
        first = self.report.__name__ == "enter"
        self.report("on_step_end", None if first else metrics)

    def on_step_boundary(self, trainer: Any) -> None:
        self.report("on_step_boundary", None)


def forget_peak(platform: Any) -> None:
    """Count the peak of memory from here on, where the platform can."""
    if platform.name == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()


def memory_found(platform: Any) -> dict[str, int | None]:
    """Reserved bytes at most, and what is taken of the GPU now (with the context and NCCL's buffers)."""
    if platform.name != "cuda":
        return {"reserved": None, "device_used": None}
    import torch

    free, total = torch.cuda.mem_get_info()
    return {"reserved": torch.cuda.max_memory_reserved(), "device_used": total - free}


def measure(case: Case, options: Options) -> Record:
    """Train the case's steps and tell of those after the warm ones."""
    path = run_yaml(case, options.output, options.rehearse, options.text, options.tokenizer)
    clear(path.parent / "run")
    began = time.perf_counter()
    trainer = build(case, path, options.rehearse)
    built = time.perf_counter() - began
    clock = Clock(trainer, case.warm)
    trainer.fit()
    trainer.train_data.close()
    memory = memory_found(trainer.platform)
    peak = trainer.platform.peak_memory()
    later = slice(case.warm, None)
    metrics, steps = clock.metrics[later], clock.steps[later]
    seconds = {part: statistics.median(each[f"{part}_seconds"] for each in metrics) for part in PARTS}
    seconds["watching"] = statistics.median(clock.watching[later])
    seconds["other"] = statistics.median(
        step - watching - sum(each[f"{part}_seconds"] for part in PARTS)
        for step, watching, each in zip(steps, clock.watching[later], metrics, strict=True)
    )
    return new_record(
        case,
        options,
        step_seconds=steps,
        losses=[each["loss"] for each in clock.metrics],
        peak_allocated_bytes=peak,
        peak_reserved_bytes=memory["reserved"],
        seconds=seconds,
        config=told(load_config(path)),
        found={
            "loader_share": share(metrics_of(metrics, "data_seconds"), steps),
            "logger_share": share(clock.watching[later], steps),
            "steps_with_norms": with_norms(metrics, steps),
            "seconds_to_build": built,
            "peak_allocated_bytes_of_the_start": clock.peak_before,
            "device_used_bytes": memory["device_used"],
            "tokens": "real text" if "text-" in path.read_text() else "random",
            "platform": trainer.platform.describe(),
            "engine": {name: str(value) for name, value in case.engine},
        },
    )


def metrics_of(metrics: Sequence[dict[str, float]], name: str) -> list[float]:
    """One of the metrics, step by step."""
    return [each[name] for each in metrics]


def share(parts: Sequence[float], steps: Sequence[float]) -> float:
    """Share of all the steps' time: of the sum, so that what comes every tenth step counts."""
    return sum(parts) / sum(steps)


def with_norms(metrics: Sequence[dict[str, float]], steps: Sequence[float]) -> float | None:
    """Median seconds of the steps that took the norms, None where there were none."""
    chosen = [step for step, each in zip(steps, metrics, strict=True) if "param_norm" in each]
    return statistics.median(chosen) if chosen else None


def told(config: Any) -> dict[str, Any]:
    """The whole configuration as plain values, its paths shortened to their last names (no machine's own)."""
    values = dataclasses.asdict(config)
    values["run_dir"] = "run"
    for source in values["data"]["sources"].values():
        source["path"] = Path(source["path"]).name
        source["max_epochs"] = 1e9  # infinite has no JSON
    return dict(json.loads(json.dumps(values)))


def clear(run_dir: Path) -> None:
    """A run is begun anew: what an earlier try left would be gone on with."""
    import shutil

    if run_dir.exists():
        shutil.rmtree(run_dir)


if __name__ == "__main__":
    sys.exit(run_case(measure, __doc__))
