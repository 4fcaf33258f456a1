"""Which part of a sequence a context-parallel rank holds, and the cut of a batch to that part.

The sequence is cut into 2 x CP equal parts; rank r holds parts r and 2 x CP - 1 - r, in this order. So every
rank has as much causal attention to compute as the others (Ring Attention's "zigzag"; Transformer Engine and
megatron-core's rotary embedding count on just this order).
"""

from __future__ import annotations

import torch

SEQUENCE_KEYS = ("tokens", "labels", "position_ids", "loss_mask")
"""Of a batch, what is [micro batch, seq]; ``document_ids`` stay whole: a token's keys lie on every rank."""


def own_part(tensor: torch.Tensor, rank: int, size: int, dim: int = 1) -> torch.Tensor:
    """What CP rank ``rank`` of ``size`` holds of a whole sequence along ``dim``: its length / size positions.

    The length must be a multiple of 2 x size (``preflight`` sees to it).
    """
    if size == 1:
        return tensor
    parts = tensor.chunk(2 * size, dim=dim)
    return torch.cat([parts[rank], parts[2 * size - 1 - rank]], dim=dim)


def held_positions(rank: int, size: int, length: int) -> torch.Tensor:
    """Positions in the whole sequence of what a CP rank holds: [length / size], int64."""
    return own_part(torch.arange(length), rank, size, dim=0)


def own_batch(batch: dict[str, torch.Tensor], rank: int, size: int) -> dict[str, torch.Tensor]:
    """A batch cut to a CP rank's part: ``SEQUENCE_KEYS`` [micro batch, seq] -> [micro batch, seq / size]."""
    return {
        key: own_part(value, rank, size) if key in SEQUENCE_KEYS else value for key, value in batch.items()
    }
