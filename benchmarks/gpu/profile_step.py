"""Where the time of our step goes: torch's profiler over warm steps of a case, read by ``trace_events``.

    python benchmarks/gpu/profile_step.py --case profile-bf16 --output DIR [--rehearse]

Leaves ``DIR/NAME.json`` (``found``) and ``DIR/NAME.md``: the ten most expensive kernels, sums by kind, every gap over
1 % of a step with what the host did then, and each wait of the host. The steps are recorded without Python's stacks,
which would slow the host and make gaps of their own; one further step with stacks says where gaps and waits come from.
The traces lie in ``DIR/runs/NAME`` while they are read, and stay there where ``KEEP_TRACE`` is set. In a rehearsal the
host's outermost operations stand for kernels. Not run on a GPU yet.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cases import Case
from ours import build, clear, run_yaml
from process import Options, new_record, run_case, without_folders
from record import Record
from trace_events import (
    STEP,
    Event,
    by_kind,
    expensive,
    idle,
    long_gaps,
    read_trace,
    steps_of,
    synchronisations,
)

from megatron_syne.training.callback import Callback

BETWEEN = 1
"""Steps between the two recordings."""


class Recording:
    """Records ``case.steps`` steps after the warm ones, then one with Python's stacks."""

    def __init__(self, case: Case, folder: Path, on_gpu: bool) -> None:
        self.folder, self.on_gpu = folder, on_gpu
        self.seconds: list[float] = []
        """Of every step, recorded or not."""
        self.metrics: list[dict[str, float]] = []
        self.plain = Path(folder / "trace.json")
        self.stacks = Path(folder / "trace_stacks.json")
        self._begins = {case.warm - 1: (self.plain, case.steps, False)}
        self._begins[case.warm + case.steps + BETWEEN - 1] = (self.stacks, 1, True)
        self._profiler: Any = None
        self._annotation: Any = None
        self._left = 0
        self._started = 0.0

    def begin_step(self, trainer: Any) -> None:
        """Before all callbacks of the step. A recording begins a step early: its first step is slow."""
        import torch

        if trainer.state.step in self._begins:
            path, count, with_stack = self._begins[trainer.state.step]
            kinds = [torch.profiler.ProfilerActivity.CPU]
            kinds += [torch.profiler.ProfilerActivity.CUDA] if self.on_gpu else []
            self._profiler = torch.profiler.profile(
                activities=kinds,
                schedule=torch.profiler.schedule(wait=0, warmup=1, active=count, repeat=1),
                on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
                with_stack=with_stack,
            )
            self._left = count + 1
            self._profiler.start()
        self._started = time.perf_counter()
        self._annotation = torch.profiler.record_function(STEP)
        self._annotation.__enter__()

    def end_step(self, trainer: Any) -> None:
        """After all callbacks of the step: the trainer has waited for all but the zeroing of the gradients."""
        self._annotation.__exit__(None, None, None)
        self.seconds.append(time.perf_counter() - self._started)
        if self._profiler is not None:
            self._profiler.step()
            self._left -= 1
            if not self._left:
                self._profiler.stop()
                self._profiler = None


class _First(Callback):  # type: ignore[misc, unused-ignore]
    def __init__(self, recording: Recording) -> None:
        self.recording = recording

    def on_step_start(self, trainer: Any) -> None:
        self.recording.begin_step(trainer)


class _Last(Callback):  # type: ignore[misc, unused-ignore]
    def __init__(self, recording: Recording) -> None:
        self.recording = recording

    def on_step_end(self, trainer: Any, metrics: dict[str, float]) -> None:
        self.recording.metrics.append(dict(metrics))

    def on_step_boundary(self, trainer: Any) -> None:
        self.recording.end_step(trainer)


def read(plain: Sequence[Event], stacks: Sequence[Event]) -> dict[str, Any]:
    """What both traces say. ValueError where the trace has no step, or nothing of the device."""
    windows = steps_of(plain)
    if not windows:
        raise ValueError(f"the trace has no annotation {STEP}")
    device = [event for event in plain if event.on_device]
    if not device:
        raise ValueError("no kernel was recorded")
    gaps: list[dict[str, Any]] = []
    idle_share = []
    for number, window in enumerate(windows):
        length = window[1] - window[0]
        idle_share.append(sum(gap.duration for gap in idle(device, window)) / length)
        gaps += [described(gap, window) | {"step": number} for gap in long_gaps(plain, window)]
    kinds = by_kind(device, windows)
    result = {
        "steps": len(windows),
        "step_milliseconds": [(end - begin) / 1000 for begin, end in windows],
        "idle_share": statistics.median(idle_share),
        "kernels_per_step": sum(each["count"] for each in kinds.values()),
        "kernels": expensive(device, windows),
        "by_kind": kinds,
        "gaps": gaps,
        "synchronisations": synchronisations(plain, windows),
    }
    with_stacks = steps_of(stacks)
    result["stacks"] = {
        "gaps": [described(gap, window) for window in with_stacks for gap in long_gaps(stacks, window)],
        "synchronisations": synchronisations(stacks, with_stacks) if with_stacks else {},
    }
    return result


def described(gap: Any, window: tuple[float, float]) -> dict[str, Any]:
    """A gap as the record has it; ``at``: milliseconds after the step's begin."""
    return {
        "at_milliseconds": (gap.start - window[0]) / 1000,
        "milliseconds": gap.duration / 1000,
        "share": gap.duration / (window[1] - window[0]),
        "after": gap.after[:120],
        "before": gap.before[:120],
        "host": gap.host[:200],
    }


def as_markdown(title: str, found: dict[str, Any]) -> str:
    """Tables of what was found, for people."""
    lines = [
        f"# {title}",
        "",
        f"{found['steps']} steps of {statistics.median(found['step_milliseconds']):.2f} ms recorded "
        f"({found['unrecorded_milliseconds']:.2f} ms unrecorded), device idle {found['idle_share']:.2%}, "
        f"{found['kernels_per_step']:.0f} kernels a step.",
        "",
        "| kernel | kind | times a step | ms a step | share |",
        "|---|---|---|---|---|",
    ]
    for each in found["kernels"]:
        name = each["name"][:90].replace("|", "\\|")
        figures = f"{each['count']:.0f} | {each['milliseconds']:.3f} | {each['share']:.2%}"
        lines.append(f"| `{name}` | {each['kind']} | {figures} |")
    lines += ["", "| kind | times a step | ms a step | share |", "|---|---|---|---|"]
    for kind, each in found["by_kind"].items():
        lines.append(f"| {kind} | {each['count']:.0f} | {each['milliseconds']:.3f} | {each['share']:.2%} |")
    for heading, gaps in (("recorded steps", found["gaps"]), ("step with stacks", found["stacks"]["gaps"])):
        lines += ["", f"Gaps over 1 % of the {heading}:" + ("" if gaps else " none."), ""]
        if gaps:
            lines += [
                "| at ms | ms | share | after | before | the host meanwhile |",
                "|---|---|---|---|---|---|",
            ]
        for gap in gaps:
            names = [str(gap[key])[:60].replace("|", "\\|") for key in ("after", "before", "host")]
            lines.append(
                f"| {gap['at_milliseconds']:.2f} | {gap['milliseconds']:.3f} | {gap['share']:.2%} | "
                + " | ".join(f"`{name}`" for name in names)
                + " |"
            )
    lines += ["", "Waits of the host, times and ms a step; the stack of the longest:", ""]
    for name, each in found["synchronisations"].items():
        lines.append(f"- {name}: {each['count']:.1f}, {each['milliseconds']:.3f} ms")
        stack = found["stacks"]["synchronisations"].get(name, {}).get("stack", [])
        lines += [f"  - `{frame}`" for frame in stack]
    return "\n".join(lines) + "\n"


def measure(case: Case, options: Options) -> Record:
    """Train, record, read, write both files' contents."""
    whole = replace(case, steps=case.steps + BETWEEN + 1)
    path = run_yaml(whole, options.output, options.rehearse, options.text, options.tokenizer)
    clear(path.parent / "run")
    trainer = build(whole, path, options.rehearse)
    recording = Recording(case, path.parent, on_gpu=not options.rehearse)
    trainer.callbacks = [_First(recording), *trainer.callbacks, _Last(recording)]
    trainer.fit()
    trainer.train_data.close()
    plain = read_trace(recording.plain, device=not options.rehearse)
    found = read(plain, read_trace(recording.stacks, device=not options.rehearse))
    unrecorded = recording.seconds[max(case.warm - 3, 1) : case.warm - 1] or recording.seconds[:1]
    found["unrecorded_milliseconds"] = 1000 * statistics.median(unrecorded)
    if not os.environ.get("KEEP_TRACE"):
        recording.plain.unlink()
        recording.stacks.unlink()
    text = without_folders(as_markdown(case.name, found), options.output)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{case.name}.md").write_text(text)
    print(text)
    return new_record(
        case,
        options,
        step_seconds=recording.seconds[case.warm : case.warm + case.steps],
        losses=[each["loss"] for each in recording.metrics],
        found=found,
    )


if __name__ == "__main__":
    sys.exit(run_case(measure, __doc__))
