"""A configuration's pictures: memory, pipeline, ranks, the search, and what is read and learnt when. No torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_syne.config.learning_rate import LearningRate, Schedule, key_points
from megatron_syne.config.schema import ModelConfig, ParallelConfig, RunConfig
from megatron_syne.data.mixture.plan import MixturePlan
from megatron_syne.data.mixture.planning import plan_mixture
from megatron_syne.data.mixture.report import mixture_over_tokens
from megatron_syne.data.mixture.supply import epochs_read
from megatron_syne.models.config import padded_vocab_size
from megatron_syne.parallel.topology import chunk_layers, coordinates, data_parallel_size
from megatron_syne.pictures.frontier import Point, draw_frontier, frontier_figure
from megatron_syne.pictures.learning_rate import Curve, KeyPoint, draw_learning_rate, learning_rate_figure
from megatron_syne.pictures.memory import draw_memory, memory_figure
from megatron_syne.pictures.mixture import draw_mixture, mixture_figure
from megatron_syne.pictures.page import page
from megatron_syne.pictures.pipeline import draw_pipeline, pipeline_figure
from megatron_syne.pictures.ranks import draw_ranks
from megatron_syne.planner.hardware import Gpu
from megatron_syne.planner.layouts import recompute_name
from megatron_syne.planner.memory import RankMemory
from megatron_syne.planner.search import Candidate, alike_together, evaluate
from megatron_syne.planner.shapes import shapes
from megatron_syne.planner.timeline import first_and_last, timeline, waiting_shares
from megatron_syne.preflight.manifests import source_token_counts

MOST_PASSES = 20_000
"""Of a longer timeline the first and the last micro-batches are drawn, and where those are more still, no page:
both would take minutes."""
CURVE_POINTS = 1_500


def draw_plan(
    folder: Path,
    config: RunConfig,
    model: ModelConfig,
    world_size: int,
    gpu: Gpu,
    candidates: list[Candidate] | None = None,
) -> list[Path]:
    """Write every picture of a run into ``folder``; returns the files.

    ``model`` is the resolved one; the configuration must have passed ``preflight.rules.check``. Always
    ``memory.png`` and ``ranks.png``; ``timeline.png`` with more than one pipeline stage; ``frontier`` with
    ``candidates`` of a search; ``mixture`` and ``learning_rate`` where the run reads sources. The last three as
    ``.png`` and ``.html``; ``plan.html`` holds all but the rank grid. Raises CannotCreate.
    """
    assert model.num_layers, "resolve_model first"
    folder, name, parallel = Path(folder), _name(config, model, world_size, gpu), config.parallel
    written: list[Path] = []
    figures: list[Any] = []

    def picture(what: str, draw: Callable[..., None], *values: Any) -> None:
        draw(folder / f"{what}.png", *values)
        written.append(folder / f"{what}.png")

    def own_page(what: str, figure: Any) -> None:
        page(folder / f"{what}.html", f"{what.replace('_', ' ')}: {name}", [figure])
        written.append(folder / f"{what}.html")
        figures.append(figure)

    stages = alike_together(shapes(config, model))
    own = evaluate(config, stages, world_size, gpu)
    several = len(stages) > 1
    bars = _memory(parallel, model.num_layers, own.memory)
    title = f"Memory: {name}" + ("; of the run's stages the fullest" if several else "")
    picture("memory", draw_memory, bars, gpu.memory_bytes, gpu.name, title)
    figures.append(memory_figure(bars, gpu.memory_bytes, gpu.name, title))
    picture("ranks", draw_ranks, *_ranks(parallel, model, world_size, gpu), f"Ranks: {name}")
    if parallel.pipeline_model_parallel_size > 1:
        chunks, time = parallel.virtual_pipeline_model_parallel_size or 1, own.time
        sizes = time.num_microbatches, time.forward_seconds, time.backward_seconds, chunks
        title = f"Pipeline of a step, {name}" + ("; the run's longest stage" if several else "")
        passes = 2 * chunks * time.num_microbatches * len(time.forward_seconds)
        tasks = timeline(*sizes) if passes <= MOST_PASSES else first_and_last(*sizes)
        waits = waiting_shares(*sizes) if len(tasks) < passes else None
        picture("timeline", draw_pipeline, tasks, title, waits)
        if len(tasks) <= MOST_PASSES:
            figures.append(pipeline_figure(tasks, title, waits))
    if candidates:
        tokens = sum(stage.tokens for stage in stages)
        points = [_point(candidate, tokens) for candidate in candidates]
        title = f"Layouts of {_title(config, model)} on {world_size:,} x {gpu.name}"
        picture("frontier", draw_frontier, points, gpu.memory_bytes, gpu.name, title)
        own_page("frontier", frontier_figure(points, gpu.memory_bytes, gpu.name, title))
    if not config.data.mock and config.data.stages:
        plan = plan_mixture(config)
        mixture, rate = _mixture(config, plan), _learning_rate(config, plan)
        picture("mixture", draw_mixture, *mixture)
        own_page("mixture", mixture_figure(*mixture))
        picture("learning_rate", draw_learning_rate, *rate)
        own_page("learning_rate", learning_rate_figure(*rate))
    page(folder / "plan.html", name, figures)
    return [*written, folder / "plan.html"]


def _title(config: RunConfig, model: ModelConfig) -> str:
    if config.model.preset:
        return config.model.preset
    if config.model.hf_path:
        # bytes that are no UTF-8 would be refused by fonts and pages
        return Path(config.model.hf_path).resolve().name.encode("utf-8", "replace").decode()
    return f"{model.model_type}, {model.num_layers} layers of {model.hidden_size:,}"


def _name(config: RunConfig, model: ModelConfig, world_size: int, gpu: Gpu) -> str:
    """``llama3_8b on 8 x h100, TP2 PP2 DP2``."""
    parallel = config.parallel
    sizes = {
        "TP": parallel.tensor_model_parallel_size,
        "CP": parallel.context_parallel_size,
        "PP": parallel.pipeline_model_parallel_size,
        "VP": parallel.virtual_pipeline_model_parallel_size or 1,
        "DP": data_parallel_size(parallel, world_size),
    }
    layout = " ".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1) or "one rank"
    return f"{_title(config, model)} on {world_size:,} x {gpu.name}, {layout}"


def _holds(parallel: ParallelConfig, num_layers: int) -> list[str]:
    """What each pipeline stage holds: ``embedding, layers 0-1 | 16-17``."""
    stages = chunk_layers(parallel, num_layers)
    texts = []
    for number, chunks in enumerate(stages):
        runs = [
            f"{each[0]}-{each[-1]}" if len(each) > 1 else f"{each[0]}" if each else "none" for each in chunks
        ]
        if len(runs) > 6:
            runs = [*runs[:3], "...", runs[-1]]
        text = ("layer " if sum(map(len, chunks)) == 1 else "layers ") + " | ".join(runs)
        if number == 0:
            text = f"embedding, {text}"
        texts.append(f"{text}, output" if number == len(stages) - 1 else text)
    return texts


def _memory(parallel: ParallelConfig, num_layers: int, memory: list[RankMemory]) -> dict[str, dict[str, int]]:
    """Components by the name of the pipeline stage, with what it holds."""
    bars, stages = {}, chunk_layers(parallel, num_layers)
    for each in memory:
        layers, ends = sum(map(len, stages[each.stage])), []
        if each.stage == 0:
            ends.append("embedding")
        if each.stage == len(stages) - 1:
            ends.append("output")
        words = f"stage {each.stage}: {layers} layer{'s' if layers != 1 else ''}"
        bars[words + (f"\n+ {', '.join(ends)}" if ends else "")] = each.components
    return bars


def _ranks(
    parallel: ParallelConfig, model: ModelConfig, world_size: int, gpu: Gpu
) -> tuple[list[tuple[int, int, int, int]], list[str], dict[str, list[str]], list[str], int]:
    heads, groups, ffn, layers = (
        model.num_attention_heads,
        model.num_query_groups,
        model.ffn_hidden_size,
        model.num_layers,
    )
    assert heads and groups and ffn and layers, "resolve_model first"
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    at = [coordinates(rank, parallel, world_size) for rank in range(world_size)]
    tensor = {
        "query heads": _cut(heads, tp),
        "key/value heads": _cut(groups, tp),
        "feed-forward columns": _cut(ffn, tp),
        "vocabulary rows": _cut(padded_vocab_size(model, tp), tp),
    }
    sequence = [f"parts {c} and {2 * cp - 1 - c} of {2 * cp} of each sequence" for c in range(cp)]
    places = [(each.tp, each.cp, each.dp, each.pp) for each in at]
    return places, _holds(parallel, layers), tensor, sequence, gpu.gpus_per_node


def _cut(count: int, tp: int) -> list[str]:
    """First and last of what each TP rank holds; one that several share where there are fewer than ranks."""
    if count < tp:
        return [f"{rank * count // tp}" for rank in range(tp)]
    each = count // tp
    return [f"{rank * each:,}-{(rank + 1) * each - 1:,}" if each > 1 else f"{rank}" for rank in range(tp)]


def _point(candidate: Candidate, tokens: int) -> Point:
    """``tokens`` of the whole run: a layout is as fast as it takes all of them."""
    time, speed = candidate.time, candidate.time.tokens_per_second_per_gpu
    memory = candidate.config.memory
    some = (
        memory.recompute_method == "block" and memory.recompute_num_layers is not None
    )  # how many: the label
    if candidate.run_seconds:
        speed = tokens / candidate.run_seconds / time.world_size
    return Point(
        label=candidate.layout,
        group=f"recompute {'some layers' if some else recompute_name(memory)}",
        peak_bytes=candidate.peak_bytes,
        speed=speed,
        hover=f"step {time.seconds:.3g} s, MFU {time.mfu:.1%}, bubble {time.bubble:.1%}",
    )


def _mixture(config: RunConfig, plan: MixturePlan) -> tuple[Any, ...]:
    counts, _ = source_token_counts(config)
    positions, shares = mixture_over_tokens(plan)
    return positions, shares, _stage_ends(plan), epochs_read(plan, counts)


def _stage_ends(plan: MixturePlan) -> list[tuple[str, int]]:
    ends = np.cumsum([stage.tokens for stage in plan.stages]).tolist()
    return [(stage.name, int(end)) for stage, end in zip(plan.stages, ends, strict=True)]


def _learning_rate(
    config: RunConfig, plan: MixturePlan
) -> tuple[Curve, list[tuple[str, int]], list[KeyPoint], str]:
    rate = LearningRate(config, plan)
    points = [point for schedule in rate.schedules for point in _key_points(schedule, plan, rate)]
    if config.schedule.span == "run":
        begins = [
            (f"{stage.name}: first step", stage.first_sample) for stage in plan.stages[1:] if stage.samples
        ]
        points = sorted([*points, *_at(begins, plan, rate)], key=lambda point: point.step)
    last = plan.train_iters - 1
    steps = {round(last * n / CURVE_POINTS) for n in range(CURVE_POINTS + 1)}
    # both sides of each point too, so that edges and corners are sharp
    steps |= {
        step for point in points for step in (int(point.step) - 1, int(point.step), int(point.step) + 1)
    }
    ordered = sorted(step for step in steps if 0 <= step <= last)
    samples = [plan.sample_at(step) for step in ordered]
    curve = Curve(
        [_tokens(plan, sample) for sample in samples], ordered, [rate.at(sample) for sample in samples]
    )
    styles = dict.fromkeys(schedule.rates.lr_decay_style for schedule in rate.schedules)
    span = ", begun anew in each stage" if config.schedule.span == "stage" else ""
    title = f"Learning rate: {' and '.join(styles)}{span}; {plan.train_iters:,} steps"
    return curve, _stage_ends(plan), points, title


def _key_points(schedule: Schedule, plan: MixturePlan, rate: LearningRate) -> list[KeyPoint]:
    """Where something begins or ends, in order; of those that fall on one sample the first."""
    stage = f"{schedule.name}: " if schedule.name else ""
    found = [(name, sample) for name, sample in key_points(schedule, plan) if sample < plan.num_samples]
    named = {sample: stage + name for name, sample in reversed(found)}
    return _at([(name, sample) for sample, name in sorted(named.items())], plan, rate)


def _at(found: list[tuple[str, int]], plan: MixturePlan, rate: LearningRate) -> list[KeyPoint]:
    return [
        KeyPoint(name, _tokens(plan, sample), _step(plan, sample), rate.at(sample)) for name, sample in found
    ]


def _tokens(plan: MixturePlan, sample: int) -> int:
    """Tokens before a sample of the run."""
    before = 0
    for segment in plan.segments:
        if sample < segment.end:
            return before + (sample - segment.first_sample) * segment.seq_length
        before += segment.tokens
    return before


def _step(plan: MixturePlan, sample: int) -> float:
    """Steps before a sample; not whole where a length in tokens ends within one."""
    whole = plan.iteration_at(sample)
    begin, end = (plan.sample_at(step) for step in (whole, whole + 1))
    return whole + (sample - begin) / max(1, end - begin)
