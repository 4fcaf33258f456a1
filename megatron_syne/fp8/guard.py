"""Watch FP8 against bf16 while training, log it, and fall back to bf16 where it goes wrong."""

from __future__ import annotations

from megatron_syne.config.schema import RunConfig
from megatron_syne.training.callback import Callback


class Fp8Guard(Callback):
    """Every ``precision.fp8_guard.interval`` iterations."""

    def __init__(self, config: RunConfig) -> None:
        self.options = config.precision.fp8_guard
