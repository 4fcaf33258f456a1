"""Global batches of one data-parallel rank, made ahead by a thread. A batch is a function of its first sample.

There is no state but the place in the run, which the caller has; ``batches`` says which samples a batch
holds, ``dali`` is the other way to feed them.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch

from megatron_syne.config.schema import RunConfig
from megatron_syne.data.batches import BatchBuilder, BatchForm
from megatron_syne.data.build import index_cache, training_dataset, validation_datasets
from megatron_syne.data.dataset import MockDataset, Samples, StagedDataset, batch_in_words
from megatron_syne.data.mixture.ledger import check_sources, make_ledger
from megatron_syne.data.mixture.planning import MixturePlan

Batch = dict[str, torch.Tensor]
"""``tokens``, ``labels``, ``position_ids`` (int64) and ``loss_mask`` (float32), each [micro batch, seq]; with
``data.reset_attention_mask`` also ``document_ids`` (int32), with NEFTune's noise ``sample_ids``, with a loss per source
``source_ids`` ([micro batch])."""

CPU = torch.device("cpu")
_Item = tuple[int, list[Batch] | BaseException]  # first sample, and the batch or what went wrong


class Readable(Samples, Protocol):
    """Samples that say how long each is."""

    def seq_length_at(self, index: int) -> int: ...


class Feeder(Protocol):
    """Makes tensors: ``build(start)`` -> this rank's micro-batches of the global batch that starts there."""

    def build(self, start: int) -> list[Batch]: ...


class TorchFeeder:
    """Arrays to tensors, in pinned memory where asked, from which a GPU copies while it computes."""

    def __init__(self, builder: BatchBuilder, pin_memory: bool = False) -> None:
        self._builder, self._pin = builder, pin_memory

    def build(self, start: int) -> list[Batch]:
        """This rank's micro-batches of the global batch that starts at sample ``start``."""
        return [self._tensors(first) for first in self._builder.first_samples(start)]

    def _tensors(self, first: int) -> Batch:
        batch = {name: torch.from_numpy(array) for name, array in self._builder.micro_batch(first).items()}
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if self._pin else batch


class NothingFeeder:
    """Empty micro-batches, for a pipeline stage that needs no tokens: nothing is read."""

    def __init__(self, builder: BatchBuilder) -> None:
        self._builder = builder

    def build(self, start: int) -> list[Batch]:
        """As many as the other stages have."""
        return [{} for _ in range(self._builder.count_at(start))]


class DataLoader:
    """``global_batch(start)`` -> the micro-batches of this rank; what follows is made ahead by a thread.

    ``prefetch`` global batches are kept ready for a caller who goes on in order (0 = no thread); an error
    in the thread is raised by the call that asks for its batch. Close it, or leave it to be collected.

    Samples after the last whole global batch are left out; with ``pad_last`` they come in one more, filled
    up with samples whose ``loss_mask`` is 0 (evaluation reads every sample once).
    """

    def __init__(
        self,
        dataset: Readable,
        micro_batch_size: int,
        global_batch_size: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        prefetch: int = 2,
        pad_last: bool = False,
        form: BatchForm = BatchForm(),  # noqa: B008  frozen
        reads: bool = True,
        pin_memory: bool = False,
        backend: str = "thread",
        device: torch.device = CPU,
    ) -> None:
        """``reads=False``: this rank needs no tokens. ``backend``: ``thread`` or ``dali`` (``data.loader``), which
        copies to ``device``."""
        self._sizes = (micro_batch_size, global_batch_size, data_parallel_rank, data_parallel_size)
        self._form, self._reads, self._pin, self._backend = form, reads, pin_memory, backend
        self._device = device
        self._prefetch, self._pad_last = prefetch if reads else 0, pad_last
        self._ready: queue.Queue[_Item] = queue.Queue(maxsize=max(prefetch, 1))
        self._next: int | None = None  # first sample of the batch that the thread delivers next
        self._stop: weakref.finalize[..., DataLoader] | None = None
        self._use(dataset)

    def _use(self, dataset: Readable) -> None:
        """Read from another data set from now on."""
        self.close()
        self.dataset: Readable = dataset
        self.num_samples = len(dataset)
        self._builder = builder = BatchBuilder(dataset, *self._sizes, self._form, self._segments(dataset))
        if not self._reads:
            self._feeder: Feeder = NothingFeeder(builder)
        elif self._backend == "dali":
            from megatron_syne.data.dali import DaliFeeder

            self._feeder = DaliFeeder(builder, self._device)
        else:
            self._feeder = TorchFeeder(builder, self._pin)

    def _segments(self, dataset: Readable) -> MixturePlan | None:
        """What decides the batches, where it is not the two sizes."""
        return None

    def seq_length_at(self, sample: int) -> int:
        """Tokens per sample that are predicted, at a sample of the data set."""
        return self.dataset.seq_length_at(sample)

    def micro_batch_size_at(self, start: int) -> int:
        """Samples of one micro-batch, in the global batch that begins at a sample."""
        return self._builder.sizes_at(start)[0]

    def global_batch_size_at(self, start: int) -> int:
        """Samples of the global batch that begins at a sample, over all replicas."""
        return self._builder.sizes_at(start)[1]

    def batch_starts(self, limit: int | None = None, first: int = 0) -> Iterator[int]:
        """First sample of each global batch from sample ``first`` on, at most ``limit`` of them."""
        return _batch_starts(self._builder, self.num_samples, self._pad_last, limit, first)

    def global_batch(self, start: int) -> list[Batch]:
        """This rank's micro-batches of the global batch that begins at sample ``start``.

        Raises IndexError past the last batch, and whatever reading the samples raises (DataError).
        """
        if start < 0 or next(self.batch_starts(1, start), None) is None:
            raise IndexError(f"no global batch at sample {start} of {self.num_samples}")
        if self._prefetch < 1:
            return self._feeder.build(start)
        if start != self._next:
            self._run_ahead_from(start)
        at, item = self._ready.get()
        assert at == start
        if isinstance(item, BaseException):
            self.close()
            raise item
        self._next = start + self.global_batch_size_at(start)
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
        arguments = (self._feeder, self.batch_starts(first=start), self._ready, stop)
        thread = threading.Thread(target=_run_ahead, args=arguments, name="prefetch", daemon=True)
        self._stop = weakref.finalize(self, _stop_thread, thread, self._ready, stop)
        thread.start()
        self._next = start


class TrainingLoader(DataLoader):
    """The training batches of a run, with its plan and the account of what it has read."""

    dataset: StagedDataset | MockDataset

    def _segments(self, dataset: Readable) -> MixturePlan | None:
        """Each segment of the plan has its own batch."""
        plan: MixturePlan | None = getattr(dataset, "plan", None)
        return plan

    @property
    def plan(self) -> MixturePlan:
        """What is read when."""
        assert self.dataset.plan is not None
        return self.dataset.plan

    resumed_from: Mapping[str, Any] | None = None
    """Ledger of the checkpoint that the run goes on from."""
    changes: list[dict[str, Any]]
    """What was changed on the way: by hand on a resume, or by re-weighting. Kept in the ledger."""

    def replace_plan(self, plan: MixturePlan) -> None:
        """Go on with another plan, which must have the same past; batches made ahead are made again."""
        self._use(self.dataset.with_plan(plan))

    def consumed(self, sample: int) -> dict[str, int]:
        """Tokens read of each source by the samples before ``sample``."""
        return self.plan.consumed(sample)

    def described(self, start: int) -> str:
        """What the global batch that begins at a sample holds, for people: its stage, sources and documents."""
        return batch_in_words(self.dataset, start, self.global_batch_size_at(start))

    def ledger(self, sample: int) -> dict[str, Any]:
        """The account that a checkpoint keeps, with which the run goes on after ``sample`` samples."""
        return make_ledger(
            self.plan, sample, self.dataset.source_facts(), self.changes, previous=self.resumed_from
        )


def _batch_starts(
    builder: BatchBuilder, num_samples: int, pad_last: bool, limit: int | None, first: int
) -> Iterator[int]:
    at = first
    while at < num_samples and limit != 0:
        after = at + builder.sizes_at(at)[1]
        if after > num_samples and not pad_last:
            return
        yield at
        at, limit = after, None if limit is None else limit - 1


def _run_ahead(
    feeder: Feeder, starts: Iterator[int], ready: queue.Queue[_Item], stop: threading.Event
) -> None:
    for start in starts:
        item: list[Batch] | BaseException
        try:
            item = feeder.build(start)
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
    config: RunConfig,
    plan: MixturePlan,
    vocab_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    reads: bool = True,
    pin_memory: bool = False,
    device: torch.device = CPU,
    resumed_from: Mapping[str, Any] | None = None,
    changes: Iterable[dict[str, Any]] = (),
) -> TrainingLoader:
    """Training batches of a rank; ``vocab_size`` = rows of the embedding. MissingInput, DataError, ConfigError.

    ``resumed_from``: ledger of the checkpoint that the run goes on from; the files must be those it read.
    """
    loader = TrainingLoader(
        training_dataset(config, plan, vocab_size, index_cache(config)),
        config.train.micro_batch_size,
        config.train.global_batch_size,
        data_parallel_rank,
        data_parallel_size,
        form=BatchForm.of(
            config.data,
            sample_ids=config.train.neftune_noise_alpha > 0,
            source_ids=config.monitor.loss_per_source,
        ),
        reads=reads,
        pin_memory=pin_memory,
        backend=config.data.loader,
        device=device,
    )
    if resumed_from is not None:
        check_sources(resumed_from, loader.dataset.source_facts())
    loader.resumed_from, loader.changes = resumed_from, list(changes)
    return loader


def build_validation_data(
    config: RunConfig,
    vocab_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    reads: bool = True,
    pin_memory: bool = False,
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
            form=BatchForm.of(config.data),
            reads=reads,
            pin_memory=pin_memory,
        )
        for name, dataset in validation_datasets(config, vocab_size, index_cache(config)).items()
    }
