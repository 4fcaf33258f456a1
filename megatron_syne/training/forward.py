"""The forward step that megatron-core's schedules call, and the reduction of what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import one_hot

from megatron_syne.models.embedding_noise import announce_samples
from megatron_syne.parallel.context import own_batch
from megatron_syne.platform.base import Platform

Batch = dict[str, torch.Tensor]


def forward_step(
    platform: Platform, batches: Iterator[Batch], model: Any, sources: int = 0
) -> tuple[torch.Tensor, Any]:
    """Forward one micro-batch: ``tokens``, ``labels``, ``position_ids``, ``loss_mask``, each [micro_batch, seq].

    Pipeline stages between the first and the last get empty micro-batches, so that all stay in step. The
    causal mask is the engine's own, but where ``document_ids`` say that each document keeps to itself. Under
    context parallelism the batch is of whole sequences all the same: here it is cut to this rank's part.
    With ``sources`` > 0 the batch has ``source_ids``, and the loss of each source is taken apart from the whole.
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
    loss_mask, source_ids = batch.get("loss_mask"), batch.get("source_ids")

    def loss_func(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """On the last stage: sum over tokens, number of tokens, and both as one tensor for the log
        (float64 [2 + 2 x sources]: then the sum of each source, then its tokens)."""
        assert loss_mask is not None
        mask = loss_mask.reshape(-1).float()
        weighted = losses.reshape(-1).float() * mask
        total = torch.sum(weighted)
        count = mask.sum()
        log = torch.stack([total.detach().double(), count.double()])
        if sources:
            assert source_ids is not None
            rows = weighted.detach().view(loss_mask.shape), mask.view(loss_mask.shape)
            log = torch.cat([log, by_source(*rows, source_ids, sources, log[0])])
        return total, count.to(torch.int), log

    return output, loss_func


def by_source(
    weighted: torch.Tensor, mask: torch.Tensor, source_ids: torch.Tensor, sources: int, whole: torch.Tensor
) -> torch.Tensor:
    """float64 [2 x sources]: what each source has of ``whole``, the micro-batch's sum, and its number of tokens.

    ``weighted`` (losses times mask) and ``mask`` [micro batch, seq], fp32, ``source_ids`` [micro batch]. Sums are
    taken as shares, so that those of all sources add up in float64 to the whole, which itself was summed in fp32.
    Nothing waits for the device.
    """
    each = weighted.sum(dim=1, dtype=torch.float64)
    own = each.sum()
    each = torch.where(own == 0, each, whole * (each / own))
    values = torch.cat([each, mask.sum(dim=1, dtype=torch.float64)])
    # index_add_ has no fixed order on a GPU
    return values @ one_hot(torch.cat([source_ids, source_ids + sources]), 2 * sources).double()


def reduce_over_world(
    platform: Platform,
    sums: list[torch.Tensor],
    extra: list[float],
    sources: int = 0,
    more: torch.Tensor | None = None,
) -> Callable[[], list[float]]:
    """One collective for all that the ranks must agree on; what is returned waits for it and gives, summed over the
    world: [loss sum, tokens, loss sum of each source, tokens of each source, *extra, *more].

    ``sums`` is what the last stage returned (empty elsewhere). TP ranks hold the same loss, so only the first
    of each TP group adds its own; CP ranks hold different tokens. Every rank adds its ``extra`` values, and ``more``
    (float64, on the device).
    """
    from megatron.core import parallel_state

    width = 2 + 2 * sources
    # out of a tensor: a list would be copied to a GPU with a wait for all that it has to do
    given = torch.tensor([0.0] * width + extra, dtype=torch.float64)
    values = given.to(platform.device, non_blocking=True)
    if sums and parallel_state.get_tensor_model_parallel_rank() == 0:
        values[:width] = torch.stack(sums).sum(dim=0)
    if more is not None:
        values = torch.cat([values, more])
    dist.all_reduce(values)
    return platform.fetch(values)
