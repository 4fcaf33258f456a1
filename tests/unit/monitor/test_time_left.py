"""Time left: pace of warm steps by tokens, evaluations and checkpoints by what they have taken."""

from __future__ import annotations

import pytest

from megatron_syne.monitor.time_left import WINDOW, TimeLeft, due_between


class Clock:
    """Stands still until it is told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def run(*seconds: float) -> tuple[TimeLeft, Clock]:
    """Steps of 4 samples that took so long."""
    clock = Clock()
    found = TimeLeft(clock)
    for n, each in enumerate(seconds):
        clock.now += 1000.0  # not part of a step
        found.begin()
        clock.now += each
        found.step(4 * n)
    return found, clock


def tokens(sample: int) -> int:
    return 10 * sample


def test_the_first_step_counts_only_while_it_is_alone() -> None:
    alone, _ = run(60.0)
    assert alone.seconds(tokens, 4, 4000, {}) == pytest.approx(60.0 * 99)
    warm, _ = run(60.0, 2.0, 4.0)
    assert warm.seconds(tokens, 12, 4000, {}) == pytest.approx(3.0 * 97)


def test_a_stage_with_longer_samples_is_foreseen() -> None:
    """From sample 12 on samples are twice as long: the rest takes twice as long."""
    found, _ = run(9.0, 2.0, 2.0)
    plain = found.seconds(tokens, 12, 1200, {})
    longer = found.seconds(
        lambda sample: tokens(min(sample, 12)) + 20 * max(sample - 12, 0), 12, 120 + 2160, {}
    )
    assert longer == pytest.approx(2 * plain)


def test_the_pace_is_of_the_last_steps() -> None:
    found, _ = run(1.0, *[100.0] * 10, *[2.0] * WINDOW)
    assert found.seconds(tokens, 4 * (11 + WINDOW), 40 * (12 + WINDOW), {}) == pytest.approx(2.0)


def test_evaluations_and_checkpoints_are_counted_by_what_they_took() -> None:
    found, clock = run(1.0, 2.0)
    for kind, seconds in (("evaluation", 5.0), ("checkpoint", 7.0), ("checkpoint", 9.0)):
        clock.now += seconds
        found.other(kind)
    assert found.seconds(tokens, 8, 80, {"evaluation": 3, "checkpoint": 2, "unseen": 4}) == pytest.approx(
        3 * 5 + 2 * 8
    )


@pytest.mark.parametrize(
    ("interval", "step", "last", "at_end", "count"),
    [
        (10, 0, 20, True, 2),
        (10, 10, 20, True, 1),
        (10, 9, 25, True, 3),
        (10, 9, 25, False, 2),
        (10, 20, 20, True, 0),
        (10, 25, 25, True, 0),
        (None, 3, 20, True, 1),
        (None, 20, 20, True, 0),
        (None, 3, 20, False, 0),
    ],
)
def test_due_between(interval: int | None, step: int, last: int, at_end: bool, count: int) -> None:
    assert due_between(interval, step, last, at_end) == count
