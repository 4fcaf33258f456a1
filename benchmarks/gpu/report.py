"""The tables of a folder of results, as Markdown: what was measured, and what of it the goals ask for.

    python benchmarks/gpu/report.py DIR > DIR/tables.md

A case without a record is "not measured", never a figure. No torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cases import CASES, FP8, Case
from goals import Records, goals, matmul_rate, measured, ratio
from process import ROOT
from record import Record, read_records

from megatron_syne.planner.hardware import gpu_of_device

assert ROOT  # it is in the path from here on

ABSENT = "not measured"
MIN_STEPS = 20
RATED = ("ours", "transformers", "compiled")
"""Kinds that are judged by their speed."""
LEFT_OUT = ("mean", "largest", "cpu_mean")
"""Of a distribution whose median is shown."""

HEAD = """\
A step's seconds: the median of the steps after the warm ones. Model TFLOP/s: tokens/s x model FLOPs of a token
(`megatron_syne/models/flops.py`: 6 x matrix parameters + 6 x layers x heads x head width x sequence length; causal
attention counted once, nothing that is computed again). MFU: model FLOP/s / the data sheet's dense peak of the
products' format (`megatron_syne/planner/hardware.py`). Of matmul: model FLOP/s / this machine's measured rate of a bf16
product 8192 x 8192 x 8192."""


def tables(records: Records) -> str:
    """Everything, as Markdown."""
    parts = [
        machines(records),
        "## Goals\n\n" + goals_table(records),
        "## Speed\n\n" + HEAD + "\n\n" + speed_table(records),
        "## Time of a step\n\n" + split_table(records),
        "## Changes\n\n" + changes_table(records),
        "## The whole 8B on one GPU\n\n" + losses_table(records),
        "## The machine\n\n" + rates_table(records),
        "## Peers' variants\n\n" + variants_table(records),
        "## Loader, host, stall\n\n" + found_lists(records),
        "## Failed\n\n" + failures(records),
        "## Not measured\n\n" + not_measured(records),
    ]
    return "\n\n".join(parts)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; its first column to the left, the others to the right."""
    lines = [f"| {' | '.join(head)} |", "|---" + "|--:" * (len(head) - 1) + "|"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join(lines)


def machines(records: Records) -> str:
    """GPU, versions, commit and date of what was measured: a line for each that differ."""
    lines: dict[str, list[str]] = {}
    for name, record in records.items():
        here = record.environment
        versions = ", ".join(
            f"{key} {value}" for key, value in here.get("versions", {}).items() if value != "absent"
        )
        line = f"{here.get('device')}, driver {here.get('driver')}, {versions}; commit {here.get('commit')}"
        line += f", {here.get('date')}"
        lines.setdefault(line, []).append(name)
    if not lines:
        return "Nothing is measured yet."
    told = [f"* {line}: {len(names)} case(s)" for line, names in lines.items()]
    if any(record.command.endswith("--rehearse") for record in records.values()):
        told.insert(0, "**A rehearsal with tiny shapes on a CPU: no figure here means anything.**\n")
    return "\n".join(told)


def goals_table(records: Records) -> str:
    """Met or not."""
    words = {None: ABSENT, True: "met", False: "**not met**"}
    rows = [(goal, need, number(found, "{:.3f}"), words[met]) for goal, need, found, met in goals(records)]
    return table(("goal", "needed", "found", ""), rows)


def number(value: float | None, form: str) -> str:
    """A figure, or that there is none."""
    return ABSENT if value is None else form.format(value)


def timed(records: Records) -> list[tuple[Case, Record]]:
    """The cases whose steps are the point, in the order of the list."""
    found = [(case, measured(records, case.name)) for case in CASES if case.kind in RATED]
    return [(case, record) for case, record in found if record is not None and record.step_seconds]


def speed_table(records: Records) -> str:
    """Tokens/s, FLOP/s, memory."""
    rows = []
    for case, record in timed(records):
        flops, seconds = record.model_flops_per_second, record.median_seconds
        assert flops is not None and seconds is not None
        gpu = gpu_of_device(record.environment.get("device", ""))
        peak = gpu.peak_flops(record.precision in FP8) if gpu is not None else None
        ordered = sorted(record.step_seconds)
        spread = (ordered[int(0.9 * (len(ordered) - 1))] - ordered[int(0.1 * (len(ordered) - 1))]) / seconds
        count = str(len(ordered)) + ("" if len(ordered) >= MIN_STEPS else " (few)")
        rows.append(
            (
                case.name,
                f"{record.shape['num_layers']} x {record.shape['seq_length']}",
                record.precision,
                f"{seconds * 1000:,.1f}",
                f"{spread:.1%}",
                count,
                f"{record.tokens_per_second or 0:,.0f}",
                f"{flops / 1e12:,.1f}",
                number(ratio(flops, peak), "{:.1%}"),
                number(ratio(flops, matmul_rate(records)), "{:.1%}"),
                number(gib(record.peak_allocated_bytes), "{:.1f}"),
                number(gib(record.peak_reserved_bytes), "{:.1f}"),
            )
        )
    head = (
        "case",
        "layers x tokens",
        "format",
        "step, ms",
        "p90 - p10",
        "steps",
        "tokens/s",
        "model TFLOP/s",
        "MFU",
    )
    return table((*head, "of matmul", "peak, GiB", "reserved, GiB"), rows) if rows else ABSENT


def gib(amount: int | None) -> float | None:
    """Bytes in GiB."""
    return None if amount is None else amount / 2**30


def split_table(records: Records) -> str:
    """Where the time of our steps goes; the shares of loader and loggers are of all steps together."""
    rows = [
        (
            case.name,
            *(
                f"{1000 * record.seconds[part]:,.2f}"
                for part in ("data", "forward_backward", "optimizer", "watching")
            ),
            f"{1000 * record.seconds['other']:,.2f}",
            f"{record.found['loader_share']:.3%}",
            f"{record.found['logger_share']:.3%}",
            number(
                record.found.get("steps_with_norms") and 1000 * record.found["steps_with_norms"], "{:,.1f}"
            ),
        )
        for case, record in timed(records)
        if case.kind == "ours"
    ]
    head = ("case", "data, ms", "forward and backward", "optimizer", "watching", "other", "loader", "loggers")
    return table((*head, "whole step with norms, ms"), rows) if rows else ABSENT


def changes_table(records: Records) -> str:
    """What each change was expected to do, beside what it did: tokens/s and peak memory against its baseline."""
    rows = [
        (case.name, case.baseline or "", case.prediction, effect(case, records))
        for case in CASES
        if case.prediction
    ]
    return table(("case", "against", "predicted", "measured"), rows)


def effect(case: Case, records: Records) -> str:
    """What a case did against its baseline, or by itself where it has none."""
    if (record := records.get(case.name)) is None:
        return ABSENT
    if record.error:
        return "failed"
    if case.kind == "stall":
        waits = [
            f"{save['stall_seconds'] + save['looking_seconds']:.2f}"
            for save in record.found["saves"].values()
        ]
        return f"training waits {', '.join(waits)} s"
    base = measured(records, case.baseline or "")
    rate, peak = record.tokens_per_second, record.peak_allocated_bytes
    if case.baseline is None:
        words = [number(rate, "{:,.0f} tokens/s"), number(gib(peak), "{:.1f} GiB")]
    elif base is None:
        return "measured, its baseline not"
    else:
        words = [number(ratio(rate, base.tokens_per_second), "x{:.3f} tokens/s")]
        if peak is not None and base.peak_allocated_bytes is not None:
            words.append(f"{(peak - base.peak_allocated_bytes) / 2**30:+.1f} GiB")
    return ", ".join(words)


def losses_table(records: Records) -> str:
    """Losses of the runs on real text."""
    lines = []
    for case in CASES:
        record = measured(records, case.name)
        if not case.real_text or record is None or not record.losses:
            continue
        text = ", ".join(f"{loss:.3f}" for loss in record.losses)
        lines.append(f"* {case.name} ({record.found.get('tokens', '?')} tokens): {text}")
    return "\n".join(lines) or ABSENT


def rates_table(records: Records) -> str:
    """The ceilings."""
    machine = measured(records, "machine")
    if machine is None:
        return ABSENT
    rows = []
    for name, value in machine.found.items():
        if isinstance(value, float):
            scale, unit = (1e9, "GB/s") if name.startswith("copy") else (1e12, "TFLOP/s")
            rows.append((name, f"{value / scale:,.1f} {unit}"))
    told = [f"* {name}: {reason}" for name, reason in machine.found.get("missing", {}).items()]
    told += [f"* {name}: {machine.found[name]}" for name in ("before", "after") if name in machine.found]
    return table(("what", "rate"), rows) + "\n\n" + "\n".join(told)


def variants_table(records: Records) -> str:
    """What of the peers was tried."""
    rows = []
    for case in CASES:
        record = measured(records, case.name)
        if record is None or case.kind not in ("transformers", "compiled"):
            continue
        for name, facts in record.found.get("variants", {}).items():
            rate, peak = facts.get("tokens_per_second"), facts.get("peak_allocated_bytes")
            best = " (measured in full)" if name == record.found.get("best") else ""
            last = facts.get("error", "")[:120] if rate is None else number(gib(peak), "{:.1f} GiB")
            rows.append((case.name, name + best, number(rate, "{:,.0f}"), last))
    return table(("case", "variant", "tokens/s, few steps", "peak, or why not"), rows) if rows else ABSENT


def found_lists(records: Records) -> str:
    """The plain figures of the cases that are about something else than steps."""
    lines = []
    for case in CASES:
        record = measured(records, case.name)
        if record is None or case.kind not in ("loader", "host", "stall"):
            continue
        lines.append(f"* {case.name}: " + "; ".join(flat(record.found)))
    return "\n".join(lines) or ABSENT


def flat(found: Mapping[str, Any], above: str = "") -> list[str]:
    """``name value`` of each plain value, those of inner mappings by their path; lists are left to the record."""
    words = []
    for name, value in found.items():
        if isinstance(value, dict):
            words += flat(value, f"{above}{name} / ")
        elif name in LEFT_OUT:
            continue
        elif isinstance(value, float):
            words.append(f"{above}{name} {value:.4g}")
        elif not isinstance(value, list):
            words.append(f"{above}{name} {value}")
    return words


def failures(records: Records) -> str:
    """Each case that failed, with the end of its error."""
    lines = [
        f"* {name}: `{record.error.strip().splitlines()[-1][:300]}`"
        for name, record in records.items()
        if record.error
    ]
    return "\n".join(lines) or "none"


def not_measured(records: Records) -> str:
    """The cases without a record."""
    return ", ".join(case.name for case in CASES if case.name not in records) or "none"


def main(argv: Sequence[str] | None = None, write: Callable[[str], Any] = print) -> int:
    """Print the tables of a folder."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        raise SystemExit("usage: python benchmarks/gpu/report.py DIR (a folder of results)")
    write(tables(read_records(Path(arguments[0]))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
