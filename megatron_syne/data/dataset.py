"""Samples by index: packed documents of one source, and the run's mixture of sources.

Packing is Llama-3-SynE's: documents (each ends with EOS) one after another, cut into equal samples; a
document may go on in the next sample, attention is not reset. A sample is ``seq_length + 1`` tokens and
shares one token with the next, so each token is predicted once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_syne.data.indexed import IndexedReader
from megatron_syne.data.mixture import MixturePlan
from megatron_syne.errors import ConfigError, DataError

_EPOCHS_CACHED = 2


class Samples(Protocol):
    """What the loader reads: samples of ``seq_length + 1`` token ids (int64) by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> NDArray[np.int64]: ...


class Where(NamedTuple):
    """Where a sample of the run comes from; ``sample`` counts the source's own over all epochs."""

    stage: str
    source: str
    epoch: int
    sample: int


class PackedSource:
    """Endless samples of one source; each epoch shuffles the documents anew (or never, ``shuffle=False``).

    The order is a function of (seed, name, epoch) alone: the same on any machine and after any resume.
    The last tokens of an epoch that fill no sample are dropped. DataError where there is not even one.
    """

    def __init__(
        self, reader: IndexedReader, seq_length: int, seed: int, name: str, shuffle: bool = True
    ) -> None:
        self.reader, self.seq_length, self.seed, self.name = reader, seq_length, seed, name
        self.shuffle = shuffle
        self.samples_per_epoch = (reader.num_tokens - 1) // seq_length
        if self.samples_per_epoch < 1:
            raise DataError(
                f"{reader.prefix}: source {name} has {reader.num_tokens} tokens, fewer than one sample of "
                f"seq_length + 1 = {seq_length + 1}; add text or shorten data.seq_length"
            )
        self._epochs: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        epoch, within = divmod(index, self.samples_per_epoch)
        order, ends = self._epoch(epoch)
        start, wanted = within * self.seq_length, self.seq_length + 1
        sample = np.empty(wanted, dtype=np.int64)
        at = int(np.searchsorted(ends, start, side="right"))  # the document that holds token `start`
        filled = 0
        while filled < wanted:
            document = int(order[at])
            length = int(self.reader.document_lengths[document])
            skip = start + filled - (int(ends[at]) - length)
            take = min(length - skip, wanted - filled)
            sample[filled : filled + take] = self.reader.read(
                int(self.reader.document_starts[document]) + skip, take
            )
            filled += take
            at += 1
        return sample

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Documents in this epoch's order, and the token at which each ends in its stream."""
        found = self._epochs.get(epoch)
        if found is None:
            count = self.reader.num_documents
            order = permutation(count, self.seed, self.name, epoch) if self.shuffle else np.arange(count)
            ends = np.cumsum(self.reader.document_lengths[order], dtype=np.int64)
            found = (order, ends)
            kept = {key: self._epochs[key] for key in sorted(self._epochs)[-(_EPOCHS_CACHED - 1) :]}
            self._epochs = {**kept, epoch: found}
        return found


def permutation(count: int, seed: int, name: str, epoch: int) -> NDArray[np.int64]:
    """A random order of ``count`` things, from a hash of the other arguments.

    Sorted raw words of Philox, and not ``Generator.permutation``: numpy promises the former the same in
    every version, the latter not.
    """
    digest = hashlib.sha256(json.dumps([seed, name, epoch]).encode("utf-8")).digest()
    bits = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64))
    return np.argsort(bits.random_raw(count), kind="stable").astype(np.int64)


class StagedDataset:
    """The run's samples by global index, as the plan mixes them; ``sources`` must hold all that it uses."""

    def __init__(self, plan: MixturePlan, sources: Mapping[str, PackedSource]) -> None:
        missing = [name for name in plan.sources if plan.samples_of(name) and name not in sources]
        if missing:
            raise ConfigError(f"data.sources: the plan uses {', '.join(missing)}, which was not opened")
        self.plan, self.sources = plan, dict(sources)

    def __len__(self) -> int:
        return self.plan.num_samples

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        location = self.plan.locate(index)
        return self.sources[location.source][location.sample]

    def where(self, index: int) -> Where:
        """Stage, source, epoch of the source and its sample counter."""
        at = self.plan.locate(index)
        epoch = at.sample // self.sources[at.source].samples_per_epoch
        return Where(self.plan.stages[at.stage].name, at.source, epoch, at.sample)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of plan, seeds and data: two equal ones give equal samples at every index."""
        parts: list[Any] = [self.plan.fingerprint()]
        for name in self.plan.sources:
            if self.plan.samples_of(name):
                source = self.sources[name]
                parts.append([name, source.seed, source.shuffle, source.reader.bin_sha256()])
        return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()


class ValidationSource:
    """One pass over a source in file order: the same samples at every evaluation."""

    def __init__(self, reader: IndexedReader, seq_length: int, name: str) -> None:
        self.name = name
        self._source = PackedSource(reader, seq_length, seed=0, name=name, shuffle=False)

    def __len__(self) -> int:
        return self._source.samples_per_epoch

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of validation source {self.name} with {len(self)}")
        return self._source[index]


class MockDataset:
    """Random tokens as a function of (seed, index): for benchmarks and layout tests."""

    def __init__(self, vocab_size: int, seq_length: int, num_samples: int, seed: int) -> None:
        self.vocab_size, self.seq_length, self.seed = vocab_size, seq_length, seed
        self._num_samples = num_samples

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        if not 0 <= index < self._num_samples:
            raise IndexError(f"sample {index} of {self._num_samples}")
        bits = np.random.Philox(key=np.array([self.seed % 2**64, index], dtype=np.uint64))
        words = bits.random_raw(self.seq_length + 1)
        return (words % np.uint64(self.vocab_size)).astype(np.int64)

    def where(self, index: int) -> Where:
        """All of it is stage and source ``mock``."""
        return Where("mock", "mock", 0, index)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what decides the samples."""
        parts = ["mock", self.vocab_size, self.seq_length, self.seed]
        return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()
