"""The planner beside what was measured on one GPU: every case of ours, time and memory.

    python benchmarks/gpu/planned.py DIR [--fit] [--gpu h200]
    python benchmarks/gpu/planned.py [--output benchmarks/results/h200/predictions.md]

With a folder of records: predicted beside measured, errors, and which rows a constant was fitted to. ``--fit`` finds
the constants of ``planner/stacks.py: CUDA_PLATFORM`` from the rows of :data:`FITTED` and says what they predict of all
others, and of the case held out (``cases.HELD_OUT``), which is never fitted. Without a folder: the predictions
themselves, to be written down before anything is measured. Needs neither torch nor a GPU.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from cases import CASES, HELD_OUT, Case
from ours import run_options
from process import ROOT
from record import Record, read_records

from megatron_syne.config.loader import load_config
from megatron_syne.config.schema import RunConfig
from megatron_syne.models.config import resolve_model
from megatron_syne.planner import costs
from megatron_syne.planner.hardware import GIB, GPUS, Gpu, gpu_of_device
from megatron_syne.planner.memory import CONTEXT_BYTES, memory_by_stage
from megatron_syne.planner.refit import Observation, in_use, refit, with_constants
from megatron_syne.planner.speed import StepTime, step_time
from megatron_syne.planner.stacks import CUDA_PLATFORM, Stack

RESULTS = ROOT / "benchmarks" / "results" / "h200"

FITTED = (
    "8l-bf16",
    "4l-bf16",
    "bf16-accumulate-2",
    "bf16-loss-chunks",
    "32k-4l-bf16",
    "8l-tensorwise",
    "8l-delayed",
    "8l-blockwise",
)
"""Cases that constants are fitted to, chosen before anything was measured: with each another thing changes. All others
are predictions."""

MATRIX_RATE = 790e12
"""FLOP/s of large bf16 products as usually measured on an H100 or H200; the ``machine`` case measures this one's."""


def config_of_values(values: Mapping[str, object]) -> RunConfig:
    """The run that a record's ``config`` or a case's options describe; raises what ``load_config`` does."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(yaml.safe_dump(dict(values)))
        return load_config(path)


@functools.cache
def config_of_case(case: Case) -> RunConfig:
    """The run that measures a case of kind ``ours``."""
    return config_of_values(run_options(case, Path("tokens"), Path("run"), False))


def stack_of(engine: Mapping[str, object]) -> Stack:
    """The software with the engine's options that a case puts over ours (as texts in a record)."""
    options, stack = {name: str(value) for name, value in engine.items()}, CUDA_PLATFORM
    if options.get("cross_entropy_fusion_impl") in ("te", "native"):
        stack = replace(stack, cross_entropy=options["cross_entropy_fusion_impl"])  # type: ignore[arg-type]
    if options.get("cross_entropy_loss_fusion") == "False":
        stack = replace(stack, cross_entropy="native")
    return stack


def notes(config: RunConfig, engine: Mapping[str, object]) -> list[str]:
    """What of a prediction rests on nothing measured, or is not in the planner at all."""
    found = []
    if config.precision.fp8 == "blockwise":
        found.append("blockwise FP8: no speed published; products taken as fast as of the other recipes")
    if config.memory.loss_chunk_tokens is not None:
        found.append("loss in parts: compiled kernels counted, never run")
    if config.optimizer.optimizer_cpu_offload or config.memory.cpu_offloading:
        found.append("offload: assumed rates of host and link")
    if config.optimizer.freeze or config.optimizer.train_only:
        found.append("frozen: activations counted as if all trained")
    if config.data.seq_length > 16384:
        found.append(
            "long sequence: nothing of this software published; torchtitan's ran 13 to 38 % slower than predicted"
        )
    if config.precision.fp8_param_gather:
        found.append("FP8 weights gathered: the cast of weights is counted as without")
    if config.train.deterministic_mode:
        found.append("not in the planner: deterministic kernels")
    if config.monitor.norms_interval == 1:
        found.append("not in the planner: norms in each step")
    known = ("cross_entropy_fusion_impl", "cross_entropy_loss_fusion")
    found += [f"not in the planner: {name}" for name in engine if name not in known]
    return found


@dataclass(frozen=True)
class Planned:
    """What the planner says of one run on one GPU."""

    time: StepTime
    components: dict[str, int]
    notes: list[str]
    loss_seconds: float
    """Of a step, within its element-wise part: the loss without its products."""

    @property
    def tensors(self) -> int:
        """Peak bytes of tensors: torch's ``max_memory_allocated``."""
        return sum(self.components.values()) - self.components["margin"]

    @property
    def reserved(self) -> int:
        """With what the allocator cannot use again: torch's ``max_memory_reserved``."""
        return self.tensors + self.components["margin"] - CONTEXT_BYTES

    @property
    def total(self) -> int:
        """With the CUDA context."""
        return self.tensors + self.components["margin"]


def planned(config: RunConfig, gpu: Gpu, stack: Stack, engine: Mapping[str, object] | None = None) -> Planned:
    """The prediction of a run on one GPU."""
    model = resolve_model(config.model)
    own = step_time(config, model, 1, gpu, stack=stack)
    (memory,) = memory_by_stage(config, model, 1, gpu)
    passes = costs.output_layer(costs.rank_of(config, model, gpu, stack))
    loss = own.num_microbatches * sum(one.elementwise for one in passes)
    return Planned(own, memory.components, notes(config, engine or {}), loss)


@dataclass(frozen=True)
class Row:
    """One record with its prediction; without one where it holds no figures."""

    record: Record
    config: RunConfig | None
    plan: Planned | None

    @property
    def use(self) -> str:
        """Whether constants are fitted to it."""
        if self.record.case == HELD_OUT:
            return "held out"
        return "fitted" if self.record.case in FITTED else "not fitted"

    @property
    def error(self) -> float | None:
        """Predicted seconds over measured, less 1."""
        seconds = self.record.median_seconds
        return self.plan.time.seconds / seconds - 1 if self.plan and seconds else None

    @property
    def memory_error(self) -> float | None:
        """Predicted peak of tensors over what was allocated, less 1."""
        peak = self.record.peak_allocated_bytes
        return self.plan.tensors / peak - 1 if self.plan and peak else None


def gpu_of(record: Record, default: Gpu) -> Gpu:
    """The GPU that it was measured on."""
    return gpu_of_device(str(record.environment.get("device", ""))) or default


def engine_of(record: Record) -> dict[str, object]:
    """The engine's options that its case put over ours."""
    return dict(record.found.get("engine") or {})


def rows_of(
    records: Mapping[str, Record], gpu: Gpu, constants: Mapping[str, float] | None = None
) -> list[Row]:
    """Every record of ours beside its prediction, those with an error without one."""
    rows = []
    for record in records.values():
        if record.kind != "ours":
            continue
        if record.error or record.config is None or not record.step_seconds:
            rows.append(Row(record, None, None))
            continue
        config, engine = config_of_values(record.config), engine_of(record)
        stack = with_constants(stack_of(engine), constants or {})
        rows.append(Row(record, config, planned(config, gpu_of(record, gpu), stack, engine)))
    return rows


def table(rows: Sequence[Row]) -> str:
    """Predicted beside measured, and what is not counted."""
    lines = [
        "| case | use | s/step measured | predicted | error | tokens/s measured | predicted | GiB allocated | "
        "predicted | error | GiB reserved | predicted | notes |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        record, plan = row.record, row.plan
        if plan is None:
            last = (record.error or "no figures").strip().splitlines()[-1]
            lines.append(f"| {record.case} | failed |{' - |' * 10} {last} |")
            continue
        lines.append(
            f"| {record.case} | {row.use} | {record.median_seconds:.4f} | {plan.time.seconds:.4f} | "
            f"{percent(row.error)} | {record.tokens_per_second:,.0f} | {plan.time.tokens_per_second_per_gpu:,.0f} | "
            f"{gib(record.peak_allocated_bytes)} | {gib(plan.tensors)} | {percent(row.memory_error)} | "
            f"{gib(record.peak_reserved_bytes)} | {gib(plan.reserved)} | {'; '.join(plan.notes) or '-'} |"
        )
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> str:
    """Median and worst errors, by use. Failed rows do not count, nor the time of what the planner has not."""
    lines = ["| rows | number | time: median | worst | memory: median | worst |", "|---|---|---|---|---|---|"]
    for use in ("fitted", "not fitted", "held out"):
        own = [row for row in rows if row.plan and row.use == use]
        times = [row.error for row in own if row.error is not None and is_modelled(row.plan)]
        memory = [row.memory_error for row in own if row.memory_error is not None]
        words = " | ".join(f"{median(each)} | {worst(each)}" for each in (times, memory))
        lines.append(f"| {use} | {len(own)} | {words} |")
    return "\n".join(lines)


def is_modelled(plan: Planned | None) -> bool:
    """Whether all that its options change is in the planner."""
    return plan is not None and not any(note.startswith("not in the planner") for note in plan.notes)


def median(errors: Sequence[float]) -> str:
    return f"{statistics.median(map(abs, errors)):.1%}" if errors else "-"


def worst(errors: Sequence[float]) -> str:
    return percent(max(errors, key=abs)) if errors else "-"


def percent(error: float | None) -> str:
    return "-" if error is None else f"{error:+.1%}"


def gib(size: int | None) -> str:
    return "-" if size is None else f"{size / GIB:.1f}"


def observations(rows: Sequence[Row], gpu: Gpu) -> list[Observation]:
    """The rows that constants are fitted to."""
    found = []
    for row in rows:
        seconds = row.record.median_seconds
        if row.use == "fitted" and row.config is not None and seconds:
            own = stack_of(engine_of(row.record))
            found.append(Observation(row.record.case, row.config, seconds, gpu_of(row.record, gpu), own))
    return found


def fragmentation(rows: Sequence[Row]) -> float | None:
    """Reserved beyond allocated, over what comes and goes: ``memory.FRAGMENTATION`` as measured, median of the rows but
    the one held out."""
    shares = [
        (row.record.peak_reserved_bytes - row.record.peak_allocated_bytes)
        / sum(row.plan.components[name] for name in ("activations", "logits", "communication"))
        for row in rows
        if row.use != "held out"
        and row.plan
        and row.record.peak_reserved_bytes
        and row.record.peak_allocated_bytes
    ]
    return statistics.median(shares) if shares else None


def recalibrated(records: Mapping[str, Record], gpu: Gpu) -> str:
    """The constants from the fitted rows, the table with them, the held-out case. Raises ValueError without rows."""
    rows = rows_of(records, gpu)
    seen = observations(rows, gpu)
    constants, before = refit(seen), in_use(CUDA_PLATFORM)
    lines = [
        f"Fitted to {', '.join(one.name for one in seen)}.",
        "",
        "| constant | in use | fitted |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {before[name]:.3f} | {value:.3f} |" for name, value in constants.items()]
    share = fragmentation(rows)
    if share is not None:
        lines.append(f"| memory.FRAGMENTATION (median) | 0.050 | {share:.3f} |")
    again = rows_of(records, gpu, constants)
    held = next(case for case in CASES if case.name == HELD_OUT)
    stack = with_constants(stack_of(dict(held.engine)), constants)
    plan = planned(config_of_case(held), gpu_of(records[seen[0].name], gpu), stack)
    lines += [
        "",
        f"Held out: {HELD_OUT} is predicted at {plan.time.seconds:.4f} s, "
        f"{plan.time.tokens_per_second_per_gpu:,.0f} tokens/s, {gib(plan.tensors)} GiB allocated.",
        "",
        table(again),
        "",
        summary(again),
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; 1 where a fit was asked for and no row is there for it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, help="records of the measured cases")
    parser.add_argument("--fit", action="store_true", help="find the constants again and use them")
    parser.add_argument("--gpu", default="h200", choices=GPUS, help="where a record does not say")
    parser.add_argument("--output", type=Path, help="also write the predictions here")
    options = parser.parse_args(argv)
    gpu = GPUS[options.gpu]
    if options.folder is None:
        from predictions import page

        text = page()
    else:
        records = read_records(options.folder)
        rows = rows_of(records, gpu)
        text = table(rows) + "\n\n" + summary(rows)
        if options.fit:
            try:
                text += "\n\n## Recalibrated\n\n" + recalibrated(records, gpu)
            except ValueError as error:
                print(f"planned.py --fit: {error}", file=sys.stderr)
                return 1
    print(text)
    if options.output is not None:
        options.output.write_text(text.rstrip() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
