"""The facts of a plan as tables for people. No torch."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence

import yaml

from megatron_syne.planner.hardware import GIB
from megatron_syne.planner.plan_facts import Facts

WIDTH = 118
SAME_STEP = ("step_seconds", "tokens_per_step", "seq_length", "micro_batch_size", "parts")


def text_of(facts: Facts) -> str:
    """The facts of a plan as tables."""
    sections = [_head(facts)]
    if "search" in facts:
        sections += _search_text(facts)
    sections += [f"{_layout(facts)}\n\n{_memory_text(facts)}", _recompute_text(facts)]
    if facts["gpu"]:
        sections += [_speed_text(facts), _hours_text(facts), accuracy_text(facts["accuracy"])]
    else:
        sections.append("platform cpu: no speed is predicted; the planner knows the rates of GPUs alone")
    return "\n\n".join(sections)


def accuracy_text(facts: Facts) -> str:
    """How far to trust the speed."""
    text = (
        f"How good is this? Against {facts['published_rows']} published rows the predicted tokens/s were off by: "
        f"median error {facts['median_error']:.1%}, worst {facts['worst_error']:.1%}; measure before you spend."
    )
    if facts["outside"]:
        text = "\n".join(
            [text, *_wrapped(f"This plan lies outside of those rows: {', '.join(facts['outside'])}.")]
        )
    return text


def _head(facts: Facts) -> str:
    model, gpu = facts["model"], facts["gpu"]
    machine = (
        f"{facts['gpus']:,} x {gpu['name']} ({gpu['memory_bytes'] / GIB:.0f} GiB)"
        if gpu
        else f"{facts['gpus']} CPU ranks"
    )
    return f"{model['name']}: {_count(model['parameters'])} parameters, {facts['precision']}, on {machine}"


def _layout(facts: Facts) -> str:
    layout, title = facts["layout"], "Layout"
    if "search" in facts:
        title = "The first in detail" if facts["search"]["candidates"] else "The nearest miss in detail"
    vpp = layout["virtual_pipeline_model_parallel_size"]
    return (
        f"{title}: TP {layout['tensor_model_parallel_size']} x PP {layout['pipeline_model_parallel_size']}"
        + (f" (VPP {vpp})" if vpp else "")
        + f" x CP {layout['context_parallel_size']} x DP {layout['data_parallel_size']}"
        + f"{', SP' if layout['sequence_parallel'] else ''}; recompute: {layout['recompute']}"
    )


def _memory_text(facts: Facts) -> str:
    names = list(facts["memory"][0]["components"])
    rows = [["stage", "layers", *names, "total"]]
    for each in facts["memory"]:
        figures = [each["components"][name] for name in names] + [each["total"]]
        rows.append(
            [
                str(each["stage"]),
                str(each["layers"]),
                *(_gib(value, facts["peak_bytes"]) for value in figures),
            ]
        )
    shown = [rows[0], *_folded(rows[1:])]
    where = f", in {facts['memory_of']}" if facts["memory_of"] else ""
    lines = [f"Memory of a rank, GiB, by pipeline stage{where}", *_columns(shown)]
    if facts["gpu"]:
        room = facts["gpu"]["memory_bytes"] - facts["peak_bytes"]
        verdict = (
            f"fits: {room / GIB:.1f} GiB to spare"
            if room >= 0
            else f"DOES NOT FIT: {-room / GIB:.1f} GiB too many"
        )
        lines.append(f"{verdict} of {facts['gpu']['memory_bytes'] / GIB:.0f} on the fullest")
    return "\n".join(lines)


def _recompute_text(facts: Facts) -> str:
    speed = bool(facts["gpu"])
    rows = [["recompute", "activations", "total", *(["fits", "tokens/s/GPU"] if speed else [])]]
    for each in facts["recompute"]:
        row = [
            each["choice"] + (" *" if each["chosen"] else ""),
            _gib(each["activations"], facts["peak_bytes"]),
            _gib(each["total"], facts["peak_bytes"]),
        ]
        if speed:
            row += ["yes" if each["fits"] else "no", f"{each['tokens_per_second_per_gpu']:,.0f}"]
        rows.append(row)
    return "\n".join(
        ["The same under each choice of recompute, GiB on the fullest rank (* = chosen)", *_columns(rows)]
    )


def _speed_text(facts: Facts) -> str:
    kinds: list[tuple[list[str], Facts]] = []  # stages whose steps are the same are told of once
    for stage in facts["stages"]:
        same = next(
            (names for names, first in kinds if all(first[key] == stage[key] for key in SAME_STEP)), None
        )
        if same is None:
            kinds.append(([stage["name"]], stage))
        else:
            same.append(stage["name"])
    lines = [line for names, stage in kinds for line in _step_text(names, stage)]
    first = facts["stages"][0]
    lines += [
        "MFU = tokens/s/GPU x model FLOPs of a token / peak of one GPU "
        f"({first['peak_flops'] / 1e12:,.0f} TFLOP/s, dense); model FLOPs of a token",
        "= 6 x parameters of the matrices (no input embedding) + 6 x layers x heads x head width x sequence (causal",
        f"attention counted once) = {first['model_flops_per_token']:.3e}; what is computed again does not count.",
    ]
    return "\n".join(lines)


def _step_text(names: Sequence[str], stage: Facts) -> list[str]:
    seconds = stage["step_seconds"]
    parts = [
        f"{part} {value:.3f} s ({value / seconds:.1%})"
        for part, value in sorted(stage["parts"].items(), key=lambda each: -each[1])
        if value / seconds >= 0.0005
    ]
    which = f", {'stages' if len(names) > 1 else 'stage'} {', '.join(names)}" if names[0] else ""
    return [
        f"Speed{which}: {stage['tokens_per_step']:,} tokens a step = {stage['global_batch_size']} x "
        f"{stage['seq_length']:,} in {stage['num_microbatches']} micro-batches of {stage['micro_batch_size']}",
        f"  {stage['tokens_per_second_per_gpu']:,.0f} tokens/s/GPU, "
        f"{stage['model_flops_per_second_per_gpu'] / 1e12:,.0f} model TFLOP/s/GPU, MFU {stage['mfu']:.1%}, "
        f"bubble {stage['bubble']:.1%} of the busiest stage, exposed communication "
        f"{stage['exposed_communication_seconds'] / seconds:.1%}",
        *_wrapped(f"  a step takes {seconds:.3f} s: " + ", ".join(parts)),
        f"  a checkpoint takes {stage['checkpoint_seconds']:.0f} s",
    ]


def _hours_text(facts: Facts) -> str:
    run = facts["run"]
    rows = [["budget", "tokens", "steps", "hours", "GPU-hours"]]
    for stage in facts["stages"]:
        rows.append(
            [stage["name"] or "training", f"{stage['tokens']:,}", f"{stage['iterations']:,}", *_hours(stage)]
        )
    own = {"hours": run["checkpoint_hours"], "gpu_hours": run["checkpoint_hours"] * facts["gpus"]}
    rows.append([f"checkpoints ({run['checkpoints']:,})", "", "", *_hours(own)])
    rows.append(["all", f"{run['tokens']:,}", f"{run['iterations']:,}", *_hours(run)])
    return "\n".join([*_columns(rows), "without validation, starts, data that comes late, and failures"])


def _search_text(facts: Facts) -> list[str]:
    search, sections = facts["search"], []
    head = f"Search: {search['compared']:,} layouts compared, {search['fit']:,} fit"
    if search["candidates"]:
        close = (
            f"{search['close']:,} more are within {facts['accuracy']['median_error']:.1%} of the first, the median "
            f"error of these predictions: between them a measurement decides."
        )
        sections.append("\n".join([head, *_columns(_candidate_rows(search["candidates"])), close]))
        sections.append(
            "\n".join(["Why the first is the first, one change at a time:", *_listed(search["reasons"])])
        )
        if search["misses"]:
            lines = [
                "Faster, but they do not fit (GiB too many):",
                *_columns(_candidate_rows(search["misses"])),
            ]
            sections.append("\n".join(lines))
    else:
        sections.append(
            "\n".join([f"{head}; the nearest misses:", *_columns(_candidate_rows(search["misses"]))])
        )
        lines = ["What would make it fit (recompute and CP have been tried):", *_listed(search["remedies"])]
        sections.append("\n".join(lines))
    if search["own_refused"]:
        sections.append(
            "\n".join(_wrapped(f"The configuration's own layout cannot run: {search['own_refused']}"))
        )
    if search["own"]:
        sections.append(_own_text(search))
    if search["candidates"]:
        changes = _yaml(search["to_write"]) or "  nothing: it is there already"
        title = "Write into the YAML:"
        if search["to_write_is_all"]:
            title = "The first as a YAML file, for --config (data.mock and train_iters give way to your data.stages):"
        sections.append(f"{title}\n{changes}")
    return sections


def _own_text(search: Facts) -> str:
    own = search["own"]
    text = f"The configuration's own layout, {own['layout']}: {_gib(own['peak_bytes'])} GiB"
    if not own["fits"]:
        return f"{text}, does not fit"
    text += f", {own['tokens_per_second_per_gpu']:,.0f} tokens/s/GPU, MFU {own['mfu']:.1%}"
    if not search["candidates"]:
        return text
    gain = own["run_seconds"] / search["candidates"][0]["run_seconds"] - 1
    return f"{text}; the first is {gain:.1%} faster"


def _candidate_rows(candidates: Sequence[Facts]) -> list[list[str]]:
    rows = [["", "layout", "GiB", "over", "s/step", "tokens/s/GPU", "MFU", "bubble"]]
    for n, each in enumerate(candidates, start=1):
        over = f"{each['over_bytes'] / GIB:.1f}" if "over_bytes" in each else "-"
        row = [str(n), each["layout"], _gib(each["peak_bytes"]), over, f"{each['step_seconds']:.2f}"]
        rows.append(
            [*row, f"{each['tokens_per_second_per_gpu']:,.0f}", f"{each['mfu']:.1%}", f"{each['bubble']:.1%}"]
        )
    if all("over_bytes" not in each for each in candidates):
        rows = [row[:3] + row[4:] for row in rows]
    return rows


def counts_text(rows: Sequence[Facts]) -> str:
    """One line per number of GPUs."""
    table = [
        ["GPUs", "layout", "GiB", "fits", "s/step", "tokens/s", "tokens/s/GPU", "MFU", "hours", "GPU-hours"]
    ]
    for each in rows:
        if "refused" in each:
            continue
        table.append(
            [
                f"{each['gpus']:,}",
                each["layout"],
                _gib(each["peak_bytes"]),
                "yes" if each["fits"] else "no",
                f"{each['step_seconds']:.2f}",
                f"{each['tokens_per_second_per_gpu'] * each['gpus']:,.0f}",
                f"{each['tokens_per_second_per_gpu']:,.0f}",
                f"{each['mfu']:.1%}",
                *_hours(each),
            ]
        )
    refused = [f"{each['gpus']:,} GPUs: {each['refused']}" for each in rows if "refused" in each]
    return "\n".join([*_columns(table), *refused])


def _yaml(overrides: Facts) -> str:
    """Dotted options as sections of a configuration."""
    lines: list[str] = []
    above: list[str] = []
    for key, value in sorted(overrides.items(), key=lambda each: each[0].split(".")[:-1]):
        *sections, option = key.split(".")
        for depth, name in enumerate(sections):
            if above[: depth + 1] != sections[: depth + 1]:
                lines.append(f"{'  ' * (depth + 1)}{name}:")
        above = sections
        lines.append(f"{'  ' * (len(sections) + 1)}{option}: {_yaml_value(value)}")
    return "\n".join(lines)


def _yaml_value(value: object) -> str:
    """A value in one line, as YAML reads it."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
    return text.removesuffix("\n").removesuffix("\n...")


def _hours(facts: Facts) -> list[str]:
    figures = [facts["hours"], facts["gpu_hours"]]
    return [
        f"{value:,.0f}" if value >= 1000 else f"{value:,.1f}" if value >= 10 else f"{value:.2f}"
        for value in figures
    ]


def _folded(rows: list[list[str]]) -> Iterator[list[str]]:
    """Neighbouring stages with the same figures in one row: ``1-6``."""
    n = 0
    while n < len(rows):
        end = n
        while end + 1 < len(rows) and rows[end + 1][1:] == rows[n][1:]:
            end += 1
        yield [rows[n][0] if end == n else f"{rows[n][0]}-{rows[end][0]}", *rows[n][1:]]
        n = end + 1


def _listed(lines: Sequence[str]) -> list[str]:
    return [part for line in lines for part in _wrapped(f"- {line}")]


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(
        line, WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )


def _gib(value: float, of: float = math.inf) -> str:
    """GiB, with more digits where the largest of a table is small."""
    return f"{value / GIB:.{1 if of >= GIB else 4}f}"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.2f} million"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest entry: words to the left, numbers to the right."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    left = [all(not row[n][:1].isdigit() for row in rows[1:]) for n in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            f"{cell:<{width}}" if to_left else f"{cell:>{width}}"
            for cell, width, to_left in zip(row, widths, left, strict=True)
        ).rstrip()
        for row in rows
    ]
