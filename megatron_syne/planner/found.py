"""What is told of a search: the first and why it is, the nearest misses, and what would make a run fit. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_syne.config.schema import ModelConfig, RunConfig
from megatron_syne.errors import ConfigError
from megatron_syne.planner.hardware import GIB, Gpu
from megatron_syne.planner.layouts import Overrides, changed, layouts
from megatron_syne.planner.search import PLATFORM, Candidate, alike_together, evaluate, reasons
from megatron_syne.planner.shapes import shapes
from megatron_syne.preflight.rules import check

MORE_GPUS = (2, 4, 8, 16, 32)
"""By how much the world is made larger to see from when on a run fits."""

SAVERS: tuple[Overrides, ...] = (
    {"precision.accumulate_allreduce_grads_in_fp32": False},
    {
        "optimizer.use_precision_aware_optimizer": True,
        "optimizer.exp_avg_dtype": "bf16",
        "optimizer.exp_avg_sq_dtype": "bf16",
    },
    {"optimizer.use_precision_aware_optimizer": True, "optimizer.optimizer_cpu_offload": True},
)
"""What else makes a run smaller, from the cheapest to the dearest."""


@dataclass(frozen=True)
class Found:
    """What is told of a search."""

    gpu: Gpu
    candidates: list[Candidate]
    base: RunConfig | None
    """The configuration that a candidate is written into; None = there is none yet."""
    own: Candidate | None = None
    """The layout that the configuration itself has."""
    own_refused: str = ""
    """Why that cannot run."""
    remedies: list[str] = field(default_factory=list)
    """Where nothing fits: what would."""

    @property
    def fit(self) -> int:
        """Number of candidates that fit."""
        return sum(each.fits(self.gpu) for each in self.candidates)

    @property
    def to_write(self) -> Overrides:
        """Of the first's overrides those that ``base`` has otherwise; with no ``base``, all that makes up the run: the
        options that are not the schema's defaults."""
        if self.base is None:
            return dict(_differing(asdict(self.candidates[0].config), asdict(RunConfig())))
        return {
            key: value
            for key, value in self.candidates[0].overrides.items()
            if _value(self.base, key) != value
        }

    @property
    def reasons(self) -> list[str]:
        """Why the first is the first; empty where nothing fits."""
        return reasons(self.candidates[0], self.candidates[1:], self.gpu) if self.fit else []

    @property
    def misses(self) -> list[Candidate]:
        """Of those that do not fit the smallest, of those among them that would be faster than the first."""
        rest = self.candidates[self.fit :]
        if self.fit:
            rest = [each for each in rest if each.run_seconds < self.candidates[0].run_seconds]
        return rest[:3]


def remedies(config: RunConfig, model: ModelConfig, world_size: int, gpu: Gpu) -> Iterator[str]:
    """What would make a run fit that no layout of this world makes fit; the least of each kind."""
    for factor in MORE_GPUS:
        first = _smallest(config, model, world_size * factor, gpu)
        if first is not None and first.fits(gpu):
            yield f"{world_size * factor} GPUs: {first.peak_bytes / GIB:.1f} GiB with {first.layout}"
            break
    for saver in SAVERS:
        first = _smallest(changed(config, saver), model, world_size, gpu)
        if first is None or not first.fits(gpu):
            continue
        try:
            check(first.config, model, world_size, PLATFORM)
        except ConfigError:
            continue
        words = " ".join(f"{key}={_shown(value)}" for key, value in saver.items())
        yield f"{words}: {first.peak_bytes / GIB:.1f} GiB with {first.layout}"
    yield "a shorter data.seq_length, or --gpu with more memory"


def _smallest(config: RunConfig, model: ModelConfig, world_size: int, gpu: Gpu) -> Candidate | None:
    """The legal candidate that needs least memory."""
    stages = alike_together(shapes(config, model))
    found = [
        evaluate(candidate, stages, world_size, gpu, overrides)
        for candidate, overrides in layouts(
            config, model, stages, world_size, gpu.gpus_per_node, PLATFORM, ("all layers",), 1
        )
    ]
    return min(found, key=lambda each: each.peak_bytes, default=None)


def _differing(
    given: Mapping[str, Any], default: Mapping[str, Any], above: str = ""
) -> Iterator[tuple[str, Any]]:
    """(Dotted option, value) where two configurations differ; lists and free mappings whole."""
    for name, value in given.items():
        other = default[name]
        if isinstance(value, dict) and value.keys() == other.keys():
            yield from _differing(value, other, f"{above}{name}.")
        elif value != other:
            yield f"{above}{name}", value


def _value(config: RunConfig, key: str) -> object:
    section, option = key.split(".")
    return getattr(getattr(config, section), option)


def _shown(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
