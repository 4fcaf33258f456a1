"""The pipeline's timeline: every forward and backward of a step with its begin and end. No torch.

The order of tasks on each stage is megatron-core's (``core/pipeline_parallel/schedules.py`` of 0.16):

- 1F1B (PipeDream-flush; Narayanan et al., arXiv 2104.04473, section 2.2.1): ``p - 1 - stage`` forwards, then one
  forward and one backward in turn, then the remaining backwards.
- Interleaved (the same, section 2.2.2): micro-batches go through a stage in groups of ``p``, each group through all
  chunks before the next group comes; ``2 (p - 1 - stage) + (v - 1) p`` forwards before the first backward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["forward", "backward"]
Step = tuple[Kind, int, int]
"""Kind, chunk, micro-batch."""


@dataclass(frozen=True)
class Task:
    """One pass of one micro-batch through one model chunk on one stage."""

    stage: int
    chunk: int
    """0 without interleaving."""
    micro_batch: int
    kind: Literal["forward", "backward"]
    begin: float
    """Seconds from the start of the step."""
    end: float


def warmup_forwards(stage: int, num_stages: int, num_microbatches: int, num_chunks: int = 1) -> int:
    """Forward passes of a stage before its first backward pass."""
    after = num_stages - 1 - stage
    count = after if num_chunks == 1 else 2 * after + (num_chunks - 1) * num_stages
    return min(count, num_microbatches * num_chunks)


def stage_order(stage: int, num_stages: int, num_microbatches: int, num_chunks: int = 1) -> list[Step]:
    """What a stage does, one after the other."""
    forwards = [
        (chunk, micro_batch)
        for first in range(0, num_microbatches, num_stages if num_chunks > 1 else num_microbatches)
        for chunk in range(num_chunks)
        for micro_batch in range(
            first, min(first + num_stages, num_microbatches) if num_chunks > 1 else num_microbatches
        )
    ]
    warmup = warmup_forwards(stage, num_stages, num_microbatches, num_chunks)
    order: list[Step] = [("forward", *step) for step in forwards[:warmup]]
    for index, (chunk, micro_batch) in enumerate(forwards):
        if index + warmup < len(forwards):
            order.append(("forward", *forwards[index + warmup]))
        order.append(("backward", num_chunks - 1 - chunk, micro_batch))
    return order


def timeline(
    num_microbatches: int,
    forward_seconds: Sequence[float],
    backward_seconds: Sequence[float],
    num_chunks: int = 1,
    p2p_seconds: float = 0.0,
) -> list[Task]:
    """Tasks of megatron-core's schedule (1F1B, or interleaved where ``num_chunks`` > 1), one forward and one backward
    time per stage (all its chunks together), in order of ``begin``.

    A task begins once its stage is free and ``p2p_seconds`` after the neighbour's task that it needs has ended: sends
    take none of a stage's time. Raises ValueError where the sizes do not belong together.
    """
    stages = len(forward_seconds)
    if stages != len(backward_seconds) or not stages or num_chunks < 1:
        raise ValueError(
            f"one forward and one backward time per stage are needed, and at least one chunk: found {stages} and "
            f"{len(backward_seconds)} times, {num_chunks} chunks"
        )
    if num_chunks > 1 and (stages == 1 or num_microbatches % stages):
        raise ValueError(
            f"{num_chunks} chunks need more than one stage and a multiple of {stages} micro-batches; "
            f"found {num_microbatches}"
        )
    orders = [stage_order(stage, stages, num_microbatches, num_chunks) for stage in range(stages)]
    place, free = [0] * stages, [0.0] * stages
    ends: dict[tuple[int, Step], float] = {}
    tasks: list[Task] = []
    waiting = set(range(stages))
    while waiting:
        before = len(tasks)
        for stage in sorted(waiting):
            order = orders[stage]
            while place[stage] < len(order):
                step = order[place[stage]]
                ready = _ready(ends, stage, step, stages, num_chunks, p2p_seconds)
                if ready is None:
                    break
                begin = max(free[stage], ready)
                seconds = (forward_seconds if step[0] == "forward" else backward_seconds)[stage] / num_chunks
                ends[stage, step] = free[stage] = begin + seconds
                tasks.append(Task(stage, step[1], step[2], step[0], begin, begin + seconds))
                place[stage] += 1
            if place[stage] == len(order):
                waiting.discard(stage)
        assert len(tasks) > before, "the schedule waits for itself"
    return sorted(tasks, key=lambda task: (task.begin, task.stage))


def _ready(
    ends: dict[tuple[int, Step], float], stage: int, step: Step, stages: int, chunks: int, p2p: float
) -> float | None:
    """When what a task needs is there; None = not known yet."""
    kind, chunk, micro_batch = step
    if kind == "forward":
        if stage == 0 and chunk == 0:
            return 0.0
        source = (stage - 1, chunk) if stage else (stages - 1, chunk - 1)
    else:
        own = ends.get((stage, ("forward", chunk, micro_batch)))
        if own is None or (stage == stages - 1 and chunk == chunks - 1):
            return own
        source = (stage + 1, chunk) if stage < stages - 1 else (0, chunk + 1)
    end = ends.get((source[0], (kind, source[1], micro_batch)))
    return None if end is None else end + (p2p if source[0] != stage else 0.0)


def first_and_last(
    num_microbatches: int,
    forward_seconds: Sequence[float],
    backward_seconds: Sequence[float],
    num_chunks: int = 1,
) -> list[Task]:
    """The timeline of a long step without its steady middle: as many micro-batches as show how it fills and drains
    (at least 128, and four for each stage), the later half with the numbers that it has in the whole step.

    The times are those of a step of the drawn micro-batches alone.
    """
    stages = len(forward_seconds)
    drawn = stages * math.ceil(
        max(4 * stages, 128) / stages
    )  # whole groups, as the interleaved schedule needs
    left_out = max(0, num_microbatches - drawn)
    tasks = timeline(num_microbatches - left_out, forward_seconds, backward_seconds, num_chunks)
    return [
        replace(task, micro_batch=task.micro_batch + left_out) if 2 * task.micro_batch >= drawn else task
        for task in tasks
    ]


def waiting_shares(
    num_microbatches: int,
    forward_seconds: Sequence[float],
    backward_seconds: Sequence[float],
    num_chunks: int = 1,
) -> list[float]:
    """Share of the step in which each stage waits, of the closed length (:func:`pipeline_seconds`)."""
    seconds = pipeline_seconds(num_microbatches, forward_seconds, backward_seconds, num_chunks)
    return [
        1 - num_microbatches * (forward + backward) / seconds
        for forward, backward in zip(forward_seconds, backward_seconds, strict=True)
    ]


def pipeline_seconds(
    num_microbatches: int,
    forward_seconds: Sequence[float],
    backward_seconds: Sequence[float],
    num_chunks: int = 1,
) -> float:
    """Length of the timeline without p2p, closed: the busiest stage's work, and once what the others take, over the
    chunks.

    Exact for equal stages, where the waiting is ``(p - 1) / (m v)`` of the work, and where the last stage alone takes
    longer. Of other unequal stages at most this, while none takes over twice another's time and all have one ratio of
    backward to forward.
    """
    stages = [forward + backward for forward, backward in zip(forward_seconds, backward_seconds, strict=True)]
    busiest = max(stages)
    return num_microbatches * busiest + (sum(stages) - busiest) / num_chunks
