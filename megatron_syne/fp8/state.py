"""The form of FP8 state, the same for emulated layers and Transformer Engine's."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megatron_syne.errors import DataError


def check_state(state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> None:
    """DataError unless ``state`` has all of ``own``'s keys, of their format and as many dimensions."""
    for key, tensor in own.items():
        found = state.get(key)
        if found is None:
            raise DataError(f"FP8 state: {key} is missing; the checkpoint is of other layers")
        if found.dtype != tensor.dtype or found.dim() != tensor.dim() or found.numel() == 0:
            raise DataError(
                f"FP8 state: {key} is {found.dtype} {list(found.shape)}, expected {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
