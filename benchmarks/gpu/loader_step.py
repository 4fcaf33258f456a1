"""What the loader costs a step: the built-in one (a thread, pinned memory) beside DALI with prefetch to the GPU.

    python benchmarks/gpu/loader_step.py --case loader --output DIR [--rehearse]

Real token file, our own ``DataLoader``, the case's sequence length and batch. Each is measured *alone* (as fast as it
can), and *beside a step*: the training's thread asks for a batch and copies it to the device as the trainer does, then
hands the device ``BUSY`` seconds of matrix products and waits for them. What the loader adds to the step is the
difference to steps that use one batch again and again. Both must give the same batches, bit for bit. Not run on a GPU
yet.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from cases import Case
from ours import run_yaml
from process import Options, new_record, run_case, shape_of
from record import Record

import torch  # isort: skip

from megatron_syne.config.loader import load_config  # isort: skip
from megatron_syne.data.loader import Batch, TrainingLoader, build_training_data  # isort: skip
from megatron_syne.data.mixture.planning import plan_mixture  # isort: skip
from megatron_syne.errors import ConfigError  # isort: skip
from megatron_syne.platform.base import Platform, select  # isort: skip

BUSY, BUSY_REHEARSED = 0.2, 0.03
"""Seconds of a step's work on the device."""
ALONE, COMPARED = 200, 12
"""Global batches read alone, and compared."""
Backend = Literal["thread", "dali"]
BACKENDS: tuple[Backend, ...] = ("thread", "dali")


def busy_work(device: torch.device, seconds: float) -> Callable[[], None]:
    """Matrix products that take the device about so long; returns at once on a GPU."""
    size = 8192 if device.type == "cuda" else 256
    a = torch.randn(
        size, size, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32
    )
    out = torch.empty_like(a)

    def work(times: int) -> None:
        for _ in range(times):
            torch.mm(a, a, out=out)

    def timed(times: int) -> float:
        started = time.perf_counter()
        work(times)
        wait(device)
        return time.perf_counter() - started

    timed(3)
    times = max(1, round(seconds / (timed(10) / 10)))
    return lambda: work(times)


def wait(device: torch.device) -> None:
    """For the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alone(loader: TrainingLoader, platform: Platform, count: int) -> float:
    """Seconds of a global batch, read and copied to the device as fast as it goes."""
    starts = list(loader.batch_starts(count))
    loader.global_batch(starts[0])  # starts the thread
    started = time.perf_counter()
    for start in starts[1:]:
        for batch in loader.global_batch(start):
            platform.to_device(batch)
    wait(platform.device)
    return (time.perf_counter() - started) / (len(starts) - 1)


def beside_steps(
    loader: TrainingLoader, platform: Platform, busy: Callable[[], None], warm: int, steps: int, again: bool
) -> dict[str, float]:
    """Median seconds of a step and of what the loader has of it; with ``again`` every step uses the first batch.

    ``wait_seconds``: until the batch was there; ``to_device_seconds``: to hand over its copies;
    ``device_copy_seconds``: what the copies took of the device's own time (CUDA events), before the step's work.
    """
    found: dict[str, list[float]] = {}
    kept: list[Batch] = []
    for number, start in enumerate(loader.batch_starts(warm + steps)):
        t = [time.perf_counter()]
        cpu = time.thread_time()
        batches = kept if again and kept else loader.global_batch(start)
        t.append(time.perf_counter())
        marks = [platform.mark()]
        on_device = batches if again and kept else [platform.to_device(batch) for batch in batches]
        marks.append(platform.mark())
        t.append(time.perf_counter())
        cpu = time.thread_time() - cpu
        kept = on_device if again else []
        used = sum(batch["tokens"].sum() + batch["labels"].sum() for batch in on_device)
        busy()
        int(used)  # as the trainer reads its loss
        wait(platform.device)
        t.append(time.perf_counter())
        if number >= warm:
            on_gpu = platform.seconds_between(*marks)
            for name, value in zip(NAMES, (t[1] - t[0], t[2] - t[1], on_gpu, cpu, t[3] - t[0]), strict=True):
                found.setdefault(name, []).append(value)
    return {name: statistics.median(values) for name, values in found.items()}


NAMES = (
    "wait_seconds",
    "to_device_seconds",
    "device_copy_seconds",
    "training_thread_cpu_seconds",
    "step_seconds",
)


def same(first: TrainingLoader, second: TrainingLoader, count: int) -> int:
    """How many global batches were the same in both, bit for bit; ValueError at the first that is not."""
    starts = list(first.batch_starts(count))
    for start in starts:
        for ours, theirs in zip(first.global_batch(start), second.global_batch(start), strict=True):
            for name in ours.keys() | theirs.keys():
                if ours[name].dtype != theirs[name].dtype or not torch.equal(
                    ours[name].cpu(), theirs[name].cpu()
                ):
                    raise ValueError(f"sample {start}: {name} differs between {' and '.join(BACKENDS)}")
    return len(starts)


def bytes_of(batches: list[Batch]) -> int:
    """Of a global batch of this rank."""
    return sum(tensor.nbytes for batch in batches for tensor in batch.values())


def measure(case: Case, options: Options) -> Record:
    """Each loader alone and beside steps, then both compared."""
    steps = max(case.steps, 10)
    whole = replace(case, steps=max(case.warm + steps, ALONE) + 1)
    config = load_config(run_yaml(whole, options.output, options.rehearse))
    platform = select("cpu" if options.rehearse else "cuda")
    vocab_size = shape_of(case, options.rehearse)["vocab_size"]

    def loader(backend: Backend) -> TrainingLoader:
        data = replace(config.data, loader=backend)
        return build_training_data(
            replace(config, data=data),
            plan_mixture(config),
            vocab_size,
            0,
            1,
            pin_memory=platform.pins_memory,
            device=platform.device,
        )

    busy = busy_work(platform.device, BUSY_REHEARSED if options.rehearse else BUSY)
    tokens = case.global_batch_size * case.seq_length
    found: dict[str, Any] = {}
    for backend in BACKENDS:
        try:
            data = loader(backend)
        except ConfigError as error:
            found[backend] = f"absent: {error}"
            continue
        found[f"{backend}_alone_tokens_per_second"] = tokens / alone(data, platform, ALONE)
        reused = beside_steps(data, platform, busy, case.warm, steps, again=True)
        fed = beside_steps(data, platform, busy, case.warm, steps, again=False)
        found |= {f"{backend}_{name}": value for name, value in fed.items()}
        found[f"{backend}_added_seconds"] = fed["step_seconds"] - reused["step_seconds"]
        seen = fed["wait_seconds"] + max(fed["to_device_seconds"], fed["device_copy_seconds"])
        found[f"{backend}_share_of_step"] = seen / fed["step_seconds"]
        found["bytes_per_step"] = bytes_of(data.global_batch(0))
        data.close()
    if "dali" not in found:
        first, second = (loader(backend) for backend in BACKENDS)
        found["global_batches_equal"] = same(first, second, COMPARED)
        first.close()
        second.close()
    return new_record(case, options, found=found)


if __name__ == "__main__":
    sys.exit(run_case(measure, __doc__))
