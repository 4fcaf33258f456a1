"""What a micro-batch holds, and which samples are in it. No torch: the loaders make tensors of it.

Micro-batch ``m`` of rank ``r`` in the global batch that starts at sample ``c`` holds the samples
``c + m * mbs * dp + r * mbs + j``, ``j < mbs``: which samples make up a global batch does not depend on dp
or on the micro-batch size, so a run goes on in another layout. Both sizes are those of the plan's segment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_syne.config.schema import DataConfig
from megatron_syne.data.dataset import Sample, Samples
from megatron_syne.data.mixture.plan import MixturePlan
from megatron_syne.errors import ConfigError

Arrays = dict[str, NDArray[Any]]
"""``tokens``, ``labels``, ``position_ids`` (int64), ``loss_mask`` (float32), with ``reset_attention_mask`` also
``document_ids`` (int32): each [micro batch, seq]; where noise is drawn by it ``sample_ids`` (int64, [micro batch]),
the samples' indices in the run; where losses are told apart by it ``source_ids`` (int64, [micro batch]), each sample's
source as its place among the plan's."""


@dataclass(frozen=True)
class BatchForm:
    """What is made of the boundaries of documents; megatron-core's meaning of its options of the same names."""

    reset_attention_mask: bool = False
    """Adds ``document_ids``: 0, 1, 2, ... within the sample, what follows the last boundary (padding) its own."""
    reset_position_ids: bool = False
    eod_mask_loss: bool = False
    sample_ids: bool = False
    """Adds ``sample_ids``."""
    source_ids: bool = False
    """Adds ``source_ids``; the batches must be a plan's."""

    @classmethod
    def of(cls, data: DataConfig, sample_ids: bool = False, source_ids: bool = False) -> BatchForm:
        """Of a configuration; ``sample_ids`` where the training draws noise by them, ``source_ids`` where it logs
        the loss of each source."""
        resets = (data.reset_attention_mask, data.reset_position_ids)
        return cls(*resets, data.eod_mask_loss, sample_ids, source_ids)


class BatchBuilder:
    """The micro-batches of one data-parallel rank as arrays, as a function of their first sample."""

    def __init__(
        self,
        dataset: Samples,
        micro_batch_size: int,
        global_batch_size: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        form: BatchForm = BatchForm(),
        plan: MixturePlan | None = None,
    ) -> None:
        """``plan``: its segments' batches are used, and the two sizes given are not."""
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise ConfigError(f"data parallel rank {data_parallel_rank} of {data_parallel_size}")
        self.dataset, self.last = dataset, len(dataset) - 1
        self.rank, self.dp = data_parallel_rank, data_parallel_size
        self.form = form
        self._plan, self._sizes = plan, (micro_batch_size, global_batch_size)
        if plan is None:
            self._check(*self._sizes)

    def sizes_at(self, start: int) -> tuple[int, int]:
        """(micro-batch, global batch) in samples, of the global batch that begins at ``start``."""
        if self._plan is None:
            return self._sizes
        segment = self._plan.segment_at(start)
        return segment.micro_batch_size, segment.global_batch_size

    def count_at(self, start: int) -> int:
        """Micro-batches of one rank in the global batch that begins at ``start``; ConfigError where they do not
        fit into it."""
        micro, batch = self.sizes_at(start)
        self._check(micro, batch)
        return batch // (micro * self.dp)

    def _check(self, micro: int, batch: int) -> None:
        if micro < 1 or batch < 1 or batch % (micro * self.dp):
            raise ConfigError(
                f"train.global_batch_size: {batch} is not a multiple of micro_batch_size {micro} x data parallel "
                f"{self.dp}"
            )

    def first_samples(self, start: int) -> list[int]:
        """First sample of each of this rank's micro-batches in the global batch that begins at ``start``."""
        micro, _ = self.sizes_at(start)
        return [start + (m * self.dp + self.rank) * micro for m in range(self.count_at(start))]

    def micro_batch(self, first: int, size: int | None = None) -> Arrays:
        """The micro-batch whose first sample is ``first``, of so many samples (not given = of its global batch);
        what lies past the end weighs nothing."""
        micro = self.sizes_at(first)[0] if size is None else size
        indices = range(first, first + micro)
        samples: list[Sample] = [self.dataset[min(index, self.last)] for index in indices]
        rows = np.stack([sample.tokens for sample in samples])
        length = rows.shape[1] - 1
        batch: Arrays = {
            "tokens": np.ascontiguousarray(rows[:, :-1]),
            "labels": np.ascontiguousarray(rows[:, 1:]),
            "position_ids": np.tile(np.arange(length), (micro, 1)),
            "loss_mask": np.zeros((micro, length), dtype=np.float32),
        }
        if self.form.reset_attention_mask:
            batch["document_ids"] = np.zeros((micro, length), dtype=np.int32)
        if self.form.sample_ids:
            batch["sample_ids"] = np.arange(first, first + micro)
        if self.form.source_ids:
            assert self._plan is not None
            batch["source_ids"] = np.array([self._plan.source_at(min(index, self.last)) for index in indices])
        for row, (index, sample) in enumerate(zip(indices, samples, strict=True)):
            if index <= self.last:
                batch["loss_mask"][row, : sample.length] = 1.0
            if self.form.eod_mask_loss:
                batch["loss_mask"][row, sample.document_ends] = 0.0
            begins = sample.document_ends + 1
            begins = begins[begins < length]
            if self.form.reset_position_ids:
                since = np.zeros(length, dtype=np.int64)
                since[begins] = begins
                batch["position_ids"][row] -= np.maximum.accumulate(since)
            if self.form.reset_attention_mask:
                batch["document_ids"][row, begins] = 1
                np.cumsum(batch["document_ids"][row], out=batch["document_ids"][row])
        return batch
