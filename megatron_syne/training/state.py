"""What a run has done so far: all that is needed, with weights and optimizer, to go on exactly."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class TrainState:
    """Counters of the run; the data order and the learning rate are functions of ``consumed_samples``.

    Nothing random is drawn after initialisation (the Llama family has no dropout), so there is no random
    state to keep.
    """

    step: int = 0
    """Optimizer steps done (megatron-core: iteration)."""
    consumed_samples: int = 0
    """Training samples consumed over all replicas."""
    consumed_tokens: int = 0
    """Training tokens predicted so far."""
    evaluated_step: int = 0
    """Step of the last evaluation: one that was due when the run was stopped is done first on resume."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        """Inverse of :meth:`to_dict`; a state kept before ``evaluated_step`` was had no evaluation open."""
        values = {"evaluated_step": values["step"], **values}
        return cls(**{name: int(values[name]) for name in cls.__dataclass_fields__})
