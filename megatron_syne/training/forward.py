"""The forward step that megatron-core's schedules call, and the reduction of what it returns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron_syne.models.embedding_noise import announce_samples
from megatron_syne.parallel.context import own_batch
from megatron_syne.platform.base import Platform

Batch = dict[str, torch.Tensor]


def forward_step(platform: Platform, batches: Iterator[Batch], model: Any) -> tuple[torch.Tensor, Any]:
    """Forward one micro-batch: ``tokens``, ``labels``, ``position_ids``, ``loss_mask``, each [micro_batch, seq].

    Pipeline stages between the first and the last get empty micro-batches, so that all stay in step. The
    causal mask is the engine's own, but where ``document_ids`` say that each document keeps to itself. Under
    context parallelism the batch is of whole sequences all the same: here it is cut to this rank's part.
    """
    from megatron.core import parallel_state

    batch = own_batch(
        next(batches),
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_context_parallel_world_size(),
    )
    announce_samples(model, batch.get("sample_ids"))
    mask, packed = None, None
    if "document_ids" in batch:
        mask, packed = platform.document_attention(batch["document_ids"])
    output = model(
        batch.get("tokens"),
        batch.get("position_ids"),
        mask,
        labels=batch.get("labels"),
        packed_seq_params=packed,
    )
    loss_mask = batch.get("loss_mask")

    def loss_func(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """On the last stage: sum over tokens, number of tokens, and both as one tensor for the log ([2], float64)."""
        assert loss_mask is not None
        mask = loss_mask.reshape(-1).float()
        total = torch.sum(losses.reshape(-1).float() * mask)
        count = mask.sum()
        return total, count.to(torch.int), torch.stack([total.detach().double(), count.double()])

    return output, loss_func


def reduce_over_world(sums: list[torch.Tensor], extra: list[float], device: torch.device) -> list[float]:
    """One collective for all that the ranks must agree on: [loss sum, tokens, *extra], summed over the world.

    ``sums`` is what the last stage returned (empty elsewhere). TP ranks hold the same loss, so only the first
    of each TP group adds its own; CP ranks hold different tokens. Every rank adds its ``extra`` values.
    """
    from megatron.core import parallel_state

    values = torch.zeros(2 + len(extra), dtype=torch.float64, device=device)
    if sums and parallel_state.get_tensor_model_parallel_rank() == 0:
        values[:2] = torch.stack(sums).sum(dim=0)
    if extra:
        values[2:] = torch.tensor(extra, dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return [float(v) for v in values.tolist()]
