"""What the host does in a step of ours outside both passes: each callback, the loader, the agreement of the ranks.

    python benchmarks/gpu/host_step.py --case host --output DIR [--rehearse]

While the host does this between two steps the GPU has little to do, so these are milliseconds of every step, whatever
the model's size; about 3 ms of them hide behind the zeroing of the gradients, which the GPU does meanwhile. ``found``
has each part's mean and largest of the steps after the warm ones (the host's clock; as CPU time of the thread, too). On
a GPU ``reduce`` (with what ``platform.fetch`` returns) and ``optimizer`` hold the wait for it, ``schedule`` the passes'
launch. Not run on a GPU yet.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from cases import Case
from ours import build, clear, run_yaml
from process import Options, new_record, run_case
from record import Record

from megatron_syne.training.callback import Callback

EVENTS = ("on_step_start", "on_batch", "on_step_end", "on_evaluation", "on_step_boundary")
REHEARSED_STEPS = 60
WATCHERS = "callbacks_milliseconds"


class Account:
    """Seconds of named parts, step by step: (wall, CPU time of the thread)."""

    def __init__(self) -> None:
        self.steps: list[dict[str, list[float]]] = []

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time counts for a part of the step under way."""

        def counted(*arguments: Any, **named: Any) -> Any:
            started, cpu = time.perf_counter(), time.thread_time()
            try:
                return function(*arguments, **named)
            finally:
                if self.steps:
                    part = self.steps[-1].setdefault(name, [0.0, 0.0])
                    part[0] += time.perf_counter() - started
                    part[1] += time.thread_time() - cpu

        return counted

    def table(self, warm: int) -> dict[str, dict[str, float]]:
        """Milliseconds a step of each part, the dearest first: mean, median, largest, mean of CPU time."""
        steps = self.steps[warm:]
        names = {name for step in steps for name in step}
        result = {}
        for name in names:
            walls = [1000 * step.get(name, [0.0, 0.0])[0] for step in steps]
            cpu = [1000 * step.get(name, [0.0, 0.0])[1] for step in steps]
            result[name] = {
                "mean": statistics.mean(walls),
                "median": statistics.median(walls),
                "largest": max(walls),
                "cpu_mean": statistics.mean(cpu),
            }
        return dict(sorted(result.items(), key=lambda item: -item[1]["mean"]))


class _NextStep(Callback):  # type: ignore[misc, unused-ignore]
    def __init__(self, account: Account) -> None:
        self.account = account

    def on_step_start(self, trainer: Any) -> None:
        self.account.steps.append({})


def watch(trainer: Any, account: Account) -> None:
    """Time every part of the trainer's step. Replaces methods of this trainer's parts, and of its module."""
    import megatron_syne.training.trainer as module

    for callback in trainer.callbacks:
        for event in EVENTS:
            name = f"callback {type(callback).__name__}"
            setattr(callback, event, account.timed(name, getattr(callback, event)))
    parts = [
        (trainer.train_data, "global_batch", "loader"),
        (trainer.platform, "to_device", "to_device"),
        (trainer, "run_schedule", "schedule"),
        (trainer, "squares_if_due", "norms"),
        (trainer.optimizer, "step", "optimizer"),
        (trainer.optimizer, "zero_grad", "zero_grad"),
        (module, "set_learning_rate", "learning_rate"),
        (module, "reduce_over_world", "reduce"),  # begins; what it returns waits
        (trainer, "train_step", "train_step"),
    ]
    for owner, attribute, name in parts:
        setattr(owner, attribute, account.timed(name, getattr(owner, attribute)))
    fetch = trainer.platform.fetch
    trainer.platform.fetch = lambda values: account.timed("reduce", fetch(values))
    for chunk in trainer.chunks:
        chunk.zero_grad_buffer = account.timed("zero_grad", chunk.zero_grad_buffer)
    trainer.callbacks = [_NextStep(account), *trainer.callbacks]


INSIDE = ("loader", "schedule", "norms", "optimizer", "zero_grad", "learning_rate", "reduce")
"""Parts of ``train_step`` side by side; the copy to the device is inside the schedule's time."""


def measure(case: Case, options: Options) -> Record:
    """Train with everything that watches switched on, and add up."""
    case = replace(case, steps=max(case.steps, REHEARSED_STEPS)) if options.rehearse else case
    path = run_yaml(case, options.output, options.rehearse, options.text, options.tokenizer)
    clear(path.parent / "run")
    trainer = build(case, path, options.rehearse)
    account = Account()
    watch(trainer, account)
    trainer.fit()
    trainer.train_data.close()
    parts = account.table(case.warm)
    callbacks = {name: part for name, part in parts.items() if name.startswith("callback ")}
    means = {name: part["mean"] for name, part in parts.items()}
    found: dict[str, Any] = {
        WATCHERS: sum(part["mean"] for part in callbacks.values()),
        "loader_milliseconds": means["loader"] + means["to_device"],
        "rest_of_train_step_milliseconds": means["train_step"] - sum(means.get(name, 0.0) for name in INSIDE),
        "parts": parts,
    }
    for name, part in parts.items():
        print(
            f"{name:32} mean {part['mean']:8.3f} ms, largest {part['largest']:8.3f}, CPU {part['cpu_mean']:8.3f}"
        )
    return new_record(case, options, found=found)


if __name__ == "__main__":
    sys.exit(run_case(measure, __doc__))
