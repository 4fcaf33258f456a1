"""Learning rate as a function of the samples consumed: over the run, or begun anew in each stage. No torch.

The shapes are those of megatron-core 0.16.1's ``OptimizerParamScheduler``, written out so that a dry run needs no
torch (a test holds the two equal), and Llama-3-SynE's clipped line. As there, a schedule advances by samples: with
a batch that grows, an iteration moves it by as many samples as that iteration reads, and a length given in
iterations is that of the samples which those iterations hold. A length given in tokens is kept in tokens, so it is
exact whatever batch and sequence length it goes through: the warm-up rises in proportion to the tokens consumed.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from megatron_syne.config.schema import RunConfig, StageScheduleConfig


class Rates(NamedTuple):
    """What shapes one schedule: the run's options, those that a stage gives in their place."""

    lr: float
    min_lr: float
    lr_decay_style: str
    lr_warmup_init: float
    lr_warmup_iters: int | None
    lr_warmup_tokens: int | None
    lr_wsd_decay_iters: int | None
    lr_wsd_decay_tokens: int | None
    lr_wsd_decay_style: str


class Stretch(NamedTuple):
    """A part of the run: in samples, or in tokens where its length was given so."""

    start: int
    length: int
    in_tokens: bool = False


@dataclass(frozen=True)
class Schedule:
    """One schedule with its place in the run."""

    name: str
    """Of the stage; empty for one over all stages."""
    rates: Rates
    first_sample: int
    samples: int
    warmup: Stretch
    warmup_end: int
    """Sample of the run from which the warm-up is over."""
    decay: Stretch
    """Of WSD the final decay; else all from the warm-up to ``decay_end``. Length 0 = none."""
    decay_end: int
    """Sample of the run at which the decay ends."""


class SegmentLength(Protocol):
    """What is asked of a stretch with one sequence length."""

    @property
    def first_sample(self) -> int:
        """Index in the run of its first sample."""

    @property
    def tokens(self) -> int:
        """Its tokens."""

    @property
    def seq_length(self) -> int:
        """Tokens per sample."""


class StageLength(Protocol):
    """What is asked of a stage of the plan."""

    @property
    def name(self) -> str:
        """As in ``data.stages``."""

    @property
    def first_sample(self) -> int:
        """Index in the run of its first sample."""

    @property
    def samples(self) -> int:
        """Its samples."""


class RunLength(Protocol):
    """What the schedule asks of a plan of samples: batch and sequence length may change on the way."""

    @property
    def num_samples(self) -> int:
        """Samples of the run."""

    @property
    def train_iters(self) -> int:
        """Iterations of the run."""

    @property
    def segments(self) -> Sequence[SegmentLength]:
        """Stretches with one sequence length, in order."""

    @property
    def stages(self) -> Sequence[StageLength]:
        """The stages, in order."""

    def sample_at(self, iteration: int) -> int:
        """First sample of an iteration; past the end as if the last segment went on."""

    def iteration_at(self, sample: int) -> int:
        """Iterations that end at or before a sample."""

    def sample_at_tokens(self, tokens: int) -> int:
        """The least number of samples that hold so many tokens."""


class LearningRate:
    """The schedule of a run, or those of its stages, over its plan of samples."""

    def __init__(self, config: RunConfig, run: RunLength) -> None:
        self._tokens = _Tokens(run)
        self.schedules = schedules(config, run)
        self._firsts = [each.first_sample for each in self.schedules]

    def at(self, consumed_samples: int) -> float:
        """Learning rate of the step that begins after so many samples."""
        schedule = self.schedules[max(0, bisect_right(self._firsts, consumed_samples) - 1)]
        return _rate(schedule, consumed_samples, self._tokens)


def schedules(config: RunConfig, run: RunLength) -> tuple[Schedule, ...]:
    """The schedules of a run in order, with the samples at which warm-up and decay begin and end."""
    tokens = _Tokens(run)
    if config.schedule.span == "run":
        end = run.sample_at(config.schedule.lr_decay_iters or run.train_iters)
        return (_schedule("", rates_of(config), 0, run.num_samples, end, run, tokens),)
    return tuple(
        _schedule(
            stage.name,
            rates_of(config, stage.name),
            stage.first_sample,
            stage.samples,
            stage.first_sample + stage.samples,
            run,
            tokens,
        )
        for stage in run.stages
        if stage.samples
    )


def key_points(schedule: Schedule, run: RunLength) -> list[tuple[str, int]]:
    """Where something begins or ends in a schedule: (name, sample), in order."""
    first, end = schedule.first_sample, schedule.first_sample + schedule.samples
    points = {"first step": first}
    if schedule.warmup_end > first:
        points["end of warm-up"] = schedule.warmup_end
    if schedule.rates.lr_decay_style == "WSD" and schedule.decay.length:
        start, in_tokens = schedule.decay.start, schedule.decay.in_tokens
        points["start of decay"] = run.sample_at_tokens(start) if in_tokens else start
    if first < schedule.decay_end < end:
        points["end of decay"] = schedule.decay_end
    points["last step"] = run.sample_at(run.iteration_at(end) - 1)
    return sorted(points.items(), key=lambda point: point[1])


def rates_of(config: RunConfig, stage: str = "") -> Rates:
    """The run's options (``stage`` empty), or a stage's: its own where it gives them.

    A length that a stage gives in tokens stands in the place of the run's in iterations, and the reverse.
    """
    schedule, optimizer = config.schedule, config.optimizer
    own: Any = next((each.schedule for each in config.data.stages if each.name == stage), None)
    own = own or StageScheduleConfig()
    given = {name: value for name in Rates._fields if (value := getattr(own, name)) is not None}
    for name in ("lr_warmup", "lr_wsd_decay"):
        if {f"{name}_iters", f"{name}_tokens"} & given.keys():
            given = {f"{name}_iters": None, f"{name}_tokens": None, **given}
    run = {name: getattr(optimizer if name in ("lr", "min_lr") else schedule, name) for name in Rates._fields}
    return Rates(**{**run, **given})


def _schedule(
    name: str, rates: Rates, first: int, samples: int, end: int, run: RunLength, tokens: _Tokens
) -> Schedule:
    before = run.iteration_at(first)
    if rates.lr_warmup_tokens is not None:
        begin = tokens.before(first)
        warmup = Stretch(begin, rates.lr_warmup_tokens, True)
        warmup_end = run.sample_at_tokens(begin + rates.lr_warmup_tokens)
    else:
        warmup_end = run.sample_at(before + (rates.lr_warmup_iters or 0))
        warmup = Stretch(first, warmup_end - first)
    if rates.lr_decay_style != "WSD":
        decay = Stretch(warmup_end, max(0, end - warmup_end))
    elif rates.lr_wsd_decay_tokens is not None:
        decay = Stretch(tokens.before(end) - rates.lr_wsd_decay_tokens, rates.lr_wsd_decay_tokens, True)
    else:
        start = run.sample_at(run.iteration_at(end) - (rates.lr_wsd_decay_iters or 0))
        decay = Stretch(start, end - start)
    return Schedule(name, rates, first, samples, warmup, warmup_end, decay, end)


def _rate(schedule: Schedule, sample: int, tokens: _Tokens) -> float:
    rates = schedule.rates
    top, bottom = rates.lr, rates.min_lr
    risen = tokens.share(schedule.warmup, sample)
    if risen < 1:
        return rates.lr_warmup_init + (top - rates.lr_warmup_init) * risen
    if rates.lr_decay_style == "constant":
        return top
    if sample > schedule.decay_end:
        return bottom
    if rates.lr_decay_style == "inverse-square-root":
        past, warmup = sample - schedule.first_sample, schedule.warmup_end - schedule.first_sample
        return max(bottom, top * math.sqrt(max(warmup, 1)) / math.sqrt(max(past, 1)))
    gone = tokens.share(schedule.decay, sample)
    if gone <= 0 or not schedule.decay.length:
        return top
    style = rates.lr_wsd_decay_style if rates.lr_decay_style == "WSD" else rates.lr_decay_style
    if style == "clipped_linear":  # Llama-3-SynE, train_utils.get_wsd_scheduler
        return max(bottom, top * (1.0 - gone))
    return bottom + (top - bottom) * _remaining(style, gone)


def _remaining(style: str, gone: float) -> float:
    """Share of the way from min_lr to lr that is left after a share of the decay is gone."""
    if style == "linear":
        return 1.0 - gone
    if style == "cosine":
        return 0.5 * (math.cos(math.pi * gone) + 1.0)
    if style == "exponential":
        return 2.0 * math.pow(0.5, gone) - 1.0
    if style == "minus_sqrt":
        return 1.0 - math.sqrt(gone)
    raise AssertionError(f"decay style {style}: the schema has another list")


class _Tokens:
    """Tokens before a sample of a run: each segment has its own sequence length."""

    def __init__(self, run: RunLength) -> None:
        self._firsts, self._before, self._lengths, total = [0], [0], [1], 0
        for segment in run.segments:
            self._firsts.append(segment.first_sample)
            self._before.append(total)
            self._lengths.append(segment.seq_length)
            total += segment.tokens

    def before(self, sample: int) -> int:
        """Tokens before a sample; past the end as if the last segment went on."""
        number = bisect_right(self._firsts, sample) - 1
        return self._before[number] + (sample - self._firsts[number]) * self._lengths[number]

    def share(self, stretch: Stretch, sample: int) -> float:
        """How much of a stretch lies before a sample: 1 at its end and where it has no length, below 0 before it."""
        place = self.before(sample) if stretch.in_tokens else sample
        return (place - stretch.start) / stretch.length if stretch.length > 0 else 1.0
