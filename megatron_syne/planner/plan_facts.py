"""What is known of a plan, as plain values (bytes, seconds, FLOP/s, tokens), for ``plan.py --json``. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_syne.config.arithmetic import batch_arithmetic
from megatron_syne.config.schema import ModelConfig, RunConfig
from megatron_syne.models.config import PRESETS
from megatron_syne.parallel.topology import chunk_layers, data_parallel_size
from megatron_syne.planner.calibration import accuracy, error
from megatron_syne.planner.found import Found
from megatron_syne.planner.hardware import Gpu
from megatron_syne.planner.layouts import RECOMPUTE, changed, recompute_choices, recompute_name
from megatron_syne.planner.memory import RankMemory, memory_by_stage
from megatron_syne.planner.published import ROWS, Row
from megatron_syne.planner.search import Candidate, alike_together, stage_seconds
from megatron_syne.planner.shapes import Shape
from megatron_syne.planner.speed import StepTime, step_time
from megatron_syne.preflight.facts import PlatformName
from megatron_syne.preflight.size import model_parameters

Facts = dict[str, Any]
HOUR = 3600.0
LONG_SEQUENCE = 32768
LARGE_MODEL = 80e9
"""From where on a plan lies outside of the rows that the accuracy is of: 8,192 tokens, up to 70B."""


@dataclass(frozen=True)
class Plan:
    """A run that has passed the rules, and the machine that it is planned for."""

    config: RunConfig
    model: ModelConfig
    stages: list[Shape]
    world_size: int
    platform: PlatformName
    gpu: Gpu | None
    """None = the CPU platform: bytes alone are predicted."""
    found: Found | None = None
    """The search that the configuration's layout is the first of."""


def facts_of(plan: Plan, rows: int = 10) -> Facts:
    """Everything that is said of a plan, as JSON has it: bytes, seconds, FLOP/s, tokens; ``rows``: of the search."""
    config, gpu = plan.config, plan.gpu
    parallel = config.parallel
    facts: Facts = {
        "model": {
            "name": config.model.preset or config.model.hf_path or plan.model.model_type,
            "parameters": model_parameters(plan.model),
        },
        "gpu": gpu and {"name": gpu.name, "memory_bytes": gpu.memory_bytes},
        "platform": plan.platform,
        "gpus": plan.world_size,
        "precision": config.precision.fp8 or config.precision.params_dtype,
        "layout": {
            "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
            "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
            "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
            "context_parallel_size": parallel.context_parallel_size,
            "data_parallel_size": data_parallel_size(parallel, plan.world_size),
            "sequence_parallel": parallel.sequence_parallel,
            "recompute": recompute_name(config.memory),
        },
    }
    facts |= _memory(plan)
    if gpu is not None:
        facts["stages"], facts["run"] = run_facts(plan, gpu)
        facts["accuracy"] = accuracy_facts(plan.model, plan.stages, gpu)
    if plan.found is not None:
        facts["search"] = search_facts(plan.found, rows, facts["accuracy"]["median_error"])
    return facts


def accuracy_facts(model: ModelConfig, stages: Sequence[Shape], gpu: Gpu) -> Facts:
    """How far the predicted tokens/s were off where they were published, and in what this plan lies outside of that."""
    median, worst, count = accuracy()
    outside = list(_outside(model, stages, gpu))
    return {"median_error": median, "worst_error": worst, "published_rows": count, "outside": outside}


def _outside(model: ModelConfig, stages: Sequence[Shape], gpu: Gpu) -> Iterator[str]:
    """What of a plan the counted rows do not have, each with the errors of the rows that do."""
    if any(stage.seq_length >= LONG_SEQUENCE for stage in stages):
        seen = _seen([row for row in ROWS if row.seq_length >= LONG_SEQUENCE])
        yield f"sequences of {LONG_SEQUENCE:,} tokens and more ({seen})"
    if gpu.name != "h100":
        yield f"{gpu.name} ({_seen([row for row in ROWS if row.gpu.name == gpu.name])})"
    if model_parameters(model) > LARGE_MODEL:
        large = [row for row in ROWS if model_parameters(PRESETS[row.preset]) > LARGE_MODEL]
        yield f"more than {LARGE_MODEL / 1e9:.0f} billion parameters ({_seen(large)})"


def _seen(rows: Sequence[Row]) -> str:
    errors = [abs(error(row)) for row in rows]
    if not errors:
        return "never measured against"
    return f"off by {'up to ' if len(rows) > 1 else ''}{max(errors):.1%} in {len(rows)} row{'s' * (len(rows) > 1)}"


def _memory(plan: Plan) -> Facts:
    """Per pipeline stage, of the stage of the run that needs most, and in all under each choice of recompute."""
    chunks = chunk_layers(plan.config.parallel, plan.model.num_layers or 0)
    fullest, memory = _largest(plan, plan.config)
    alike = len(alike_together(plan.stages)) == 1
    facts: Facts = {
        "memory": [
            {
                "stage": each.stage,
                "layers": sum(map(len, chunks[each.stage])),
                "components": dict(each.components),
                "total": each.total,
            }
            for each in memory
        ],
        "memory_of": "" if alike else fullest.name,
        "peak_bytes": max(each.total for each in memory),
        "recompute": [],
    }
    if plan.gpu is not None:
        facts["fits"] = facts["peak_bytes"] <= plan.gpu.memory_bytes
    own = recompute_name(plan.config.memory)
    choices: list[tuple[str, RunConfig]] = [
        (name, changed(plan.config, choice))
        for name in RECOMPUTE
        for choice in recompute_choices(plan.config, plan.model, plan.world_size, plan.platform, (name,))
    ]
    names = [recompute_name(config.memory) for _, config in choices]
    if own not in names:
        choices.append((own, plan.config))
    for name, config in choices:
        stage, memory = _largest(plan, config)
        top = max(memory, key=lambda each: each.total)
        row = {"choice": name, "chosen": recompute_name(config.memory) == own, "stage": top.stage}
        row |= {"activations": top.components["activations"], "total": top.total}
        if plan.gpu is not None:
            time = step_time(stage.view(config), stage.model, plan.world_size, plan.gpu)
            row["fits"] = top.total <= plan.gpu.memory_bytes
            row["tokens_per_second_per_gpu"] = time.tokens_per_second_per_gpu
        facts["recompute"].append(row)
    return facts


def _largest(plan: Plan, config: RunConfig) -> tuple[Shape, list[RankMemory]]:
    """The stage of the run whose steps need most, and its memory."""
    each = [
        (stage, memory_by_stage(stage.view(config), stage.model, plan.world_size, plan.gpu))
        for stage in plan.stages
    ]
    return max(each, key=lambda pair: max(rank.total for rank in pair[1]))


def _speed(plan: Plan, stage: Shape, gpu: Gpu) -> Facts:
    """A step of one stage of the run at its full batch, and the hours of all its steps."""
    view = stage.view(plan.config)
    time = step_time(view, stage.model, plan.world_size, gpu)
    seconds = stage_seconds(plan.config, stage, plan.world_size, gpu)
    batch = batch_arithmetic(view, data_parallel_size(plan.config.parallel, plan.world_size))
    return {
        "name": stage.name,
        "tokens": stage.tokens,
        "iterations": stage.iterations,
        "seq_length": stage.seq_length,
        "global_batch_size": stage.global_batch_size,
        "micro_batch_size": view.train.micro_batch_size,
        "num_microbatches": batch.num_microbatches,
        "tokens_per_step": time.tokens_per_step,
        **speed_facts(time),
        "hours": seconds / HOUR,
        "gpu_hours": seconds / HOUR * plan.world_size,
    }


def speed_facts(time: StepTime) -> Facts:
    """What is said of the speed of a step."""
    return {
        "step_seconds": time.seconds,
        "parts": dict(time.parts),
        "tokens_per_second_per_gpu": time.tokens_per_second_per_gpu,
        "model_flops_per_second_per_gpu": time.model_flops_per_second_per_gpu,
        "model_flops_per_token": time.model_flops_per_token,
        "peak_flops": time.peak_flops,
        "mfu": time.mfu,
        "bubble": time.bubble,
        "exposed_communication_seconds": exposed(time),
        "checkpoint_seconds": time.checkpoint_seconds,
    }


def exposed(time: StepTime) -> float:
    """Seconds of a step in which a GPU waits for communication."""
    return sum(seconds for part, seconds in time.parts.items() if part.endswith("communication"))


def run_facts(plan: Plan, gpu: Gpu) -> tuple[list[Facts], Facts]:
    """Of each stage of the run, and of all of it with its checkpoints."""
    stages = [_speed(plan, stage, gpu) for stage in plan.stages]
    return stages, _run(plan, stages)


def _run(plan: Plan, stages: Sequence[Facts]) -> Facts:
    """All stages and the checkpoints; validation, starts and failures come on top."""
    iterations = sum(stage["iterations"] for stage in stages)
    interval = plan.config.checkpoint.save_interval
    saved = 1 if interval is None else iterations // interval + (iterations % interval > 0)
    writing = saved * stages[-1]["checkpoint_seconds"] / HOUR
    hours = sum(stage["hours"] for stage in stages) + writing
    return {
        "tokens": sum(stage["tokens"] for stage in stages),
        "iterations": iterations,
        "checkpoints": saved,
        "checkpoint_hours": writing,
        "hours": hours,
        "gpu_hours": hours * plan.world_size,
    }


def candidate_facts(candidate: Candidate, gpu: Gpu) -> Facts:
    """One layout of a search."""
    return {
        "overrides": candidate.overrides,
        "layout": candidate.layout,
        "fits": candidate.fits(gpu),
        "peak_bytes": candidate.peak_bytes,
        "stage": candidate.fullest.stage,
        "components": dict(candidate.fullest.components),
        "run_seconds": candidate.run_seconds,
        **speed_facts(candidate.time),
    }


def search_facts(found: Found, rows: int, error: float) -> Facts:
    """What a search has found: the first ones, why the first is first, the nearest misses; how many of those that fit
    are slower than the first by no more than ``error``, a share."""
    fitting = found.candidates[: found.fit]
    return {
        "close": sum(each.run_seconds <= fitting[0].run_seconds * (1 + error) for each in fitting[1:]),
        "compared": len(found.candidates),
        "fit": found.fit,
        "candidates": [candidate_facts(each, found.gpu) for each in fitting[:rows]],
        "to_write": found.to_write if found.fit else {},
        "to_write_is_all": found.base is None,
        "reasons": found.reasons,
        "misses": [
            candidate_facts(each, found.gpu) | {"over_bytes": each.peak_bytes - found.gpu.memory_bytes}
            for each in found.misses
        ],
        "remedies": found.remedies,
        "own": found.own and candidate_facts(found.own, found.gpu),
        "own_refused": found.own_refused,
    }
