"""The sequences on which two models are compared: several lengths, and positions far from the start."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_syne.config.schema import ModelConfig
from megatron_syne.errors import ConfigError

LENGTHS = (1, 17, 512, 2048)
"""Lengths compared where none are given: a single token (no attention to anything), one that no power of two
divides, and two long ones. Memory for attention grows with the square: 3 x heads x length^2 x 4 bytes."""

FAR_RUN = 32
"""Tokens in each run of neighbouring positions of the far probe."""

Run = Callable[[int, torch.Tensor], torch.Tensor]
"""A layer at work: ``run(index of the probe, hidden states)``, both ways positions x hidden size in fp32."""


@dataclass(frozen=True)
class Probe:
    """Tokens, and the positions at which they stand."""

    tokens: torch.Tensor
    """Token ids, one dimension, int64."""
    runs: tuple[tuple[int, int], ...]
    """Runs of neighbouring positions as (first position, number of tokens), in the order of the tokens."""

    def __str__(self) -> str:
        count = len(self.tokens)
        text = f"{count} token{'s' * (count > 1)}"
        if self.runs == ((0, count),):
            return text
        return f"{text} at positions " + ", ".join(f"{at}-{at + size - 1}" for at, size in self.runs)

    def positions(self) -> torch.Tensor:
        """Position of every token, int64."""
        return torch.cat([torch.arange(at, at + size) for at, size in self.runs])


def make_probes(
    model: ModelConfig, lengths: Sequence[int] = LENGTHS, tokens: Sequence[int] | None = None, seed: int = 0
) -> list[Probe]:
    """One probe per length, and one that reaches to the last position which the model claims to handle.

    The far probe is what is left of a long sequence without its middle: a run at the start, one just beyond the
    original context where the rotary embedding is scaled, one at the end. Queries of the last run attend to
    keys as far away as in a sequence of the full length, for the price of a short one.

    ``tokens``: text to use, from its start, repeated where it is too short; not given = random from ``seed``.
    Raises ConfigError for a length below 1 and for tokens that the vocabulary does not have.
    """
    problems = [f"lengths: {length} is below 1" for length in lengths if length < 1]
    vocabulary = model.vocab_size
    assert vocabulary is not None, "resolve_model first"
    strangers = sorted({token for token in tokens or () if not 0 <= token < vocabulary})
    if strangers:
        problems.append(f"tokens: {strangers[:5]} are not in the vocabulary of {vocabulary}")
    if tokens is not None and not tokens:
        problems.append("tokens: none are given")
    if problems:
        raise ConfigError("; ".join(problems))
    runs: list[tuple[tuple[int, int], ...]] = [((0, length),) for length in dict.fromkeys(lengths)]
    far = far_runs(model)
    if len(far) > 1:
        runs.append(far)
    if not runs:
        raise ConfigError("lengths: none are given")
    sizes = [sum(size for _, size in probe) for probe in runs]
    longest = max(sizes)
    if tokens is None:
        text = torch.randint(vocabulary, (longest,), generator=torch.Generator().manual_seed(seed))
    else:
        text = torch.tensor(list(itertools.islice(itertools.cycle(tokens), longest)), dtype=torch.int64)
    return [Probe(text[:size], probe) for size, probe in zip(sizes, runs, strict=True)]


def far_runs(model: ModelConfig) -> tuple[tuple[int, int], ...]:
    """Runs of the far probe (see :func:`make_probes`); a single one where the model's context is that short."""
    end = model.max_position_embeddings or 0
    starts = [0]
    if model.rope_scaling_factor is not None:
        original = model.rope_original_max_position_embeddings or 8192
        starts.append(original)
        end = max(end, 2 * original)
    runs: list[tuple[int, int]] = []
    for start in sorted([*starts, end - FAR_RUN]):
        if not runs or start >= sum(runs[-1]):
            runs.append((start, FAR_RUN))
    return tuple(runs)
