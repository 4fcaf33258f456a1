"""Find a rank's FP8 layers in its model and hand them out as one :class:`Fp8Layers`."""

from __future__ import annotations

from typing import Any

from megatron_syne.config.schema import RunConfig
from megatron_syne.fp8.layers import Fp8Layers
from megatron_syne.platform.base import Platform


def attach_fp8(chunks: list[Any], config: RunConfig, platform: Platform) -> Fp8Layers | None:
    """This rank's FP8 layers, emulated or Transformer Engine's; None without FP8. Before DDP is built."""
    return None
