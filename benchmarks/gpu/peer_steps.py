"""What the peers' programs share: our tokens, a step and its time, and the search for a peer's fastest way.

A peer is measured at its best: every variant (format of the weights, attention kernel, recomputation) is tried for a
few steps, the fastest is measured in full, and all are recorded. A variant that fails (out of memory, a kernel that
refuses) says so in the record and takes nothing with it. Data lies on the GPU before the first step, nothing is logged,
and the loss is read once at the end of a step, as ours is. Not run on a GPU yet.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from cases import Case
from ours import run_yaml
from process import Options, new_record, shape_of
from record import Record
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from megatron_syne.config.loader import load_config
from megatron_syne.data.build import training_dataset
from megatron_syne.data.mixture.planning import plan_mixture

TRIAL_WARM, TRIAL_STEPS = 2, 3
"""Of a variant that is tried."""
TRIAL_SHARE = 0.55
"""Of the case's minutes, after which no other variant is tried: the fastest so far is measured."""
SEED = 1234
"""Of the random weights."""

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
"""Kernels behind torch's ``scaled_dot_product_attention``."""

LossOf = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(tokens, labels), each int64 [micro batch, seq] -> mean loss."""


@dataclass
class Model:
    """What a variant builds: its loss, and what is trained."""

    loss_of: LossOf
    parameters: list[torch.nn.Parameter]


@dataclass
class Variant:
    """One way of a peer."""

    name: str
    build: Callable[[], Model]
    autocast: bool = False
    """Weights in fp32, products in bf16 under ``torch.autocast``."""
    attention: str | None = None
    """One of :data:`BACKENDS`; None = torch's own choice, or no such attention."""


@dataclass
class Timed:
    """Steps of one variant: seconds of those after the warm ones, losses of all."""

    seconds: list[float]
    losses: list[float]
    peak_allocated: int | None = None
    peak_reserved: int | None = None


def record_of(case: Case, options: Options, timed: Timed, found: dict[str, Any]) -> Record:
    """The record of the variant that was measured in full."""
    return new_record(
        case,
        options,
        step_seconds=timed.seconds,
        losses=timed.losses,
        warm_steps=case.warm,
        peak_allocated_bytes=timed.peak_allocated,
        peak_reserved_bytes=timed.peak_reserved,
        found=found,
    )


def pick_device(rehearse: bool) -> torch.device:
    """The GPU, or the CPU in a rehearsal."""
    return torch.device("cpu") if rehearse else torch.device("cuda", 0)


def token_rows(case: Case, options: Options, device: torch.device) -> torch.Tensor:
    """int64 [samples, seq + 1] on the device: the samples that our run of this shape reads, in its order."""
    plain = replace(case, precision="bf16", overrides=(), engine=())
    config = load_config(run_yaml(plain, options.output, options.rehearse))
    vocab_size = shape_of(case, options.rehearse)["vocab_size"]
    samples = training_dataset(config, plan_mixture(config), vocab_size)
    rows = [samples[index].tokens for index in range((case.warm + case.steps) * case.global_batch_size)]
    return torch.from_numpy(np.stack(rows)).to(device)


def attention_context(name: str | None) -> AbstractContextManager[Any]:
    """torch's attention held to one kernel; nothing where none is named."""
    return nullcontext() if name is None else sdpa_kernel(BACKENDS[name])


def train(variant: Variant, case: Case, rows: torch.Tensor, steps: int, warm: int) -> Timed:
    """Build the variant and train it ``warm + steps`` steps: AdamW, clipping at 1, as ours.

    Tokens start anew where ``rows`` are used up. A step ends when its loss was read, behind the optimizer's work.
    FloatingPointError where the last loss is not finite: such a variant is not to win.
    """
    device = rows.device
    on_gpu = device.type == "cuda"
    tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    model = variant.build()
    if on_gpu:  # of the steps alone: some weights are made in another format
        release()
        torch.cuda.reset_peak_memory_stats()
    optimizer = torch.optim.AdamW(
        model.parameters, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=on_gpu or None
    )
    micro, accumulated = case.micro_batch_size, case.global_batch_size // case.micro_batch_size
    timed = Timed([], [])
    with attention_context(variant.attention):
        for step in range(warm + steps):
            started = time.perf_counter()
            total = torch.zeros((), device=device)
            for index in range(accumulated):
                first = (step * accumulated + index) * micro % len(rows)
                part = slice(first, first + micro)
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=variant.autocast):
                    loss = model.loss_of(tokens[part], labels[part]) / accumulated
                loss.backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
            torch.nn.utils.clip_grad_norm_(model.parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            timed.losses.append(float(total))  # waits for all of the step
            if step >= warm:
                timed.seconds.append(time.perf_counter() - started)
    if not math.isfinite(timed.losses[-1]):
        raise FloatingPointError("loss is not finite")
    if on_gpu:
        timed.peak_allocated = torch.cuda.max_memory_allocated()
        timed.peak_reserved = torch.cuda.max_memory_reserved()
    return timed


def release() -> None:
    """Give back what a variant held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Search:
    """Tries variants of a case, remembers what each did, measures the fastest. Errors are found in ``tried``."""

    def __init__(self, case: Case, rows: torch.Tensor) -> None:
        self.case, self.rows = case, rows
        self.tried: dict[str, dict[str, Any]] = {}
        self._fastest: tuple[float, Variant] | None = None
        self._ends = time.monotonic() + TRIAL_SHARE * 60 * case.minutes

    def attempt(self, variants: Iterable[Variant]) -> Variant | None:
        """Try each for a few steps; the fastest of all that were tried so far, None where none has run."""
        for variant in variants:
            if self._fastest is not None and time.monotonic() > self._ends:
                self.tried[variant.name] = {"error": "not tried: the case's time was running out"}
                continue
            try:
                timed = train(variant, self.case, self.rows, TRIAL_STEPS, TRIAL_WARM)
            except Exception as error:  # out of memory, a kernel that refuses this shape
                self.tried[variant.name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
            else:
                seconds = statistics.median(timed.seconds)
                self.tried[variant.name] = facts(timed, self.case)
                if self._fastest is None or seconds < self._fastest[0]:
                    self._fastest = seconds, variant
            release()
            print(f"{variant.name}: {self.tried[variant.name]}", flush=True)
        return self.best

    def out_of_memory(self, before: Collection[str] = ()) -> bool:
        """Whether one of those tried, ``before`` left out, ended for want of memory: less of it may run."""
        errors = [facts.get("error", "") for name, facts in self.tried.items() if name not in before]
        return any(error.startswith("OutOfMemoryError") for error in errors)

    @property
    def best(self) -> Variant | None:
        """The fastest so far."""
        return None if self._fastest is None else self._fastest[1]

    def measure(self) -> tuple[str, Timed]:
        """The fastest in full: (its name, its steps). RuntimeError where no variant has run."""
        if self._fastest is None:
            raise RuntimeError(f"no variant ran: {self.tried}")
        variant = self._fastest[1]
        timed = train(variant, self.case, self.rows, self.case.steps, self.case.warm)
        self.tried[variant.name] |= {"in_full": facts(timed, self.case)}
        release()
        return variant.name, timed


def facts(timed: Timed, case: Case) -> dict[str, Any]:
    """What the record keeps of a variant."""
    seconds = statistics.median(timed.seconds)
    return {
        "median_seconds": seconds,
        "tokens_per_second": case.global_batch_size * case.seq_length / seconds,
        "peak_allocated_bytes": timed.peak_allocated,
        "last_loss": timed.losses[-1],
    }


def attention_times(
    case: Case, shape: dict[str, int], device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> dict[str, float | str]:
    """Seconds of one causal attention, forward and backward, of each kernel: ``flash``, ``flash repeated``
    (keys and values repeated for each query head before it), ...; an error in words where a kernel refuses."""
    batch, heads, groups = case.micro_batch_size, shape["num_attention_heads"], shape["num_query_groups"]
    width = shape["hidden_size"] // heads

    def random(count: int) -> torch.Tensor:
        size = batch, count, case.seq_length, width
        return torch.randn(size, device=device, dtype=dtype, requires_grad=True)

    query, key, value = random(heads), random(groups), random(groups)
    found: dict[str, float | str] = {}
    for name in BACKENDS:
        for repeated in (False, True):
            label = f"{name} repeated" if repeated else name
            try:
                found[label] = _attention_seconds(name, repeated, query, key, value)
            except RuntimeError as error:
                found[label] = str(error).splitlines()[0][:200]
    return found


def _attention_seconds(
    name: str, repeated: bool, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> float:
    times = query.shape[1] // key.shape[1]

    def once() -> None:
        keys, values = (
            (key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)) if repeated else (key, value)
        )
        out = scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=not repeated)
        torch.autograd.grad(out, (query, key, value), torch.ones_like(out))

    def wait() -> None:
        if query.is_cuda:
            torch.cuda.synchronize()

    with attention_context(name):
        for _ in range(2):
            once()
        wait()
        started = time.perf_counter()
        for _ in range(5):
            once()
        wait()
    return (time.perf_counter() - started) / 5


def best_attention(times: dict[str, float | str]) -> str | None:
    """The fastest of :func:`attention_times`; None where none runs here."""
    ran = {label: seconds for label, seconds in times.items() if isinstance(seconds, float)}
    return min(ran, key=ran.__getitem__) if ran else None
