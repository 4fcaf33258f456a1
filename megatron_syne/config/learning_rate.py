"""Learning rate as a function of the samples consumed: over the run, or begun anew in each stage. No torch."""

from __future__ import annotations

from megatron_syne.config.arithmetic import RunLength, learning_rate, run_schedule
from megatron_syne.config.schema import RunConfig


class LearningRate:
    """The schedule of a run over its plan of samples."""

    def __init__(self, config: RunConfig, run: RunLength) -> None:
        self._config, self._samples = config, run_schedule(config, run)

    def at(self, consumed_samples: int) -> float:
        """Learning rate of the step that begins after so many samples."""
        return learning_rate(self._config, self._samples, consumed_samples)
