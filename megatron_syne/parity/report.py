"""How far two models are apart, stage by stage, and whether that is too far."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from megatron_syne.errors import DataError


@dataclass(frozen=True)
class Difference:
    """How far values of one sequence at one stage are apart."""

    largest: float
    """Largest absolute difference."""
    mean: float
    """Mean absolute difference."""
    relative: float
    """Largest, over the positions, of a position's largest difference over the RMS of the reference's values
    there: the scale that the next norm divides by, so a few huge channels neither hide nor fake a fault."""
    same_choice: int = 0
    """Positions at which both have their largest value in the same place."""
    positions: int = 0
    """Positions compared."""


class Comparison:
    """Collects the difference of two matrices (positions x channels) that come in slices of the channels."""

    def __init__(self, positions: int) -> None:
        self._largest = torch.zeros(positions)
        self._sum = torch.zeros(positions, dtype=torch.float64)
        self._squares = torch.zeros(positions, dtype=torch.float64)
        self._top = torch.full((2, positions), -torch.inf)
        self._choice = torch.zeros((2, positions), dtype=torch.int64)
        self._channels = 0

    def add(self, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        """Add the next slice of both, fp32, positions x some channels."""
        apart = (ours - theirs).abs()
        self._largest = torch.maximum(self._largest, apart.amax(-1))  # a NaN stays one
        self._sum += apart.sum(-1, dtype=torch.float64)
        self._squares += theirs.square().sum(-1, dtype=torch.float64)
        for side, values in enumerate((ours, theirs)):
            top, at = values.max(-1)
            higher = top > self._top[side]
            self._choice[side][higher] = at[higher] + self._channels
            self._top[side][higher] = top[higher]
        self._channels += ours.shape[-1]

    def result(self) -> Difference:
        """The difference over all slices."""
        rms = (self._squares / self._channels).sqrt().clamp_min(1e-30)  # a zero row equals a zero row
        return Difference(
            largest=self._largest.max().item(),
            mean=(self._sum.mean() / self._channels).item(),
            relative=(self._largest / rms).max().item(),
            same_choice=int((self._choice[0] == self._choice[1]).sum()),
            positions=len(rms),
        )


@dataclass
class Report:
    """What a comparison found. Every stage holds one :class:`Difference` per probe, in the probes' order."""

    title: str
    probes: list[str]
    tolerance: float
    """Largest ``Difference.relative`` at which a stage still counts as the same."""
    notes: list[str] = field(default_factory=list)
    """What these probes do not show."""
    stages: dict[str, list[Difference]] = field(default_factory=dict)
    """By name, in the order of the forward pass: ``embedding``, ``layer 0``, ..., ``final norm``, ``logits``."""

    def first_out(self) -> tuple[str, str, Difference] | None:
        """(stage, probe, difference) of the first stage that is out of tolerance, at its worst probe."""
        for stage, found in self.stages.items():
            # not <=, so that a NaN is out
            out = [
                (p, d) for p, d in zip(self.probes, found, strict=True) if not d.relative <= self.tolerance
            ]
            if out:
                return (stage, *max(out, key=lambda pair: pair[1].relative))
        return None

    def check(self) -> None:
        """Raises DataError that names the first stage which is out of tolerance."""
        out = self.first_out()
        if out is None:
            return
        stage, probe, difference = out
        before = list(self.stages)[: list(self.stages).index(stage)]
        agree = f"{before[-1]} still agrees" if before else "nothing agrees"
        raise DataError(
            f"{self.title}: {stage} differs: {probe}: relative difference {difference.relative:.1e} "
            f"(largest {difference.largest:.1e}), tolerance {self.tolerance:.0e}; {agree}. {_HINT}"
        )

    def lines(self) -> Iterator[str]:
        """The report as text, line by line."""
        yield self.title
        for probe in self.probes:
            yield f"  {probe}"
        width = max(12, *(len(probe) + 4 for probe in self.probes))
        yield f"{'':<{width}}{'largest':>11}{'mean':>11}{'relative':>11}"
        for stage, found in self.stages.items():
            yield _line(f"{stage:<{width}}", found, self.tolerance)
        logits = self.stages.get("logits", [])
        for probe, difference in zip(self.probes, logits, strict=False):
            yield _line(f"{'  ' + probe:<{width}}", [difference], self.tolerance)
        same, total = sum(d.same_choice for d in logits), sum(d.positions for d in logits)
        yield f"same first choice of the next token at {same:,} of {total:,} positions"
        yield "relative: largest difference at a position over the RMS of the reference's values there"
        for note in self.notes:
            yield f"note: {note}"
        out = self.first_out()
        verdict = "the models agree" if out is None else f"{out[0]} is the first that is out"
        yield f"tolerance {self.tolerance:.0e} relative: {verdict}"


_HINT = (
    "Compare the model's configuration with the reference's (rope, epsilon, tying, window) and run verify "
    "without --logits, which compares the stored numbers"
)


def _line(name: str, found: list[Difference], tolerance: float) -> str:
    largest = _worst(d.largest for d in found)
    relative = _worst(d.relative for d in found)
    positions = sum(d.positions for d in found)
    mean = sum(d.mean * d.positions for d in found) / max(1, positions)
    mark = "" if relative <= tolerance else "  <- out"
    return f"{name}{largest:>11.2e}{mean:>11.2e}{relative:>11.2e}{mark}"


def _worst(values: Iterator[float]) -> float:
    """The largest, or NaN where there is one."""
    return torch.tensor(list(values)).max().item()
