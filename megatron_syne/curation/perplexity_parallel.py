"""Scores by our own model in any layout: rank 0 hands out windows, all ranks compute, rank 0 has the sums.

Only the main thread may call it, as everything that calls the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from numpy.typing import NDArray

from megatron_syne.config.schema import ParallelConfig
from megatron_syne.curation.perplexity_windows import batches_of, micro_batches, padded_length, padded_rows
from megatron_syne.errors import PeerFailed
from megatron_syne.parallel.context import own_part

GO, END, FAILED = 0, 1, 2


class ParallelScorer:
    """The model of this rank, and the collective by which all ranks compute one part after another.

    Rank 0 calls it with windows, the other ranks :meth:`serve` until they are told that there is no more.
    """

    def __init__(
        self,
        parallel: ParallelConfig,
        vocab_size: int,
        chunks: list[Any],
        device: torch.device,
        batch_tokens: int,
    ) -> None:
        self._parallel, self._vocab_size, self._chunks = parallel, vocab_size, chunks
        self._device, self._batch_tokens = device, batch_tokens
        self.broken = False
        """A collective has failed: the others are not there to be told anything."""
        for chunk in chunks:
            chunk.eval()

    def __call__(self, windows: Sequence[NDArray[np.int64]]) -> NDArray[np.float64]:
        """Rank 0: sum of ``-log p`` over the tokens but the first of each window, in nats."""
        self.broken = True
        lengths = np.array([len(window) for window in windows], dtype=np.int64)
        self.announce(GO, len(windows), int(lengths.sum()))
        self._broadcast(np.concatenate([lengths, *windows]))
        sums = self._compute(windows)
        self.broken = False
        return sums

    def announce(self, what: int, windows: int = 0, tokens: int = 0) -> NDArray[np.int64]:
        """Tell (rank 0) or hear (the others) what comes next: [what, windows, tokens of all windows]."""
        return self._broadcast(np.array([what, windows, tokens], dtype=np.int64))

    def serve(self) -> None:
        """The other ranks: compute what rank 0 hands out, to the end. PeerFailed where rank 0 gave up."""
        while (heard := self.announce(GO))[0] == GO:
            count, tokens = int(heard[1]), int(heard[2])
            flat = self._broadcast(np.zeros(count + tokens, dtype=np.int64))
            self._compute(np.split(flat[count:], np.cumsum(flat[: count - 1])))
        if heard[0] == FAILED:
            raise PeerFailed("rank 0 could not go on, and has said why")

    def _broadcast(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        tensor = torch.from_numpy(values).to(self._device)
        dist.broadcast(tensor, src=0)
        result: NDArray[np.int64] = tensor.cpu().numpy()
        return result

    def _compute(self, windows: Sequence[NDArray[np.int64]]) -> NDArray[np.float64]:
        """Every rank: its replica's share of every batch; the sums of all windows, on all ranks."""
        replica = parallel_state.get_data_parallel_rank()
        replicas = parallel_state.get_data_parallel_world_size()
        passes = micro_batches(self._parallel)
        first_of_tp = parallel_state.get_tensor_model_parallel_rank() == 0
        sums = torch.zeros(len(windows), dtype=torch.float64, device=self._device)
        lengths = [len(window) - 1 for window in windows]
        for rows, longest in batches_of(lengths, self._batch_tokens, replicas * passes):
            length, each = padded_length(longest, self._parallel), -(-len(rows) // (replicas * passes))
            shares = [rows[at * each : (at + 1) * each] for at in range(replicas * passes)]
            mine = shares[replica * passes : (replica + 1) * passes]
            batches = [padded_rows([windows[row] for row in share], each, length) for share in mine]
            for share, found in zip(mine, self._forward(batches), strict=False):  # the last stage has results
                if first_of_tp and share:
                    sums[share] = found[: len(share)]
        dist.all_reduce(sums)
        result: NDArray[np.float64] = sums.cpu().numpy()
        return result

    def _forward(self, batches: list[NDArray[np.int64]]) -> list[torch.Tensor]:
        """Sums of the rows of each micro-batch ``[2, rows, length]`` on the last stage, nothing elsewhere; under
        context parallelism of this rank's part of the rows."""
        data = [torch.from_numpy(batch).to(self._device) for batch in batches]
        iterators = [iter(data) for _ in self._chunks]
        with torch.no_grad():
            found: list[torch.Tensor] = get_forward_backward_func()(
                forward_step_func=self._step,
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self._chunks if len(self._chunks) > 1 else self._chunks[0],
                num_microbatches=len(data),
                seq_length=data[0].shape[2],
                micro_batch_size=data[0].shape[1],
                forward_only=True,
                collect_non_loss_data=True,
            )
        return found

    def _step(self, batches: Any, chunk: Any) -> tuple[torch.Tensor, Callable[..., torch.Tensor]]:
        whole = next(batches)  # [2, rows, length]
        positions = torch.arange(whole.shape[2], device=whole.device).expand_as(whole[:1])
        rank = parallel_state.get_context_parallel_rank()
        size = parallel_state.get_context_parallel_world_size()
        tokens, labels, positions = own_part(torch.cat([whole, positions]), rank, size, dim=2)
        return chunk(tokens, positions, None), lambda logits, non_loss_data=True: self._sums(logits, labels)

    def _sums(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """[rows] float64 from this TP rank's part of the vocabulary, ``[rows, length, vocabulary / TP]``.

        Rows of the embedding that only pad the vocabulary have a share in training's loss; here they have none.
        """
        first = parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
        total = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
        for row, wanted in enumerate(labels):
            part = logits[row].float()  # of fp32 the logits themselves: nobody reads them again
            part[:, max(self._vocab_size - first, 0) :] = float("-inf")
            losses = vocab_parallel_cross_entropy(part[:, None], wanted.clamp(min=0)[:, None])[:, 0]
            total[row] = losses.double().masked_fill(wanted < 0, 0.0).sum()
        return total
