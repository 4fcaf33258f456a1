"""Samples by index: tokens of one source at a place of its stream, and the run's mixture of sources.

Packing is Llama-3-SynE's unless best fit is asked for: documents (each ends with EOS) one after another, cut
into equal samples; a document may go on in the next sample. A sample is ``seq_length + 1`` tokens and shares
one with the next, so each token is predicted once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_syne.data.mixture.ledger import source_options
from megatron_syne.data.mixture.planning import MixturePlan
from megatron_syne.data.tokens.reader import IndexedReader
from megatron_syne.data.tokens.streams import BestFit, Concatenated, Piece, Range, SourceDocuments, Stream
from megatron_syne.errors import ConfigError, DataError

_NO_ENDS = np.zeros(0, dtype=np.int32)


class Sample(NamedTuple):
    """One sample of sequence length L."""

    tokens: NDArray[np.int64]
    """[L + 1]: position i is followed by token i + 1; padded with EOS from ``length + 1`` on."""
    document_ends: NDArray[np.int32]
    """Positions in [0, L) whose token is the last of a document."""
    length: int
    """Positions that have a next token to predict, from the left: L, or fewer where padded."""


class Samples(Protocol):
    """What the loader reads: samples by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class Where(NamedTuple):
    """Where a sample of the run comes from; ``ranges`` tile its source without gap or overlap."""

    stage: str
    source: str
    epoch: int
    ranges: list[Range]
    """(document, start, stop) of its L tokens, without the one that is only predicted."""


def read_sample(reader: IndexedReader, pieces: list[Piece], seq_length: int) -> Sample:
    """Tokens of the pieces one after another, padded with EOS to ``seq_length + 1``; DataError, OSError."""
    total = sum(piece.range.stop - piece.range.start for piece in pieces)
    raw = np.empty(total, dtype=reader.dtype)
    view, item = memoryview(raw).cast("B"), reader.dtype.itemsize  # type: ignore[arg-type]
    at = 0
    ends = []
    for (document, start, stop), finished in pieces:
        end = at + stop - start
        reader.read_into(reader.document_start(document) + start, view[at * item : end * item])
        at = end
        if finished and at <= seq_length:
            ends.append(at - 1)
    first = pieces[0].range
    reader.check_tokens(raw, reader.document_start(first.document) + first.start)
    if total == seq_length + 1:
        return Sample(raw.astype(np.int64), np.array(ends, dtype=np.int32), seq_length)
    tokens = np.full(seq_length + 1, reader.eos_id, dtype=np.int64)
    tokens[:total] = raw
    return Sample(tokens, np.array(ends, dtype=np.int32), total - 1)


class StagedDataset:
    """The run's samples by global index, as the plan mixes them; ``streams`` must hold all that it uses."""

    def __init__(self, plan: MixturePlan, streams: Mapping[str, Stream]) -> None:
        missing = [name for name in used_sources(plan) if name not in streams]
        if missing:
            raise ConfigError(f"data.sources: the plan uses {', '.join(missing)}, which was not opened")
        self.plan, self.streams = plan, dict(streams)

    def __len__(self) -> int:
        return self.plan.num_samples

    def __getitem__(self, index: int) -> Sample:
        at = self.plan.locate(index)
        seq_length = self.plan.segments[at.segment].seq_length
        stream = self.streams[at.source]
        return read_sample(
            stream.documents.reader, stream.pieces(at.position, seq_length + 1, seq_length), seq_length
        )

    def where(self, index: int) -> Where:
        """Stage, source, epoch of the source at the sample's first token, and document ranges."""
        at = self.plan.locate(index)
        segment, stream = self.plan.segments[at.segment], self.streams[at.source]
        epoch = at.position // stream.epoch_tokens(segment.seq_length)
        pieces = stream.pieces(at.position, segment.seq_length, segment.seq_length)
        return Where(segment.stage, at.source, epoch, [piece.range for piece in pieces])

    def seq_length_at(self, index: int) -> int:
        """Sequence length of a sample."""
        return self.plan.seq_length_at(index)

    def with_plan(self, plan: MixturePlan) -> StagedDataset:
        """The same sources under another plan."""
        return StagedDataset(plan, self.streams)

    def epoch_tokens(self) -> dict[str, int]:
        """Tokens of one epoch of each source; with best fit of the sequence length that takes most."""
        lengths = sorted({segment.seq_length for segment in self.plan.segments})
        return {
            name: min(stream.epoch_tokens(length) for length in lengths)
            for name, stream in self.streams.items()
        }

    def source_facts(self) -> dict[str, dict[str, Any]]:
        """What the ledger remembers of each source: its options, and digests of the files that were read."""
        facts: dict[str, dict[str, Any]] = {}
        for name, stream in self.streams.items():
            documents = stream.documents
            digests = {
                "bin_sha256": documents.reader.bin_sha256(),
                "idx_sha256": documents.reader.idx_sha256(),
            }
            fields = {f"{field}_sha256": digest for field, digest in documents.fields().items()}
            facts[name] = {"options": source_options(documents.options), **digests, **fields}
        return facts

    def prepare(self, first: int = 0, end: int | None = None) -> None:
        """Make what samples ``first`` to ``end`` (None = all) need in the index cache, two sources at a time.

        Not needed: what is missing is made when it is first read, by whichever rank comes first.
        """
        end = len(self) if end is None else end
        with ThreadPoolExecutor(2) as pool:  # numpy sorts without holding the interpreter
            for _ in pool.map(lambda name: self._prepare(name, first, end), used_sources(self.plan)):
                pass

    def _prepare(self, name: str, first: int, end: int) -> None:
        stream, column = self.streams[name], self.plan.sources.index(name)
        for segment in self.plan.segments:
            begin, stop = max(first, segment.first_sample), min(end, segment.first_sample + segment.samples)
            if begin >= stop:
                continue
            before, after = self.plan.consumed(begin)[name], self.plan.consumed(stop)[name]
            position = segment.bases[column] + before - self.plan.consumed(segment.first_sample)[name]
            step = stream.epoch_tokens(segment.seq_length)
            last = position + after - before - 1
            for epoch in range(position // step, last // step + 1) if after > before else ():
                stream.pieces(max(position, epoch * step), 1, segment.seq_length)


def used_sources(plan: MixturePlan) -> list[str]:
    """Sources with a share, be it less than a sample: re-weighting may raise it."""
    return [
        name
        for column, name in enumerate(plan.sources)
        if any(segment.shares[column] or segment.counts[column] for segment in plan.segments)
    ]


def make_stream(documents: SourceDocuments, packing: str) -> Stream:
    """The stream of a source under ``data.packing``."""
    return BestFit(documents) if packing == "best_fit" else Concatenated(documents)


class ValidationSource:
    """One pass over a source in file order, the same samples at every evaluation; the last one is padded.

    DataError where there is not even one token to predict.
    """

    def __init__(self, documents: SourceDocuments, seq_length: int) -> None:
        options = dataclasses.replace(documents.options, order="ordered", order_by=None)
        documents = SourceDocuments(documents.reader, documents.name, 0, options, documents.cache)
        self.name, self.seq_length = documents.name, seq_length
        self._stream = Concatenated(documents)
        self._samples = -(-(documents.tokens - 1) // seq_length)
        if self._samples < 1:
            raise DataError(
                f"{documents.reader.prefix}: validation source {self.name} has one token; there is none to predict"
            )

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of validation source {self.name} with {len(self)}")
        position = index * self.seq_length
        count = min(self.seq_length + 1, self._stream.documents.tokens - position)
        pieces = self._stream.pieces(position, count, self.seq_length)
        return read_sample(self._stream.documents.reader, pieces, self.seq_length)

    def seq_length_at(self, index: int) -> int:
        """The same for all."""
        return self.seq_length


class MockDataset:
    """Random tokens as a function of (seed, index): for benchmarks and layout tests."""

    def __init__(
        self,
        vocab_size: int,
        seq_length: int,
        num_samples: int,
        seed: int,
        plan: MixturePlan | None = None,
    ) -> None:
        self.vocab_size, self.seq_length, self.seed = vocab_size, seq_length, seed
        self.plan = plan
        self._num_samples = num_samples

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._num_samples:
            raise IndexError(f"sample {index} of {self._num_samples}")
        bits = np.random.Philox(key=np.array([self.seed % 2**64, index], dtype=np.uint64))
        words = bits.random_raw(self.seq_length + 1)
        return Sample((words % np.uint64(self.vocab_size)).astype(np.int64), _NO_ENDS, self.seq_length)

    def where(self, index: int) -> Where:
        """All of it is stage and source ``mock``, one document without an end."""
        start = index * self.seq_length
        return Where("mock", "mock", 0, [Range(0, start, start + self.seq_length)])

    def seq_length_at(self, index: int) -> int:
        """The same for all."""
        return self.seq_length

    def with_plan(self, plan: MixturePlan) -> MockDataset:
        """The same tokens under another plan."""
        return MockDataset(self.vocab_size, self.seq_length, plan.num_samples, self.seed, plan)

    def source_facts(self) -> dict[str, dict[str, Any]]:
        """There is no file to remember."""
        return {}


def batch_in_words(dataset: StagedDataset | MockDataset, first: int, count: int) -> str:
    """Which samples a global batch of ``count`` holds, for people: stage, and of the first few their documents."""
    most = 8
    found = [dataset.where(index) for index in range(first, first + min(count, most))]
    samples = []
    for number, at in enumerate(found):
        documents = [f"document {each.document} [{each.start}:{each.stop}]" for each in at.ranges[:4]]
        more = ["..."] if len(at.ranges) > 4 else []
        samples.append(f"{first + number}: {at.source}, {', '.join(documents + more)}")
    rest = f"; and {count - most} more" if count > most else ""
    return f"stage {found[0].stage}, samples {first} to {first + count - 1} ({'; '.join(samples)}{rest})"
