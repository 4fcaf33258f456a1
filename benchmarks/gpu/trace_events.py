"""What a trace of steps says: the expensive kernels, the gaps between them, and what the host did meanwhile. No torch.

Works on the JSON that ``torch.profiler`` exports (Chrome's trace format: microseconds; ``cat`` names the kind of an
event). Pure functions of events, so that the analysis is tested on traces made by hand.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEVICE = {"kernel": "kernel", "gpu_memcpy": "memcpy", "gpu_memset": "memset"}
RUNTIME = ("cuda_runtime", "cuda_driver")
STEP = "measured_step"
"""Name of the annotation around each step."""

KINDS: tuple[tuple[str, str], ...] = (
    ("communication", r"nccl|c10d"),
    ("attention", r"fmha|flash|attention|attn|sdpa|scaled_dot_product"),
    ("optimizer", r"adam|multi_tensor|multitensor|foreach|l2norm|lpnorm"),
    ("loss", r"cross_entropy|softmax|nll_loss|logsumexp"),
    ("gemm", r"gemm|cutlass|nvjet|xmma|matmul|cublas|wgmma|splitk|::mm$|addmm|scaled_mm|bmm"),
    ("float8 cast", r"cast_transpose|cast_fp8|fp8|float8|amax|quantize|scale_inv|block_scaled"),
    ("norm", r"layer_?norm|rms_?norm|ln_fwd|ln_bwd"),
    ("rope", r"rope|rotary"),
    ("activation", r"swiglu|silu|gelu|glu|gated_act"),
    ("embedding", r"embedding|index|compute_grad_weight|gather|scatter"),
    ("reduction", r"reduce|sum"),
    ("copy", r"copy|memcpy|cat_|catarray|transpose|aten::to$|contiguous"),
    ("memset", r"memset|fill|zero_"),
    ("elementwise", r"elementwise|vectorized|triton|add|mul|div|where"),
)
"""Kinds of kernels by what their names hold, the first that fits: cuBLAS (``nvjet``, ``gemm``), cuDNN and flash-attn
(``fmha``, ``cudnn_generated``), Transformer Engine (``cast_transpose``, ``rmsnorm``), torch's own."""


@dataclass(frozen=True)
class Event:
    """Something that took time: microseconds since some moment."""

    name: str
    start: float
    duration: float
    stream: int = 0
    """Of the device's work its stream, of the host's its thread."""
    kind: str = "kernel"
    """``kernel``, ``memcpy``, ``memset`` (the device's); ``op``, ``runtime``, ``python``, ``note`` (the host's)."""

    @property
    def end(self) -> float:
        """When it was over."""
        return self.start + self.duration

    @property
    def on_device(self) -> bool:
        """Whether it was the device's work."""
        return self.kind in ("kernel", "memcpy", "memset")


@dataclass(frozen=True)
class Gap:
    """The device did nothing."""

    start: float
    duration: float
    after: str
    """Kernel before it, or where the step began."""
    before: str
    """Kernel after it, or the step's end."""
    host: str = ""
    """What the host did for most of it."""


def read_trace(path: Path, device: bool = True) -> list[Event]:
    """Events of a Chrome trace in the order of their starts; without a ``device`` (a rehearsal) the host's outermost
    operations stand for its work."""
    events = []
    for entry in json.loads(path.read_text())["traceEvents"]:
        if entry.get("ph") != "X":
            continue
        category = entry.get("cat", "")
        if category in DEVICE:
            kind, stream = DEVICE[category], entry.get("args", {}).get("stream", entry["tid"])
        elif category in RUNTIME:
            kind, stream = "runtime", entry["tid"]
        elif category in ("cpu_op", "python_function", "user_annotation"):
            kind = {"cpu_op": "op", "python_function": "python", "user_annotation": "note"}[category]
            stream = entry["tid"]
        else:
            continue
        number = stream if isinstance(stream, int) else 0
        events.append(Event(entry["name"], float(entry["ts"]), float(entry.get("dur", 0)), number, kind))
    events.sort(key=lambda event: (event.start, -event.duration))
    return events if device else events + _outermost(event for event in events if event.kind == "op")


def _outermost(events: Iterable[Event]) -> list[Event]:
    """As kernels: those that no other of the same thread holds. Events in the order of their starts."""
    result, until = [], defaultdict[int, float](float)
    for event in events:
        if event.start >= until[event.stream]:
            until[event.stream] = event.end
            result.append(Event(event.name, event.start, event.duration, event.stream))
    return result


def kind_of_kernel(event: Event) -> str:
    """What a kernel is for, by :data:`KINDS`; ``other`` where no name fits."""
    if event.kind != "kernel":
        return "copy" if event.kind == "memcpy" else "memset"
    name = event.name.lower()
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), "other")


def steps_of(events: Sequence[Event]) -> list[tuple[float, float]]:
    """(start, end) of each annotated step, from the host's clock: each ends behind a wait for all of the device's
    work but the zeroing of the gradients, which runs into the next."""
    return [(event.start, event.end) for event in events if event.kind == "note" and event.name == STEP]


def expensive(
    events: Iterable[Event], windows: Sequence[tuple[float, float]], most: int = 10
) -> list[dict[str, Any]]:
    """The kernels that took most: name, kind, times a step, milliseconds a step, share of the step's time."""
    totals: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0])
    for event in _within(events, windows):
        entry = totals[event.name, kind_of_kernel(event)]
        entry[0] += 1
        entry[1] += event.duration
    order = sorted(totals.items(), key=lambda item: -item[1][1])[:most]
    whole, steps = _length(windows), len(windows)
    return [
        {
            "name": name,
            "kind": kind,
            "count": count / steps,
            "milliseconds": time / steps / 1000,
            "share": time / whole,
        }
        for (name, kind), (count, time) in order
    ]


def by_kind(events: Iterable[Event], windows: Sequence[tuple[float, float]]) -> dict[str, dict[str, float]]:
    """Of each kind of kernel: times and milliseconds a step, share of the step; the largest first. Work on several
    streams at once counts for each."""
    totals: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in _within(events, windows):
        entry = totals[kind_of_kernel(event)]
        entry[0] += 1
        entry[1] += event.duration
    whole, steps = _length(windows), len(windows)
    return {
        kind: {"count": count / steps, "milliseconds": time / steps / 1000, "share": time / whole}
        for kind, (count, time) in sorted(totals.items(), key=lambda item: -item[1][1])
    }


def idle(events: Iterable[Event], window: tuple[float, float]) -> list[Gap]:
    """Every stretch of a step in which no stream of the device had work, in the order of time."""
    begin, end = window
    gaps, busy_until, last = [], begin, "(step begins)"
    for event in sorted((each for each in events if each.on_device), key=lambda each: each.start):
        if event.end <= begin or event.start >= end:
            continue
        if event.start > busy_until:
            gaps.append(Gap(busy_until, event.start - busy_until, last, event.name))
        if event.end > busy_until:
            busy_until, last = event.end, event.name
    if busy_until < end:
        gaps.append(Gap(busy_until, end - busy_until, last, "(step ends)"))
    return gaps


def long_gaps(events: Sequence[Event], window: tuple[float, float], share: float = 0.01) -> list[Gap]:
    """Gaps of more than a share of the step, with what the host did; the longest first."""
    least = share * (window[1] - window[0])
    found = [gap for gap in idle(events, window) if gap.duration > least]
    return [
        Gap(
            gap.start,
            gap.duration,
            gap.after,
            gap.before,
            host_during(events, gap.start, gap.start + gap.duration),
        )
        for gap in sorted(found, key=lambda gap: -gap.duration)
    ]


def host_during(events: Iterable[Event], start: float, end: float) -> str:
    """What the host did for the longest part of a time, each part counted for its innermost event; with the Python
    function around it where the trace has stacks. The events of the thread that has most of them."""
    inside = [e for e in events if not e.on_device and e.kind != "note" and e.start < end and e.end > start]
    if not inside:
        return "Python, outside any recorded operation"
    threads: dict[int, float] = defaultdict(float)
    for event in inside:
        threads[event.stream] += min(event.end, end) - max(event.start, start)
    thread = max(threads, key=threads.__getitem__)
    inside = sorted((e for e in inside if e.stream == thread), key=lambda e: (e.start, -e.duration))
    times: dict[str, float] = defaultdict(float)
    stack: list[Event] = []
    at = start
    for event in [*inside, Event("", end, 0.0)]:
        begin = max(event.start, start)
        while stack and stack[-1].end <= begin:
            if stack[-1].end > at:
                times[_innermost_name(stack)] += stack[-1].end - at
                at = stack[-1].end
            stack.pop()
        if begin > at:
            times[_innermost_name(stack)] += begin - at
            at = begin
        stack.append(event)
    return max(times, key=times.__getitem__)


def _innermost_name(stack: Sequence[Event]) -> str:
    if not stack:
        return "Python, outside any recorded operation"
    python = next((event.name for event in reversed(stack) if event.kind == "python"), None)
    return stack[-1].name if python in (None, stack[-1].name) else f"{stack[-1].name} in {python}"


def synchronisations(
    events: Sequence[Event], windows: Sequence[tuple[float, float]]
) -> dict[str, dict[str, Any]]:
    """Calls with which the host waits for the device, or may: times and milliseconds a step, and the Python stack
    (innermost first) of the longest, where the trace has stacks."""
    found: dict[str, list[Event]] = defaultdict(list)
    for event in _within(events, windows, device=False):
        if event.kind == "runtime" and ("Synchronize" in event.name or event.name.startswith("cudaMemcpy")):
            found[event.name].append(event)
    return {
        name: {
            "count": len(calls) / len(windows),
            "milliseconds": sum(call.duration for call in calls) / len(windows) / 1000,
            "stack": stack_of(events, max(calls, key=lambda call: call.duration)),
        }
        for name, calls in sorted(found.items())
    }


def stack_of(events: Iterable[Event], call: Event, deepest: int = 12) -> list[str]:
    """Python functions around a call, innermost first; empty in a trace without stacks."""
    around = [
        event
        for event in events
        if event.kind == "python"
        and event.stream == call.stream
        and event.start <= call.start
        and event.end >= call.end
    ]
    return [event.name for event in sorted(around, key=lambda event: event.duration)[:deepest]]


def _within(
    events: Iterable[Event], windows: Sequence[tuple[float, float]], device: bool = True
) -> list[Event]:
    return [
        event
        for event in events
        if event.on_device == device and any(begin <= event.start < end for begin, end in windows)
    ]


def _length(windows: Sequence[tuple[float, float]]) -> float:
    return sum(end - begin for begin, end in windows)
