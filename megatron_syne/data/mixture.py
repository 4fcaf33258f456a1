"""Which source each sample of a run comes from: stages of shares to a pure function of the sample index.

Order within a stage (Sainte-Lague's, the method of odd numbers): with ``n`` of the stage's ``N`` samples,
a source has its ``j``-th sample at the ideal place ``(2j + 1) N / (2n)``; samples stand in the order of
their ideal places. So every prefix of a stage holds each source in its share (it is off by at most
``(1 + share x number of sources) / 2`` samples), and any stretch can be computed by itself: nothing is stored
per sample. In whole numbers and correctly rounded divisions: the same on every machine.
No torch.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_syne.config.schema import DataConfig, RunConfig
from megatron_syne.errors import ConfigError

_WINDOW = 1 << 13
_MOST_SAMPLES = 2**31 - 1  # of one stage: keeps (2j + 1) N within 63 bits


class Location(NamedTuple):
    """Where one sample comes from: ``sample`` counts those of the source from the start of the run."""

    stage: int
    source: str
    sample: int


@dataclass(frozen=True)
class StagePlan:
    """One stage. Tuples run parallel to ``MixturePlan.sources``; a source that is not used has 0."""

    name: str
    tokens_asked: int
    """Budget of the configuration; ``samples`` x sequence length is at least this."""
    first_sample: int
    """Index in the run of the stage's first sample."""
    samples: int
    """A whole number of global batches."""
    iterations: int
    shares: tuple[float, ...]
    """Share asked of each source (groups multiplied out)."""
    counts: tuple[int, ...]
    """Samples of each source; their sum is ``samples``."""
    bases: tuple[int, ...]
    """Samples that each source gave in earlier stages."""


@dataclass(frozen=True)
class MixturePlan:
    """All stages of a run."""

    sources: tuple[str, ...]
    seq_length: int
    global_batch_size: int
    stages: tuple[StagePlan, ...]

    @property
    def num_samples(self) -> int:
        """Samples of the whole run."""
        return sum(stage.samples for stage in self.stages)

    @property
    def train_iters(self) -> int:
        """Iterations of the whole run."""
        return sum(stage.iterations for stage in self.stages)

    def stage_at(self, sample: int) -> int:
        """Number of the stage that a sample of the run falls in (IndexError outside the run)."""
        if sample >= 0:
            for number, stage in enumerate(self.stages):
                if sample < stage.first_sample + stage.samples:
                    return number
        raise IndexError(f"sample {sample} of a run of {self.num_samples}")

    def locate(self, sample: int) -> Location:
        """Stage, source and sample within the source of a sample of the run; a pure function."""
        number = self.stage_at(sample)
        stage = self.stages[number]
        source, index = _locate(stage.counts, sample - stage.first_sample)
        return Location(number, self.sources[source], stage.bases[source] + index)

    def samples_of(self, source: str) -> int:
        """Samples that a source gives over the whole run."""
        column = self.sources.index(source)
        return sum(stage.counts[column] for stage in self.stages)

    def fingerprint(self) -> str:
        """SHA-256 of all that decides the order of samples."""
        order = [[stage.name, stage.samples, list(stage.counts)] for stage in self.stages]
        text = json.dumps([list(self.sources), self.seq_length, order])
        return hashlib.sha256(text.encode("utf-8")).hexdigest()


def plan_mixture(config: RunConfig) -> MixturePlan:
    """The plan of a run; with ``data.mock`` one stage ``mock`` of ``train.train_iters`` iterations."""
    if not config.data.mock:
        return build_plan(config.data, config.train.global_batch_size)
    if config.train.train_iters is None:
        raise ConfigError("train.train_iters: not given; data.mock has no token budget, so give it")
    batch, seq_length, iterations = (
        config.train.global_batch_size,
        config.data.seq_length,
        config.train.train_iters,
    )
    samples = iterations * batch
    stage = StagePlan("mock", samples * seq_length, 0, samples, iterations, (1.0,), (samples,), (0,))
    return MixturePlan(("mock",), seq_length, batch, (stage,))


def build_plan(data: DataConfig, global_batch_size: int) -> MixturePlan:
    """The plan of ``data.stages``; raises ConfigError naming the stage and the field."""
    if data.seq_length < 1 or global_batch_size < 1:
        raise ConfigError(
            f"data.seq_length ({data.seq_length}) and train.global_batch_size ({global_batch_size}) must be "
            f"at least 1"
        )
    if not data.stages:
        raise ConfigError("data.stages: no stage; give at least one with name, tokens and mixture")
    sources = tuple(data.sources)
    seen: dict[str, int] = {}
    used = dict.fromkeys(sources, 0)
    first = 0
    stages = []
    for number, stage in enumerate(data.stages):
        where = f"data.stages[{number}] ({stage.name or 'no name'})"
        if not stage.name:
            raise ConfigError(f"{where}.name: must not be empty")
        if stage.name in seen:
            raise ConfigError(f"{where}.name: stage {seen[stage.name]} has this name already")
        seen[stage.name] = number
        if stage.tokens < 1:
            raise ConfigError(f"{where}.tokens: must be at least 1, found {stage.tokens}")
        shares = flatten_shares(stage.mixture, sources, f"{where}.mixture")
        iterations = -(-stage.tokens // (data.seq_length * global_batch_size))
        samples = iterations * global_batch_size
        if samples > _MOST_SAMPLES:
            raise ConfigError(
                f"{where}.tokens: {samples} samples; cut it into stages of at most {_MOST_SAMPLES}"
            )
        counts = apportion([shares.get(name, 0.0) for name in sources], samples)
        stages.append(
            StagePlan(
                name=stage.name,
                tokens_asked=stage.tokens,
                first_sample=first,
                samples=samples,
                iterations=iterations,
                shares=tuple(shares.get(name, 0.0) for name in sources),
                counts=tuple(counts),
                bases=tuple(used.values()),
            )
        )
        first += samples
        for name, count in zip(sources, counts, strict=True):
            used[name] += count
    return MixturePlan(sources, data.seq_length, global_batch_size, tuple(stages))


def flatten_shares(mixture: Mapping[str, Any], sources: Collection[str], where: str) -> dict[str, float]:
    """Share of each source with nested groups multiplied out; ``where`` names the field in errors.

    A source that stands in several groups gets the sum.
    """
    if not isinstance(mixture, Mapping) or not mixture:
        raise ConfigError(f"{where}: must name at least one source with its share")
    here: dict[str, float] = {}
    flat: dict[str, float] = {}
    for name, value in mixture.items():
        field = f"{where}.{name}"
        if isinstance(value, Mapping):
            if unknown := set(value) - {"share", "of"}:
                raise ConfigError(f"{field}: a group has the fields share and of; found {sorted(unknown)}")
            if missing := {"share", "of"} - set(value):
                raise ConfigError(f"{field}: a group needs {' and '.join(sorted(missing))}")
            here[name] = _share(value["share"], f"{field}.share")
            inner = flatten_shares(value["of"], sources, f"{field}.of")
        else:
            here[name] = _share(value, field)
            if name not in sources:
                near = difflib.get_close_matches(str(name), list(sources), n=1)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sources) or 'none'}"
                raise ConfigError(f"{field}: no source of this name in data.sources; {hint}")
            inner = {name: 1.0}
        for source, share in inner.items():
            flat[source] = flat.get(source, 0.0) + here[name] * share
    total = math.fsum(here.values())
    if abs(total - 1) > 1e-6:
        terms = " + ".join(f"{name} {share:g}" for name, share in here.items())
        raise ConfigError(f"{where}: shares must sum to 1, found {terms} = {total:.9g}")
    return flat


def _share(value: Any, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{field}: a share is a number, found {value!r}")
    if not 0 < value <= 1 + 1e-6:  # also refuses NaN
        raise ConfigError(f"{field}: a share must be above 0 and at most 1, found {value}")
    return float(value)


def apportion(shares: list[float], total: int) -> list[int]:
    """Whole numbers that sum to ``total``, each within 1 of its share of it (largest remainder)."""
    norm = math.fsum(shares)
    exact = [share / norm * total for share in shares]
    counts = [math.floor(value) for value in exact]
    # the earlier source wins a tie; one that was given no share is never handed a sample
    order = sorted(
        (index for index, share in enumerate(shares) if share > 0),
        key=lambda index: (counts[index] - exact[index], index),
    )
    for index in order[: total - sum(counts)]:
        counts[index] += 1
    return counts


def _locate(counts: tuple[int, ...], position: int) -> tuple[int, int]:
    """(source, index within the source in this stage) of the sample at a position of a stage."""
    window = position // _WINDOW  # off by a few samples at most: ideal places are one sample apart on average
    while position < _places_before(counts, window * _WINDOW)[0]:
        window -= 1
    while position >= _places_before(counts, (window + 1) * _WINDOW)[0]:
        window += 1
    source_of, index_of = _window(counts, window)
    offset = position - _places_before(counts, window * _WINDOW)[0]
    return int(source_of[offset]), int(index_of[offset])


@lru_cache(maxsize=1024)
def _places_before(counts: tuple[int, ...], limit: int) -> tuple[int, tuple[int, ...]]:
    """How many samples have their ideal place before ``limit``: of all sources, and of each."""
    total = sum(counts)
    # (2j + 1) total < 2 count limit, solved for the number of such j >= 0
    each = tuple(min(count, ((2 * count * limit - 1) // total + 1) // 2) for count in counts)
    return sum(each), each


@lru_cache(maxsize=8)
def _window(counts: tuple[int, ...], window: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Samples whose ideal place lies in one window of ``_WINDOW`` places, in order."""
    total = sum(counts)
    begins = _places_before(counts, window * _WINDOW)[1]
    ends = _places_before(counts, (window + 1) * _WINDOW)[1]
    sources, indices, wholes, fractions = [], [], [], []
    for source, (count, begin, end) in enumerate(zip(counts, begins, ends, strict=True)):
        if begin == end:
            continue
        index = np.arange(begin, end, dtype=np.int64)
        whole, rest = np.divmod((2 * index + 1) * total, 2 * count)
        sources.append(np.full(end - begin, source, dtype=np.int32))
        indices.append(index)
        wholes.append(whole)
        fractions.append(rest / (2 * count))
    source_of, index_of = np.concatenate(sources), np.concatenate(indices)
    order = np.lexsort((source_of, np.concatenate(fractions), np.concatenate(wholes)))
    return source_of[order], index_of[order]


def describe(plan: MixturePlan, source_token_counts: Mapping[str, int] | None = None) -> dict[str, Any]:
    """The plan in numbers, for ``--dry-run``. ``epochs`` counts from the start of the run to the stage's end."""
    known = source_token_counts or {}
    stages = []
    for stage in plan.stages:
        rows = {}
        for column, name in enumerate(plan.sources):
            if stage.shares[column] == 0:
                continue
            count = stage.counts[column]
            rows[name] = {
                "share": stage.shares[column],
                "samples": count,
                "tokens": count * plan.seq_length,
                "epochs": _epochs(stage.bases[column] + count, known.get(name), plan.seq_length),
            }
        stages.append(
            {
                "name": stage.name,
                "tokens_asked": stage.tokens_asked,
                "tokens": stage.samples * plan.seq_length,
                "samples": stage.samples,
                "iterations": stage.iterations,
                "sources": rows,
            }
        )
    return {
        "train_iters": plan.train_iters,
        "samples": plan.num_samples,
        "tokens": plan.num_samples * plan.seq_length,
        "seq_length": plan.seq_length,
        "global_batch_size": plan.global_batch_size,
        "stages": stages,
    }


def _epochs(samples: int, tokens: int | None, seq_length: int) -> float | None:
    if tokens is None:
        return None
    per_epoch = (tokens - 1) // seq_length
    return samples / per_epoch if per_epoch > 0 else math.inf


def plan_table(plan: MixturePlan, source_token_counts: Mapping[str, int] | None = None) -> str:
    """The plan as a table for people; a source read more than once is marked."""
    numbers = describe(plan, source_token_counts)
    width = max([len(name) for name in plan.sources] + [len(s.name) + 6 for s in plan.stages] + [12])
    lines = [f"{'':{width}} {'share':>8} {'samples':>14} {'tokens':>20} {'epochs so far':>14}"]
    for stage in numbers["stages"]:
        lines.append(
            f"{'stage ' + stage['name']:{width}} {'':>8} {stage['samples']:>14,} {stage['tokens']:>20,}"
            f" {'':>14}  {stage['iterations']:,} iterations"
        )
        for name, row in stage["sources"].items():
            epochs = row["epochs"]
            shown = "?" if epochs is None else f"{epochs:.2f}"
            note = "  repeats" if epochs is not None and epochs > 1 else ""
            note += "  never read: the share is less than one sample" if row["samples"] == 0 else ""
            lines.append(
                f"{'  ' + name:{width}} {row['share']:>8.4f} {row['samples']:>14,} {row['tokens']:>20,}"
                f" {shown:>14}{note}"
            )
    lines.append(
        f"{'run':{width}} {'':>8} {numbers['samples']:>14,} {numbers['tokens']:>20,}"
        f" {'':>14}  {numbers['train_iters']:,} iterations"
    )
    return "\n".join(line.rstrip() for line in lines)
