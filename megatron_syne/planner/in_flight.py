"""The largest sum of what micro-batches keep in a pipeline stage at once: megatron-core's schedules played through.

1F1B: stage ``p`` of ``PP`` runs ``PP - p - 1`` micro-batches ahead (Narayanan et al., arXiv 2104.04473, section 2.2).
Interleaved: ``2 (PP - p - 1) + (VPP - 1) PP`` passes of chunks ahead, chunks in groups of PP micro-batches
(``pipeline_parallel/schedules.py: get_pp_rank_microbatches``). No torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from megatron_syne.planner.recompute import Unit


@dataclass(frozen=True)
class Chunk:
    """What one micro-batch takes in one model chunk."""

    units: Sequence[Unit]
    logits: int
    """Bytes of logits and loss; 0 but for the last chunk of the model."""
    output: int
    """Bytes of what is sent on; 0 for the last chunk of the model."""
    always: int = 0
    """Bytes that all micro-batches share."""


def schedule(stage: int, stages: int, chunks: int, num_microbatches: int) -> Iterator[tuple[bool, int]]:
    """(whether forward, chunk) of every pass of a step, in the order of one stage."""
    total = num_microbatches * chunks
    if stages == 1:
        ahead = 0
    elif chunks == 1:
        ahead = stages - stage - 1
    else:
        ahead = 2 * (stages - stage - 1) + (chunks - 1) * stages
    ahead = min(ahead, total)
    order = [
        chunk
        for start in range(0, num_microbatches, stages)
        for chunk in range(chunks)
        for _ in range(start, min(start + stages, num_microbatches))
    ]
    back = [chunks - 1 - chunk for chunk in order]
    for number in range(ahead):
        yield True, order[number]
    for number in range(total - ahead):
        yield True, order[ahead + number]
        yield False, back[number]
    for number in range(total - ahead, total):
        yield False, back[number]


def peak_bytes(
    chunks: Sequence[Chunk],
    stage: int,
    stages: int,
    num_microbatches: int,
    frees_outputs: bool,
    received: int,
) -> int:
    """Most bytes that are kept at once in a step, logits and loss among them.

    ``frees_outputs``: outputs are let go once they are sent (``deallocate_pipeline_outputs``). ``received``: bytes of
    what a stage is sent: the schedule's variables hold some of it after its micro-batch is done. As measured, not on
    the first stage: 1F1B one in a forward pass; interleaved one for each chunk that waits with nothing under way, and
    one more in the backward pass of another.
    """
    # fewer than 1 + 1 / VPP groups of PP micro-batches are run ahead, then the pattern repeats with each group
    moments = _moments(stage, stages, len(chunks), min(num_microbatches, 3 * stages))
    held = [
        sum(unit.kept for unit in chunk.units) + (0 if frees_outputs else chunk.output) for chunk in chunks
    ]
    ahead = [chunk.logits + (chunk.output if frees_outputs else 0) for chunk in chunks]
    within = [_within(chunk.units) for chunk in chunks]
    return sum(chunk.always for chunk in chunks) + max(
        sum(count * size for count, size in zip(moment.under_way, held, strict=True))
        + (ahead if moment.forward else within)[moment.chunk]
        + moment.old * received
        for moment in moments
    )


class Moment(NamedTuple):
    """The end of a forward pass, or the begin of a backward pass."""

    forward: bool
    chunk: int
    under_way: tuple[int, ...]
    """Micro-batches in each chunk, this one too."""
    old: int
    """Tensors from the stage before that only variables hold; see :func:`peak_bytes`."""


@cache
def _moments(stage: int, stages: int, chunks: int, num_microbatches: int) -> frozenset[Moment]:
    """All that differ, of one stage in one step."""
    found = set()
    under_way, begun = [0] * chunks, [False] * chunks
    for forward, number in schedule(stage, stages, chunks, num_microbatches):
        waiting = sum(b and not count for b, count in zip(begun, under_way, strict=True)) if stage else 0
        if chunks == 1:
            old = int(forward and stage > 0)
        else:
            old = waiting + 1 if waiting and not forward else waiting
        under_way[number] += int(forward)
        found.add(Moment(forward, number, tuple(under_way), old))
        under_way[number] -= int(not forward)
        begun[number] = True
    return frozenset(found)


def _within(units: Sequence[Unit]) -> int:
    """Most bytes above what is kept before a backward pass, as it comes by each part from the last to the first."""
    most = freed = 0
    for unit in reversed(units):
        most = max(most, unit.again - freed)
        freed += unit.kept
    return most
