"""Core attention of the CPU platform: fused, and under context parallelism, which the engine's local one refuses."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention

from megatron_syne.parallel.context import held_positions


class LocalAttention(MegatronModule):  # type: ignore[misc]
    """Causal attention by torch's fused kernel, which never writes the scores out: memory O(seq), and a fraction of
    the time of the engine's ``DotProductAttention``.

    Under context parallelism each rank asks for its own tokens and sees the keys of all: keys and values are gathered
    over CP, in the backward pass their gradients are summed and scattered. The masks of a sliding window, of documents
    and of CP are O(seq^2 / CP) bytes; Transformer Engine's ring and all-to-all are not rehearsed. There is no dropout:
    no configuration here has any.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        *,
        pg_collection: Any,
    ) -> None:
        super().__init__(config=config)
        assert not (config.attention_dropout if attention_dropout is None else attention_dropout)
        self._scale = softmax_scale  # None: one over the root of the heads' width
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
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """[seq / CP, batch, heads, width], keys and values with KV heads -> [seq / CP, batch, heads x width].

        ``attention_mask``: None = causal, or of the whole sequence, [batch or 1, 1, seq, seq], True = not seen.
        """
        assert attention_bias is None and packed_seq_params is None
        if self._group.size() > 1:
            both = gather_from_sequence_parallel_region(torch.stack([key, value], dim=1), group=self._group)
            key, value = both[:, 0], both[:, 1]
        seen = self._seen(key.shape[0], attention_mask)
        # in fp32: torch's bf16 kernel takes 1.8 times as long, and rounds the probabilities
        dtype = query.dtype
        query, key, value = (each.permute(1, 2, 0, 3).float() for each in (query, key, value))
        context = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=seen,
            is_causal=seen is None,
            scale=self._scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return context.permute(2, 0, 1, 3).flatten(2).to(dtype)

    def _seen(self, length: int, unseen: torch.Tensor | None) -> torch.Tensor | None:
        """Rows: the tokens of this rank; columns: those of all ranks, in the order in which they were gathered.

        None = plainly causal.
        """
        size = self._group.size()
        if size == 1 and self._before is None:
            return None if unseen is None else ~unseen
        rows = held_positions(self._group.rank(), size, length)
        columns = torch.cat([held_positions(rank, size, length) for rank in range(size)])
        distance = rows[:, None] - columns[None, :]
        seen = distance >= 0
        if self._before is not None:
            seen &= distance <= self._before
        return seen if unseen is None else ~unseen[:, :, rows[:, None], columns] & seen
