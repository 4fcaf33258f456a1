"""What the rules look at, and how they name a value with the place where it was given."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

from megatron_syne.config.loader import config_origin
from megatron_syne.config.schema import ModelConfig, RunConfig
from megatron_syne.errors import ConfigError
from megatron_syne.parallel.topology import model_parallel_size

PlatformName = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Facts:
    """The run as the rules see it; ``model`` is the resolved one, ``world_size`` None where unknown."""

    config: RunConfig
    model: ModelConfig
    world_size: int | None
    platform: PlatformName

    @property
    def dp(self) -> int:
        """DP by the world size, or as given (1 where neither is); a world size that does not fit is
        reported by its own rule."""
        parallel = self.config.parallel
        if self.world_size is None or parallel.data_parallel_size is not None:
            return parallel.data_parallel_size or 1
        return max(1, self.world_size // model_parallel_size(parallel))

    @property
    def vpp(self) -> int | None:
        """Model chunks per stage, None without interleaving."""
        return self.config.parallel.virtual_pipeline_model_parallel_size

    def get(self, key: str) -> Any:
        """Value of a dotted key; the model's from the resolved one."""
        head, _, rest = key.partition(".")
        start: Any = self.model if head == "model" else getattr(self.config, head)
        return reduce(getattr, rest.split(".") if rest else [], start)

    def at(self, key: str) -> str:
        """``key = value (run.yaml:12)``, for the start of a message."""
        return self.named(key, self.get(key))

    def named(self, key: str, value: Any) -> str:
        """As :meth:`at` for a value that a dotted key does not reach: in a free mapping or a list."""
        text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        return f"{key} = {text} ({self.origin(key)})"

    def origin(self, key: str) -> str:
        """Where a value was given: ``run.yaml:12``, ``command line``, ``default`` or the model's own."""
        origin = config_origin(self.config, key)
        if origin == "default" and key.startswith("model."):
            origin = f"from {self.config.model.hf_path or self.config.model.preset or 'default'}"
        return origin

    def seq_lengths(self) -> list[tuple[str, int]]:
        """(key, tokens) of every sequence length that the run has."""
        data = self.config.data
        own = [(n, stage.seq_length) for n, stage in enumerate(data.stages) if not data.mock]
        return [
            ("data.seq_length", data.seq_length),
            *((f"data.stages.{n}.seq_length", length) for n, length in own if length is not None),
        ]

    def number(self, key: str) -> int:
        """A size of the model that must be known by now."""
        value = self.get(key)
        if not isinstance(value, int):
            raise ConfigError(f"{key}: not known; give model.hf_path, model.preset or {key}")
        return value


def nearest(value: int, legal: Iterable[int]) -> str:
    """The legal values around ``value``, for people: ``8 or 16``."""
    choices = sorted(set(legal))
    below = [each for each in choices if each < value][-1:]
    above = [each for each in choices if each > value][:1]
    return " or ".join(str(each) for each in below + above) or "none"


def nearest_multiples(value: int, unit: int) -> str:
    """The multiples of ``unit`` around ``value``: ``8 or 16``."""
    return nearest(value, {max(unit, value // unit * unit), (value // unit + 1) * unit})
