"""Stages and learning rate as ``--dry-run`` shows them: a table and a sketch to check a recipe with. No torch."""

from __future__ import annotations

from bisect import bisect_right
from itertools import groupby

from megatron_syne.config.learning_rate import LearningRate, Schedule, key_points
from megatron_syne.config.schema import ModelConfig, RunConfig
from megatron_syne.config.stages import leg_config, legs, stage_model, trains
from megatron_syne.data.mixture.plan import MixturePlan, Segment

PLOT_COLUMNS, PLOT_ROWS = 60, 6

Row = list[str]


def stage_table(config: RunConfig, model: ModelConfig, plan: MixturePlan) -> str:
    """One line per stage: iterations, tokens, sequence length, batch, rotary base, claimed length, what trains, leg.

    A leg is what one engine trains: where a new one begins the run saves, and goes on from that checkpoint. A
    stage of the past of a branch has no entry in ``data.stages``, so only its data is known here.
    """
    own = {stage.name for stage in config.data.stages}
    place = {name: number for number, names in enumerate(legs(config), start=1) for name in names}
    rows = [["stage", "iterations", "tokens", "seq", "batch", "rotary base", "positions", "trains", "leg"]]
    before = 0
    for stage in plan.stages:
        segments = [each for each in plan.segments if each.stage == stage.name]
        row = [stage.name, f"{before + 1:,}-{before + stage.iterations:,}", f"{stage.tokens:,}"]
        row += [" then ".join(f"{each:,}" for each in dict.fromkeys(each.seq_length for each in segments))]
        row += [_batches(segments)]
        if stage.name in own:
            its = stage_model(config, model, stage.name)
            words = trains(leg_config(config, stage.name)).removeprefix("trains ")
            row += [
                _number(its.rotary_base),
                _number(its.max_position_embeddings),
                words,
                str(place[stage.name]),
            ]
        else:
            row += ["-", "-", "over: in the checkpoint", "-"]
        rows.append(row)
        before += stage.iterations
    return "\n".join(_columns(rows))


def learning_rate_section(config: RunConfig, plan: MixturePlan) -> str:
    """Shape and key points of each schedule, and a sketch of the rate over the run with the stages' borders."""
    rate = LearningRate(config, plan)
    over = "begun anew in each stage" if config.schedule.span == "stage" else "one over all stages"
    lines = [f"schedule.span: {config.schedule.span} ({over})"]
    for schedule in rate.schedules:
        lines.append((f"stage {schedule.name}: " if schedule.name else "style: ") + _shape(schedule))
        lines += _key_points(schedule, plan, rate)
    return "\n".join([*lines, "", *_plot(plan, rate)])


def _shape(schedule: Schedule) -> str:
    rates = schedule.rates
    if rates.lr_decay_style != "WSD":
        return rates.lr_decay_style
    return f"WSD, {rates.lr_wsd_decay_style}" if schedule.decay.length else "WSD without decay"


def _key_points(schedule: Schedule, plan: MixturePlan, rate: LearningRate) -> list[str]:
    """The steps at which something begins or ends: iterations before the step, learning rate of the step."""
    return [
        f"{name:<15} iteration {_iterations(plan, sample):>10g}   {rate.at(sample):.4g}"
        for name, sample in key_points(schedule, plan)
    ]


def _iterations(plan: MixturePlan, sample: int) -> float:
    """Iterations before a sample; not whole where a length in tokens ends within one."""
    whole = plan.iteration_at(sample)
    rest = sample - plan.sample_at(whole)
    return whole + rest / max(1, plan.sample_at(whole + 1) - plan.sample_at(whole))


def _plot(plan: MixturePlan, rate: LearningRate) -> list[str]:
    """The rate over the iterations, highest value at the top; below it a ``|`` where a stage begins."""
    last = plan.train_iters - 1
    steps = [last * n // (PLOT_COLUMNS - 1) for n in range(PLOT_COLUMNS)]
    values = [rate.at(plan.sample_at(step)) for step in steps]
    top = max(values)
    rows = [round(value / top * (PLOT_ROWS - 1)) if top > 0 else 0 for value in values]
    lines = []
    for level in reversed(range(PLOT_ROWS)):
        mark = f"{top:.2g}" if level == PLOT_ROWS - 1 else "0" if level == 0 else ""
        lines.append(f"{mark:>8} |" + "".join("*" if row == level else " " for row in rows).rstrip())
    begins = [plan.iteration_at(stage.first_sample) for stage in plan.stages if stage.samples]
    if len(begins) > 1:
        columns = [min(PLOT_COLUMNS - 1, bisect_right(steps, begin - 1)) for begin in begins]
        marks = "".join("|" if n in columns else "-" for n in range(PLOT_COLUMNS))
        lines.append(f"{'stages':>8} +{marks}")
        lines.append(f"{'':>8}  " + _names(columns, [stage.name for stage in plan.stages if stage.samples]))
    return lines


def _names(columns: list[int], names: list[str]) -> str:
    """The stages' names under their first columns, cut to the room that they have."""
    text = ""
    for n, (column, name) in enumerate(zip(columns, names, strict=True)):
        room = columns[n + 1] - column - 1 if n + 1 < len(columns) else len(name)
        text = f"{text:<{column}}" + (name if len(name) <= room else name[: max(0, room - 1)] + "~")
    return text


def _batches(segments: list[Segment]) -> str:
    """``8`` or, with a ramp, ``2 to 8 in 4 sizes``."""
    sizes = [size for size, _ in groupby(each.global_batch_size for each in segments)]
    if len(sizes) > 2 and sizes == sorted(sizes):
        return f"{sizes[0]:,} to {sizes[-1]:,} in {len(sizes)} sizes"
    return " then ".join(f"{size:,}" for size in sizes)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value == int(value) else f"{value:,}"


def _columns(rows: list[Row]) -> list[str]:
    """Rows as text, each column as wide as its widest entry; names and what trains to the left."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    left = {0, len(widths) - 2}
    return [
        "  ".join(
            f"{cell:<{width}}" if n in left else f"{cell:>{width}}"
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
