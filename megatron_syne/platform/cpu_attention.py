"""Attention under context parallelism for the CPU platform: the engine's local attention refuses it."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.utils import is_layer_window_attention

from megatron_syne.parallel.context import held_positions


class ContextParallelAttention(DotProductAttention):  # type: ignore[misc]
    """megatron-core's attention in which each CP rank asks for its own tokens and sees the keys of all.

    Keys and values are gathered over CP, in the backward pass their gradients are summed and scattered. Memory
    is O(seq^2 / CP); Transformer Engine's ring and all-to-all are not rehearsed.
    """

    def __init__(
        self, config: Any, layer_number: int, *args: Any, pg_collection: Any, **options: Any
    ) -> None:
        alone = copy(config)  # the parent refuses CP, and its softmax lets a window replace every other mask
        alone.context_parallel_size, alone.window_size = 1, None
        super().__init__(alone, layer_number, *args, pg_collection=pg_collection, **options)
        self._group = pg_collection.cp
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self._before: int | None = config.window_size[0] if windowed else None
        """Tokens before itself that a token sees, None = all."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        **options: Any,
    ) -> torch.Tensor:
        """[seq / CP, batch, heads, width] each -> [seq / CP, batch, hidden / TP].

        ``attention_mask``: None = causal, or of the whole sequence, [batch or 1, 1, seq, seq], True = not seen.
        """
        both = gather_from_sequence_parallel_region(torch.stack([key, value], dim=1), group=self._group)
        mask = self._mask(both.shape[0], attention_mask)
        output: torch.Tensor = super().forward(query, both[:, 0], both[:, 1], mask, *args, **options)
        return output

    def _mask(self, length: int, whole: torch.Tensor | None) -> torch.Tensor:
        """Rows: the tokens of this rank; columns: those of all ranks, in the order in which they were gathered."""
        size = self._group.size()
        rows = held_positions(self._group.rank(), size, length)
        columns = torch.cat([held_positions(rank, size, length) for rank in range(size)])
        distance = rows[:, None] - columns[None, :]
        unseen = distance < 0
        if self._before is not None:
            unseen |= distance > self._before
        if whole is None:
            return unseen[None, None]
        return whole[:, :, rows[:, None], columns] | unseen
