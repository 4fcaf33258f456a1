"""The growth of a stage's global batch, by megatron-core's rule (``--rampup-batch-size``). No torch.

``[start, increment, samples]``: the batch grows from ``start`` by ``increment`` to its full size, evenly over the
first ``samples`` samples (megatron-core 0.16.1, ``RampupBatchsizeNumMicroBatchesCalculator``). As there, a step
takes the batch of the sample that it begins with; the same divisions in the same floating point.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_syne.errors import ConfigError


def batch_at(samples: int, global_batch_size: int, ramp: Sequence[int]) -> int:
    """Global batch of the step that begins after so many samples of the stage."""
    if not ramp or samples > ramp[2]:
        return global_batch_size
    start, increment, length = ramp
    each = length / ((global_batch_size - start) // increment)
    return start + int(samples / each) * increment


def ramp_sizes(global_batch_size: int, ramp: Sequence[int]) -> list[int]:
    """Every size that the batch takes, the full one last; a small ramp may jump over some."""
    return [*range(ramp[0], global_batch_size, ramp[1]), global_batch_size] if ramp else [global_batch_size]


def batch_rows(
    global_batch_size: int, ramp: Sequence[int], done: int = 0
) -> Iterator[tuple[int, int | None]]:
    """(global batch, iterations with it) from sample ``done`` of the stage on; None = for good, the last row."""
    at = done
    while (batch := batch_at(at, global_batch_size, ramp)) != global_batch_size:
        count = 0
        while batch_at(at, global_batch_size, ramp) == batch:
            at, count = at + batch, count + 1
        yield batch, count
    yield global_batch_size, None


def check_ramp(ramp: Sequence[int], global_batch_size: int, where: str) -> None:
    """ConfigError where a ramp is none: three numbers above 0, a whole number of increments up to the batch."""
    if not ramp:
        return
    if len(ramp) != 3 or any(value < 1 for value in ramp):
        raise ConfigError(
            f"{where}: expected [start, increment, samples], each at least 1, found {list(ramp)}"
        )
    start, increment, _ = ramp
    room = global_batch_size - start
    if room < 1:
        raise ConfigError(
            f"{where}: start {start} must be below the global batch {global_batch_size}; without a ramp, give none"
        )
    if room % increment:
        legal = [each for each in range(1, room + 1) if room % each == 0]
        near = [each for each in legal if each < increment][-1:] + [
            each for each in legal if each > increment
        ][:1]
        raise ConfigError(
            f"{where}: increment {increment} does not lead from {start} to the global batch {global_batch_size}; "
            f"nearest legal: {' or '.join(map(str, near))}"
        )
