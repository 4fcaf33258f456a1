"""Global batches of one data-parallel rank. There is no state: a batch is a function of its first sample.

Micro-batch ``m`` of rank ``r`` in the global batch that starts at sample ``c`` holds the samples
``c + m * mbs * dp + r * mbs + j``, ``j < mbs``: which samples make up a global batch does not depend on dp
or on the micro-batch size, so a run goes on in another layout.
"""

from __future__ import annotations

import queue
import threading
import weakref

import numpy as np
import torch

from megatron_syne.config.schema import RunConfig
from megatron_syne.data.build import training_dataset, validation_datasets
from megatron_syne.data.dataset import Samples
from megatron_syne.data.mixture import MixturePlan
from megatron_syne.errors import ConfigError

Batch = dict[str, torch.Tensor]
"""``tokens``, ``labels``, ``position_ids`` (int64) and ``loss_mask`` (float32), each [micro batch, seq]."""

_Item = tuple[int, list[Batch] | BaseException]  # first sample, and the batch or what went wrong


class DataLoader:
    """``global_batch(start)`` -> the micro-batches of this rank; what follows is made ahead by a thread.

    ``prefetch`` global batches are kept ready for a caller who goes on in order (0 = no thread); an error
    in the thread is raised by the call that asks for its batch. Close it, or leave it to be collected.

    Samples after the last whole global batch are left out; with ``pad_last`` they come in one more, filled
    up with samples whose ``loss_mask`` is 0 (evaluation reads every sample once).
    """

    def __init__(
        self,
        dataset: Samples,
        micro_batch_size: int,
        global_batch_size: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        prefetch: int = 2,
        pad_last: bool = False,
    ) -> None:
        step = micro_batch_size * data_parallel_size
        if step < 1 or global_batch_size < 1 or global_batch_size % step:
            raise ConfigError(
                f"train.global_batch_size: {global_batch_size} is not a multiple of micro_batch_size "
                f"{micro_batch_size} x data parallel {data_parallel_size}"
            )
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise ConfigError(f"data parallel rank {data_parallel_rank} of {data_parallel_size}")
        self.dataset = dataset
        self.num_samples = len(dataset)
        self._builder = _Builder(
            dataset, micro_batch_size, global_batch_size, data_parallel_rank, data_parallel_size
        )
        self._global, self._prefetch, self._pad_last = global_batch_size, prefetch, pad_last
        self._ready: queue.Queue[_Item] = queue.Queue(maxsize=max(prefetch, 1))
        self._next: int | None = None  # first sample of the batch that the thread delivers next
        self._stop: weakref.finalize[..., DataLoader] | None = None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides the samples of the data set."""
        return str(self.dataset.fingerprint)  # type: ignore[attr-defined]  # of training data only

    def batch_starts(self, limit: int | None = None, first: int = 0) -> range:
        """First sample of each global batch from sample ``first`` on, at most ``limit`` of them."""
        count, rest = divmod(max(self.num_samples - first, 0), self._global)
        count += self._pad_last and rest > 0
        return range(
            first, first + (count if limit is None else min(count, limit)) * self._global, self._global
        )

    def global_batch(self, start: int) -> list[Batch]:
        """This rank's micro-batches of the global batch that begins at sample ``start``.

        Raises IndexError past the last batch, and whatever reading the samples raises (DataError).
        """
        if start < 0 or not self.batch_starts(1, start):
            raise IndexError(f"no global batch at sample {start} of {self.num_samples}")
        if self._prefetch < 1:
            return self._builder.build(start)
        if start != self._next:
            self._run_ahead_from(start)
        at, item = self._ready.get()
        assert at == start
        if isinstance(item, BaseException):
            self.close()
            raise item
        self._next = start + self._global
        return item

    def close(self) -> None:
        """Stop the thread; the loader can be used again after it."""
        if self._stop is not None:
            self._stop()
        self._stop = self._next = None

    def _run_ahead_from(self, start: int) -> None:
        self.close()
        stop = threading.Event()
        self._ready = queue.Queue(maxsize=self._prefetch)
        # the thread knows nothing of this object, so an abandoned loader is collected, which stops it
        arguments = (self._builder, self.batch_starts(first=start), self._ready, stop)
        thread = threading.Thread(target=_run_ahead, args=arguments, name="prefetch", daemon=True)
        self._stop = weakref.finalize(self, _stop_thread, thread, self._ready, stop)
        thread.start()
        self._next = start


class _Builder:
    """The batch arithmetic, apart from the thread."""

    def __init__(self, dataset: Samples, micro: int, global_: int, rank: int, dp: int) -> None:
        self._dataset, self._last = dataset, len(dataset) - 1
        self._micro, self._rank, self._dp = micro, rank, dp
        self._count = global_ // (micro * dp)

    def build(self, start: int) -> list[Batch]:
        return [
            self._micro_batch(start + (m * self._dp + self._rank) * self._micro) for m in range(self._count)
        ]

    def _micro_batch(self, first: int) -> Batch:
        indices = range(first, first + self._micro)
        # past the end: any sample will do, it weighs nothing
        tokens = torch.from_numpy(np.stack([self._dataset[min(index, self._last)] for index in indices]))
        weights = torch.tensor([float(index <= self._last) for index in indices])
        shape = (self._micro, tokens.shape[1] - 1)
        return {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "loss_mask": weights[:, None].expand(shape).contiguous(),
            "position_ids": torch.arange(shape[1]).expand(shape).contiguous(),
        }


def _run_ahead(builder: _Builder, starts: range, ready: queue.Queue[_Item], stop: threading.Event) -> None:
    for start in starts:
        item: list[Batch] | BaseException
        try:
            item = builder.build(start)
        except BaseException as error:  # the caller raises it when its turn comes
            item = error
        while not stop.is_set():
            try:
                ready.put((start, item), timeout=0.2)
                break
            except queue.Full:
                continue
        if stop.is_set() or isinstance(item, BaseException):
            return


def _stop_thread(thread: threading.Thread, ready: queue.Queue[_Item], stop: threading.Event) -> None:
    stop.set()
    while not ready.empty():  # a full queue would hold the thread until its time-out
        ready.get_nowait()
    if thread is not threading.current_thread():
        thread.join()


def build_training_data(
    config: RunConfig, plan: MixturePlan, vocab_size: int, data_parallel_rank: int, data_parallel_size: int
) -> DataLoader:
    """Training batches of a rank; ``vocab_size`` = rows of the embedding. MissingInput, DataError, ConfigError."""
    return DataLoader(
        training_dataset(config, plan, vocab_size),
        config.train.micro_batch_size,
        config.train.global_batch_size,
        data_parallel_rank,
        data_parallel_size,
    )


def build_validation_data(
    config: RunConfig, vocab_size: int, data_parallel_rank: int, data_parallel_size: int
) -> dict[str, DataLoader]:
    """Validation batches of a rank by source; without threads, as evaluation is short and seldom."""
    return {
        name: DataLoader(
            dataset,
            config.train.micro_batch_size,
            config.train.global_batch_size,
            data_parallel_rank,
            data_parallel_size,
            prefetch=0,
            pad_last=True,
        )
        for name, dataset in validation_datasets(config.data, vocab_size).items()
    }
