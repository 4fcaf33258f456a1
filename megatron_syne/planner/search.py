"""Layouts of a run, ranked by predicted speed among those that fit; what is looked at: :func:`search`. No torch.

A run of several stages is ranked by the time of all its tokens; its memory is that of the stage that needs most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from megatron_syne.config.schema import ModelConfig, ParallelConfig, RunConfig
from megatron_syne.errors import ConfigError
from megatron_syne.parallel.topology import data_parallel_size
from megatron_syne.planner.hardware import GIB, Gpu
from megatron_syne.planner.layouts import (
    RECOMPUTE,
    Layout,
    Overrides,
    changed,
    layouts,
    recompute_name,
)
from megatron_syne.planner.memory import RankMemory, memory_by_stage
from megatron_syne.planner.shapes import Shape, shapes
from megatron_syne.planner.speed import StepTime, step_time
from megatron_syne.preflight.data_rules import length_is_given, mixture_is_sound
from megatron_syne.preflight.facts import Facts, PlatformName
from megatron_syne.preflight.rules import check, sizes_are_positive

PLATFORM: PlatformName = "cuda"
"""Layouts are searched for GPUs."""

HOPELESS = 1.25
"""How many times as slow as the fastest that fits a layout may be for its memory to be looked at."""


@dataclass(frozen=True)
class Candidate:
    """One layout: what it changes in the configuration, and the two predictions."""

    config: RunConfig
    overrides: Overrides
    """Dotted option -> value, as a user would write them."""
    memory: list[RankMemory]
    """Of the stage of the run that needs most."""
    time: StepTime
    """Of a step of the stage of the run that has most tokens."""
    run_seconds: float = 0.0
    """Of all steps of the run, those of a ramp with their own batch."""

    @property
    def fullest(self) -> RankMemory:
        """The pipeline stage whose ranks hold most."""
        return max(self.memory, key=lambda stage: stage.total)

    @property
    def peak_bytes(self) -> int:
        """Of the fullest rank."""
        return self.fullest.total

    def fits(self, gpu: Gpu) -> bool:
        """Whether the fullest rank has no more than the GPU holds."""
        return self.peak_bytes <= gpu.memory_bytes

    @property
    def layout(self) -> str:
        """One line: ``TP 4 x PP 8 (VPP 5) x CP 1 x DP 2, micro-batch 1, recompute none``."""
        parallel = self.config.parallel
        return (
            f"TP {parallel.tensor_model_parallel_size} x PP {_pipeline(self)} x CP {parallel.context_parallel_size} "
            f"x DP {data_parallel_size(parallel, self.time.world_size)}, "
            f"micro-batch {self.config.train.micro_batch_size}, recompute {recompute_name(self.config.memory)}"
        )


def search(config: RunConfig, model: ModelConfig, world_size: int, gpu: Gpu) -> list[Candidate]:
    """The legal candidates over TP x PP x VPP x CP x DP x micro-batch x recompute, those that fit first, fastest first;
    then those that do not, smallest first.

    Looked at is what ``layouts.layouts`` makes: TP within a node, micro-batches of at most 8, at least 1,024 tokens of
    a sequence on a CP rank, recompute of nothing, the MLPs, half of the layers or all. Left out is what cannot be the
    first: more recompute where none fits (slower), larger micro-batches where one does not fit with all recomputed
    (larger), and what is a quarter slower; but for the neighbours of the first. Raises
    ConfigError where no layout is legal, and with the trainer's own words where a rule is broken that has nothing to
    do with layouts.
    """
    facts = Facts(config, model, world_size, PLATFORM)
    if any(next(rule(facts), None) for rule in (sizes_are_positive, length_is_given, mixture_is_sound)):
        check(config, model, world_size, PLATFORM)  # there is nothing to arrange: raises
    stages = alike_together(shapes(config, model))
    legal = list(layouts(config, model, stages, world_size, gpu.gpus_per_node, PLATFORM))
    if not legal:
        raise _no_layout(config, model, world_size)
    found: dict[Place, Candidate] = {}

    def looked_at(layout: Layout) -> Candidate:
        own, overrides = layout
        return found.setdefault(place(own), evaluate(own, stages, world_size, gpu, overrides))

    fastest = float("inf")
    for cut in _by_speed(legal, stages, world_size, gpu):
        for seconds, (least, *rest) in cut:
            if seconds > HOPELESS * fastest:
                continue
            seen = [looked_at(least)]
            if rest and not seen[0].fits(gpu):
                seen.append(looked_at(rest[-1]))
                if seen[-1].fits(gpu):
                    seen += [looked_at(layout) for layout in rest[:-1]]
            fastest = min([fastest, *(each.run_seconds for each in seen if each.fits(gpu))])
            if not any(each.fits(gpu) for each in seen):
                break  # nor do larger micro-batches
    first = min(found.values(), key=lambda each: _rank(each, gpu))
    for layout in legal:
        if _axis_between(place(layout[0]), place(first.config)) is not None and place(layout[0]) not in found:
            looked_at(layout)
    check(first.config, model, world_size, PLATFORM)
    return sorted(found.values(), key=lambda each: _rank(each, gpu))


def _no_layout(config: RunConfig, model: ModelConfig, world_size: int) -> ConfigError:
    """What to say where no layout is legal: the rules' words on the plainest, all GPUs replicas."""
    plain = changed(config, {"train.micro_batch_size": 1})
    plain.parallel = ParallelConfig(data_parallel_size=world_size)
    why = "the rules of memory and precision leave none"
    try:
        check(plain, model, world_size, PLATFORM)
    except ConfigError as error:
        why = f"of the plainest, DP {world_size}, the rules say: {error}"
    return ConfigError(f"no layout of {world_size} GPUs is legal; {why}")


def _by_speed(
    legal: Sequence[Layout], stages: Sequence[Shape], world_size: int, gpu: Gpu
) -> list[list[tuple[float, list[Layout]]]]:
    """The layouts by their cut of the model, the cut with the fastest first; of a cut its micro-batches, from the
    smallest, each with the seconds of the run at least recompute, and all choices of recompute."""
    cuts = []
    for _, same_cut in groupby(legal, key=lambda layout: place(layout[0])[:4]):
        cut = []
        for _, same_batch in groupby(same_cut, key=lambda layout: layout[0].train.micro_batch_size):
            choices = list(same_batch)
            cut.append((_run_seconds(choices[0][0], stages, world_size, gpu), choices))
        cuts.append(cut)
    return sorted(cuts, key=lambda cut: min(seconds for seconds, _ in cut))


def evaluate(
    config: RunConfig, stages: Sequence[Shape], world_size: int, gpu: Gpu, overrides: Overrides | None = None
) -> Candidate:
    """Both predictions of a configuration that has passed the rules; ``stages`` are its shapes."""
    plans = [memory_by_stage(stage.view(config), stage.model, world_size, gpu) for stage in stages]
    longest = max(stages, key=lambda stage: stage.tokens)
    time = step_time(longest.view(config), longest.model, world_size, gpu)
    memory = max(plans, key=lambda ranks: max(rank.total for rank in ranks))
    return Candidate(config, overrides or {}, memory, time, _run_seconds(config, stages, world_size, gpu))


def stage_seconds(config: RunConfig, stage: Shape, world_size: int, gpu: Gpu) -> float:
    """Seconds of all steps of a stage, each size of a ramp with its own."""
    return sum(
        step_time(stage.view(config, size), stage.model, world_size, gpu).seconds * count
        for size, count in stage.batches
        if count
    )


def _run_seconds(config: RunConfig, stages: Sequence[Shape], world_size: int, gpu: Gpu) -> float:
    return sum(stage_seconds(config, stage, world_size, gpu) for stage in stages)


def alike_together(stages: Sequence[Shape]) -> list[Shape]:
    """Stages whose steps are the same as one, so that a search looks at each kind of step once."""
    found: list[Shape] = []
    for stage in stages:
        for n, other in enumerate(found):
            if replace(stage, name="", batches=((stage.global_batch_size, 0),), tokens=0) == replace(
                other, name="", batches=((other.global_batch_size, 0),), tokens=0
            ):
                ramp = dict(other.batches[:-1]) | dict(stage.batches[:-1])
                count = other.iterations + stage.iterations - sum(ramp.values())
                batches = (*ramp.items(), (stage.global_batch_size, count))
                found[n] = replace(other, batches=batches, tokens=other.tokens + stage.tokens)
                break
        else:
            found.append(stage)
    return found


# Why the first is the first


AXES = ("TP", "PP", "VPP", "CP", "micro-batch", "recompute")
"""What two layouts are compared by; DP follows from the number of GPUs."""

Place = tuple[int, int, int, int, int, int]


def place(config: RunConfig) -> Place:
    """Where a layout lies on each of :data:`AXES`; of recompute, how much it is."""
    parallel = config.parallel
    names = list(RECOMPUTE)
    half = config.memory.recompute_method == "block"
    name = "half of the layers" if half else recompute_name(config.memory)
    return (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size or 1,
        parallel.context_parallel_size,
        config.train.micro_batch_size,
        names.index(name) if name in names else len(names),
    )


def reasons(best: Candidate, others: list[Candidate], gpu: Gpu) -> list[str]:
    """Why the first is the first: against its nearest neighbours, one change each, in the seconds of a step or the
    bytes that decide. ``others`` come in order of rank."""
    lines = []
    for axis, neighbour in neighbours(best, others):
        change = f"{axis} {_at(neighbour, axis)} in place of {_at(best, axis)}"
        if axis in ("TP", "PP", "CP"):
            change += f" (DP {data_parallel_size(neighbour.config.parallel, neighbour.time.world_size)})"
        lines.append(f"{change}: {_verdict(best, neighbour, gpu)}")
    return lines


def neighbours(best: Candidate, others: Sequence[Candidate]) -> list[tuple[str, Candidate]]:
    """The candidates that differ from ``best`` in one thing: of each axis the next one below and the next above.

    Another PP may have another VPP, the first that there is.
    """
    here = place(best.config)
    found = []
    for n, axis in enumerate(AXES):
        along = [each for each in others if _axis_between(place(each.config), here) == axis]
        below = max(
            (place(each.config)[n] for each in along if place(each.config)[n] < here[n]), default=None
        )
        above = min(
            (place(each.config)[n] for each in along if place(each.config)[n] > here[n]), default=None
        )
        for value in (below, above):
            if value is not None:
                found.append((axis, next(each for each in along if place(each.config)[n] == value)))
    return found


def _axis_between(one: Place, other: Place) -> str | None:
    """The axis on which alone two layouts differ (VPP beside PP does not count), None where there is no such."""
    differ = [axis for axis, mine, its in zip(AXES, one, other, strict=True) if mine != its]
    if differ == ["PP", "VPP"]:
        return "PP"
    return differ[0] if len(differ) == 1 else None


def _at(candidate: Candidate, axis: str) -> str:
    if axis == "recompute":
        return recompute_name(candidate.config.memory)
    return _pipeline(candidate) if axis == "PP" else str(place(candidate.config)[AXES.index(axis)])


def _verdict(best: Candidate, other: Candidate, gpu: Gpu) -> str:
    slower = other.time.seconds - best.time.seconds
    pace = f"{abs(slower):.2f} s a step {'slower' if slower > 0 else 'faster'}"
    if not other.fits(gpu):
        over = other.peak_bytes - gpu.memory_bytes
        more = _largest(_growth(best.fullest.components, other.fullest.components), GIB, "GiB")
        would = "" if slower >= 0 else f"; it would be {pace}"
        return f"does not fit, {over / GIB:.1f} GiB too many on stage {other.fullest.stage}{more}{would}"
    if slower > 0:
        parts = _largest(_growth(best.time.parts, other.time.parts), 1.0, "s")
        return f"{pace}, {slower / best.time.seconds:.1%}{parts}"
    if slower < 0:  # of a run of several stages the step shown is that of the longest
        return f"{pace} in the longest stage, slower over the run"
    return f"as fast, with {(other.peak_bytes - best.peak_bytes) / GIB:.1f} GiB more"


def _growth(
    before: dict[str, int] | dict[str, float], after: dict[str, int] | dict[str, float]
) -> dict[str, float]:
    return {name: after.get(name, 0) - before.get(name, 0) for name in {**before, **after}}


def _largest(growth: dict[str, float], unit: float, name: str) -> str:
    """The two parts that grow most: ``: optimizer +3.1 GiB, activations +2.0 GiB``."""
    shown = [(part, value / unit) for part, value in growth.items() if value / unit >= 0.01]
    shown.sort(key=lambda each: -each[1])
    text = ", ".join(f"{part} +{value:.2f} {name}" for part, value in shown[:2])
    return f": {text}" if text else ""


def _rank(candidate: Candidate, gpu: Gpu) -> tuple[float, ...]:
    """Sorting key: fits, seconds, bytes, then the simpler."""
    tp, pp, vpp, cp, micro, recompute = place(candidate.config)
    simpler = (pp, vpp, tp, cp, recompute, micro)
    if candidate.fits(gpu):
        return (0, candidate.run_seconds, candidate.peak_bytes, *simpler)
    return (1, candidate.peak_bytes, candidate.run_seconds, *simpler)


def _pipeline(candidate: Candidate) -> str:
    _, stages, chunks, *_ = place(candidate.config)
    return f"{stages} (VPP {chunks})" if chunks > 1 else str(stages)
