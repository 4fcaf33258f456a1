"""The plan of a run: which source, and which place in it, each sample comes from. No torch.

A source is an endless stream of tokens (epoch after epoch). A run is a row of segments: stretches with
constant shares, sequence length and global batch. Each takes up every stream at the very token where the
one before it stopped, so whatever changes from one segment to the next, nothing is read twice and nothing
is left out. A sample is a pure function of (plan, index).
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from operator import add, sub
from typing import Any, NamedTuple

from megatron_syne.data.mixture.interleave import counts_before, place
from megatron_syne.data.mixture.shares import SUM_TOLERANCE, apportion
from megatron_syne.errors import ConfigError


class Location(NamedTuple):
    """Where one sample comes from: number of the segment, source, first token in the source's stream."""

    segment: int
    source: str
    position: int


class StageRequest(NamedTuple):
    """One stage as the configuration asks for it."""

    name: str
    tokens: int
    """Budget; rounded up to whole global batches."""
    seq_length: int
    shares: tuple[tuple[str, float], ...]
    """(source, share) with groups multiplied out, in the order of the configuration."""
    global_batch_size: int
    """Samples per step, once a ramp is over."""
    rampup_batch_size: tuple[int, ...] = ()
    """(start, increment, samples) of the ramp; () = none."""


class StagePlan(NamedTuple):
    """One stage as it is planned: the sum of its segments."""

    name: str
    tokens_asked: int
    first_sample: int
    """Index in the run of the stage's first sample."""
    samples: int
    iterations: int
    tokens: int


@dataclass(frozen=True)
class Segment:
    """A stretch of the run with constant shares, sequence length and global batch.

    Tuples run parallel to ``MixturePlan.sources``; a source that is not used has 0.
    """

    stage: str
    first_sample: int
    """Index in the run of the segment's first sample."""
    samples: int
    """A whole number of global batches."""
    iterations: int
    global_batch_size: int
    seq_length: int
    shares: tuple[float, ...]
    """Share asked of each source."""
    counts: tuple[int, ...]
    """Samples of each source; their sum is ``samples``."""
    bases: tuple[int, ...]
    """Place in each source's stream, in tokens, where the segment takes it up."""
    pattern: tuple[int, ...]
    """Samples of each source that decide the order: ``counts`` as first planned, before the segment was cut."""
    reason: str
    """Why it begins: ``configuration``, ``ramp`` (the global batch grows), or what changed."""
    micro_batch_size: int = 1
    """Samples per forward pass of one replica. Which samples stand where does not depend on it: a resume puts
    in the configuration's, and an account from before there was this field has none."""

    @property
    def end(self) -> int:
        """Index in the run of the first sample after the segment."""
        return self.first_sample + self.samples

    @property
    def tokens(self) -> int:
        """Tokens of the segment: samples x sequence length."""
        return self.samples * self.seq_length


@dataclass(frozen=True)
class MixturePlan:
    """All segments of a run, and what was asked for."""

    seed: int
    """``train.seed``: with it the orders of documents are given."""
    sources: tuple[str, ...]
    packing: str
    """As ``data.packing``. With ``best_fit`` each sequence length has its own pass over a source."""
    global_batch_size: int
    """``train.global_batch_size`` as asked: of the stages without a batch of their own."""
    asked: tuple[StageRequest, ...]
    segments: tuple[Segment, ...]
    inherited: int = 0
    """How many of the stages, from the first, were trained by the run that this one branched off."""

    @cached_property
    def request(self) -> str:
        """SHA-256 of what was asked: stages, sequence lengths, global batches, packing."""
        stages = [
            [
                *(stage.name, stage.tokens, stage.seq_length, sorted(stage.shares)),
                *self._own_batch(stage),  # nothing where there is none: digests of old accounts stay right
            ]
            for stage in self.asked
        ]
        text = json.dumps([stages, self.global_batch_size, self.packing])
        return hashlib.sha256(text.encode("utf-8")).hexdigest()

    def _own_batch(self, stage: StageRequest) -> list[Any]:
        if stage.global_batch_size == self.global_batch_size and not stage.rampup_batch_size:
            return []
        return [stage.global_batch_size, list(stage.rampup_batch_size)]

    @cached_property
    def stages(self) -> tuple[StagePlan, ...]:
        """The stages in order, each the sum of its segments."""
        result, first = [], 0
        for asked in self.asked:
            own = [segment for segment in self.segments if segment.stage == asked.name]
            samples = sum(segment.samples for segment in own)
            iterations, tokens = sum(each.iterations for each in own), sum(each.tokens for each in own)
            result.append(StagePlan(asked.name, asked.tokens, first, samples, iterations, tokens))
            first += samples
        return tuple(result)

    @cached_property
    def num_samples(self) -> int:
        """Samples of the whole run."""
        return self.segments[-1].end if self.segments else 0

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of the whole run."""
        return sum(segment.tokens for segment in self.segments)

    @cached_property
    def train_iters(self) -> int:
        """Iterations of the whole run."""
        return sum(segment.iterations for segment in self.segments)

    @cached_property
    def _firsts(self) -> list[int]:
        return [segment.first_sample for segment in self.segments]

    def segment_number(self, sample: int) -> int:
        """Number of the segment that a sample of the run falls in (IndexError outside the run)."""
        if not 0 <= sample < self.num_samples:
            raise IndexError(f"sample {sample} of a run of {self.num_samples}")
        return bisect_right(self._firsts, sample) - 1

    def segment_at(self, sample: int) -> Segment:
        """The segment that a sample of the run falls in (IndexError outside the run)."""
        return self.segments[self.segment_number(sample)]

    def stage_at(self, sample: int) -> str:
        """Name of the stage that a sample of the run falls in (IndexError outside the run)."""
        return self.segment_at(sample).stage

    def seq_length_at(self, sample: int) -> int:
        """Sequence length of a sample of the run (IndexError outside the run)."""
        return self.segment_at(sample).seq_length

    def locate(self, sample: int) -> Location:
        """Segment, source and place in its stream of a sample of the run; a pure function."""
        number = self.segment_number(sample)
        segment = self.segments[number]
        source, index = place(segment.pattern, sample - segment.first_sample)
        return Location(number, self.sources[source], segment.bases[source] + index * segment.seq_length)

    def source_at(self, sample: int) -> int:
        """Which of ``sources`` a sample of the run is of (IndexError outside the run)."""
        segment = self.segment_at(sample)
        return place(segment.pattern, sample - segment.first_sample)[0]

    def samples_of(self, source: str, first: int = 0) -> int:
        """Samples that a source gives from sample ``first`` of the run to its end."""
        column = self.sources.index(source)
        total = sum(segment.counts[column] for segment in self.segments)
        return total - sum(counts[column] for _, counts in self.counts_until(first))

    def counts_until(self, sample: int) -> list[tuple[Segment, tuple[int, ...]]]:
        """The segments that begin before a sample, each with how many samples each source gave before it."""
        found = []
        for segment in self.segments:
            if segment.first_sample >= sample:
                break
            inside = min(sample, segment.end) - segment.first_sample
            found.append((segment, counts_before(segment.pattern, inside)))
        return found

    def consumed(self, sample: int) -> dict[str, int]:
        """Tokens of each source in the first ``sample`` samples of the run."""
        if sample <= 0:
            return dict.fromkeys(self.sources, 0)
        number = self.segment_number(min(sample, self.num_samples) - 1)
        segment = self.segments[number]
        inside = counts_before(segment.pattern, min(sample, segment.end) - segment.first_sample)
        before = self._tokens_before[number]
        return {
            name: tokens + count * segment.seq_length
            for name, tokens, count in zip(self.sources, before, inside, strict=True)
        }

    @cached_property
    def _tokens_before(self) -> list[tuple[int, ...]]:
        """Tokens that each source gave before each segment."""
        result, now = [], (0,) * len(self.sources)
        for segment in self.segments:
            result.append(now)
            given = (count * segment.seq_length for count in segment.counts)
            now = tuple(map(add, now, given))
        return result

    def passes(self, sample: int | None = None) -> dict[tuple[str, int], int]:
        """Where each stream stands after ``sample`` samples (None = the run): (source, key) -> tokens.

        The key is 0, or with ``best_fit`` the sequence length, as each has its own pass.
        """
        tokens: dict[tuple[str, int], int] = {}
        for segment, counts in self.counts_until(self.num_samples if sample is None else sample):
            for name, count in zip(self.sources, counts, strict=True):
                key = (name, pass_key(self.packing, segment.seq_length))
                tokens[key] = tokens.get(key, 0) + count * segment.seq_length
        return tokens

    def iteration_at(self, sample: int) -> int:
        """Iterations that end at or before a sample (its own, for the first one of a global batch)."""
        return sum(
            (min(sample, segment.end) - segment.first_sample) // segment.global_batch_size
            for segment in self.segments
            if segment.first_sample < sample
        )

    def sample_at(self, iteration: int) -> int:
        """First sample of an iteration; past the end as if the last segment went on."""
        last = self.segments[-1]
        for segment in self.segments:
            if iteration < segment.iterations or segment is last:
                return segment.first_sample + iteration * segment.global_batch_size
            iteration -= segment.iterations
        raise AssertionError("a plan has segments")

    def sample_at_tokens(self, tokens: int) -> int:
        """The least number of samples that hold so many tokens; past the end as if the last segment went on."""
        last = self.segments[-1]
        for segment in self.segments:
            if tokens <= segment.tokens or segment is last:
                return segment.first_sample - (-tokens // segment.seq_length)
            tokens -= segment.tokens
        raise AssertionError("a plan has segments")

    def with_shares(self, sample: int, shares: Mapping[str, float], reason: str) -> MixturePlan:
        """The plan in which the rest of the stage at ``sample`` goes on with new shares of some sources.

        ``sample`` is the first of a global batch; the shares of all sources still sum to 1. Later stages take
        up the streams where the rest leaves them. Raises ConfigError, IndexError outside the run.
        """
        segment = self.segment_at(sample)
        if (sample - segment.first_sample) % segment.global_batch_size:
            raise ConfigError(
                f"shares cannot change at sample {sample}: it is not the first of a global batch"
            )
        old = dict(zip(self.sources, segment.shares, strict=True))
        for name, share in shares.items():
            if not share >= 0 or math.isinf(share) or old.get(name, 0.0) == 0 != share:
                raise ConfigError(
                    f"share {share} of source {name} in stage {segment.stage}: not a share of one that it reads"
                )
        new = tuple(float(shares.get(name, share)) for name, share in old.items())
        if abs(math.fsum(new) - 1) > SUM_TOLERANCE:
            raise ConfigError(f"shares of stage {segment.stage} must sum to 1, found {math.fsum(new):.9g}")
        past = closed(self.segments, sample)
        own = [each for each in self.segments if each.stage == segment.stage and each.end > sample]
        rows = [
            (each.global_batch_size, (each.end - max(each.first_sample, sample)) // each.global_batch_size)
            for each in own
        ]
        like = replace(segment, first_sample=sample, shares=new, reason=reason)
        later = [each for each in self.segments if each.first_sample >= own[-1].end]
        segments = [*past, *new_segments(like, rows), *later]
        return replace(self, segments=based(self.sources, self.packing, segments))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; :meth:`from_dict` gives an equal plan."""
        from megatron_syne.data.mixture.plan_json import plan_to_dict  # which knows this module

        return plan_to_dict(self)

    @classmethod
    def from_dict(cls, data: Any, where: str = "plan") -> MixturePlan:
        """The plan of :meth:`to_dict`; DataError names the field that is not as it must be."""
        from megatron_syne.data.mixture.plan_json import plan_from_dict

        return plan_from_dict(data, where)


def pass_key(packing: str, seq_length: int) -> int:
    """What tells passes over one source apart: nothing (0), with ``best_fit`` the sequence length."""
    return seq_length if packing == "best_fit" else 0


def new_segments(like: Segment, rows: Iterable[tuple[int, int]]) -> list[Segment]:
    """Segments as ``like`` (its begin, stage, length, shares, reason), one for each (global batch, iterations).

    Each source gets its share of all of them together; rows of the same batch become one, and every one but the
    first begins for the ``ramp``. :func:`based` fills in where they take up the streams.
    """
    merged: list[tuple[int, int]] = []
    for batch, iterations in rows:
        if merged and merged[-1][0] == batch:
            iterations += merged.pop()[1]
        merged.append((batch, iterations))
    whole = tuple(apportion(like.shares, sum(batch * iterations for batch, iterations in merged)))
    result: list[Segment] = []
    done, given = 0, (0,) * len(whole)
    for batch, iterations in merged:
        samples = batch * iterations
        so_far = counts_before(whole, done + samples)
        counts = tuple(map(sub, so_far, given))
        result.append(
            replace(
                like,
                first_sample=like.first_sample + done,
                samples=samples,
                iterations=iterations,
                global_batch_size=batch,
                counts=counts,
                bases=(0,) * len(counts),
                pattern=counts,
                reason="ramp" if result else like.reason,
            )
        )
        done, given = done + samples, so_far
    return result


def closed(segments: tuple[Segment, ...], sample: int) -> list[Segment]:
    """The segments before a sample of the run, the last one ended there: same samples at the same indices."""
    past = []
    for segment in segments:
        if segment.first_sample >= sample:
            break
        if segment.end > sample:
            samples = sample - segment.first_sample
            segment = replace(
                segment,
                samples=samples,
                iterations=samples // segment.global_batch_size,
                counts=counts_before(segment.pattern, samples),
            )
        past.append(segment)
    return past


def based(sources: tuple[str, ...], packing: str, segments: list[Segment]) -> tuple[Segment, ...]:
    """The segments, each with every source taken up where those before it left it."""
    places: dict[tuple[str, int], int] = {}
    result = []
    for segment in segments:
        key = pass_key(packing, segment.seq_length)
        result.append(replace(segment, bases=tuple(places.get((name, key), 0) for name in sources)))
        for name, count in zip(sources, segment.counts, strict=True):
            places[name, key] = places.get((name, key), 0) + count * segment.seq_length
    return tuple(result)
