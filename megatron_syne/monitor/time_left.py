"""How long a run will take yet: from the steps, evaluations and checkpoints seen so far in this process."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

WINDOW = 50
"""Steps that the pace is taken from: long enough to be steady, short enough to follow a new stage."""


class TimeLeft:
    """Told of each event as it ends. The first step counts only as long as there is no other: it compiles and warms
    up. Steps are measured by their tokens, so that a stage or a ramp to come with another batch is foreseen."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.last = clock()
        self.cold: tuple[int, float] | None = None
        self.steps: deque[tuple[int, float]] = deque(maxlen=WINDOW)
        self.others: dict[str, tuple[int, float]] = {}

    def begin(self) -> None:
        """What comes next is counted from now on."""
        self.last = self.clock()

    def step(self, first_sample: int) -> None:
        """A step that began after so many samples has ended."""
        seen = (first_sample, self._since())
        if self.cold is None:
            self.cold = seen
        else:
            self.steps.append(seen)

    def other(self, kind: str) -> None:
        """An evaluation or a checkpoint has ended."""
        count, seconds = self.others.get(kind, (0, 0.0))
        self.others[kind] = (count + 1, seconds + self._since())

    def seconds(
        self, tokens_before: Callable[[int], int], sample: int, tokens: int, others: dict[str, int]
    ) -> float:
        """Estimate for what is left after ``sample`` samples of a run of ``tokens`` tokens, and for so many further
        events of each kind (those of a kind not seen yet are taken for nothing). ``tokens_before``: tokens of so many
        samples. To be asked after the first step.
        """
        assert self.cold is not None
        seen = self.steps or [self.cold]
        now = tokens_before(sample)
        result = sum(seconds for _, seconds in seen) / (now - tokens_before(seen[0][0])) * (tokens - now)
        for kind, count in others.items():
            times, seconds = self.others.get(kind, (1, 0.0))
            result += count * seconds / times
        return result

    def _since(self) -> float:
        before, self.last = self.last, self.clock()
        return self.last - before


def due_between(interval: int | None, step: int, last: int, at_end: bool) -> int:
    """How many of the steps after ``step`` up to ``last`` are multiples of ``interval``, the last one counted too
    where ``at_end``."""
    count = last // interval - step // interval if interval else 0
    ends_between = at_end and step < last and not (interval and last % interval == 0)
    return count + int(ends_between)
