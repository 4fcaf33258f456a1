"""One source as a stream that never ends: position -> documents, epoch after epoch, by a pure function.

Concatenated: epoch 0's documents in epoch 0's order, then epoch 1's, ... with nothing dropped between; a position
is a token. Best fit: bins in place of documents, each as long as a sample however full it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_syne.config.schema import SourceConfig
from megatron_syne.data.mixture.ledger import source_options
from megatron_syne.data.tokens.index_cache import CachedArray, Entry, HeldEntry, IndexCache
from megatron_syne.data.tokens.orders import Documents, ordered_by, permutation, subset
from megatron_syne.data.tokens.packing import best_fit
from megatron_syne.data.tokens.reader import IndexedReader
from megatron_syne.errors import DataError

_GROUP = 64  # documents to one stored end
_EPOCHS_HELD = 2


class Range(NamedTuple):
    """Tokens ``start`` to ``stop`` (exclusive) of a document."""

    document: int
    start: int
    stop: int


class Piece(NamedTuple):
    """A range as a sample is put together from it."""

    range: Range
    ends: bool
    """Whether the document ends with it."""


class Stream(Protocol):
    """What samples are cut from."""

    documents: SourceDocuments

    def epoch_tokens(self, seq_length: int) -> int:
        """Positions of one epoch."""
        ...

    def pieces(self, position: int, count: int, seq_length: int) -> list[Piece]:
        """What stands at positions ``position`` to ``position + count``; ``count`` <= seq_length + 1."""
        ...


class SourceDocuments:
    """The documents of a source that are read, in the order of each epoch; ``options`` choose and order them."""

    def __init__(
        self, reader: IndexedReader, name: str, seed: int, options: SourceConfig, cache: IndexCache
    ) -> None:
        self.reader, self.name, self.seed, self.options, self.cache = reader, name, seed, options, cache
        self.count, self.tokens = reader.num_documents, reader.num_tokens
        self.fields()  # numbers that were not kept are missed now, and not at the first sample
        self._subset: HeldEntry | None = None
        if options.first_tokens is not None or options.top_fraction is not None:
            self._subset = cache.hold("subset", self.key(ordered=False), self._make_subset)
            self.count, self.tokens = self._subset.facts["documents"], self._subset.facts["tokens"]
        if self.tokens == 0:
            raise DataError(
                f"{reader.prefix}: the documents of source {name} that are to be read hold no token"
            )

    def fields(self, ordered: bool = True) -> dict[str, str]:
        """SHA-256 of the numbers that choose the documents and, with ``ordered``, order them."""
        names = [self.options.top_by] if self.options.top_fraction is not None else []
        if ordered and self.options.order == "ordered":
            names.append(self.options.order_by)
        return {name: self.reader.field_sha256(name) for name in names if name is not None}

    def key(self, ordered: bool = True) -> dict[str, Any]:
        """All that decides which documents are read and, with ``ordered``, their order, less seed and epoch."""
        options = source_options(self.options)
        if not ordered:
            options = {name: value for name, value in options.items() if not name.startswith("order")}
        digest = self.reader.idx_sha256()
        return {"idx_sha256": digest, "options": options, "fields": self.fields(ordered)}

    def _make_subset(self) -> Entry:
        options, values = self.options, None
        if options.top_fraction is not None and options.top_by is not None:
            values = self.reader.field(options.top_by)
        lengths = self.reader.document_lengths
        chosen = subset(
            lengths, options.first_tokens, options.top_fraction, values, options.top_is == "highest"
        )
        if chosen is None:
            chosen = np.arange(lengths.size, dtype=np.uint32)
        facts = {"documents": chosen.size, "tokens": int(lengths[chosen].sum(dtype=np.int64))}
        return Entry(facts, {"documents": CachedArray(chosen)})

    def chosen(self) -> Documents | None:
        """The documents that are read, in the order of the file; None = all."""
        return None if self._subset is None else self._subset.whole("documents")

    def sequence(self) -> Documents | None:
        """The documents in the order they are gone through before any shuffling; None = all, as they stand."""
        chosen = self.chosen()
        if self.options.order != "ordered" or self.options.order_by is None:
            return chosen
        values = self.reader.field(self.options.order_by)
        if chosen is None:
            return ordered_by(values)
        return chosen[ordered_by(values[chosen])]

    def shuffle(self, epoch: int, count: int) -> Documents | None:
        """The random order of an epoch; None where it is ordered."""
        if self.options.order == "ordered":
            return None
        return permutation(count, self.seed, self.name, epoch)

    def epoch_key(self, epoch: int) -> dict[str, Any]:
        """What decides the order of an epoch."""
        if self.options.order == "ordered":
            return self.key()
        return self.key() | {"seed": self.seed, "name": self.name, "epoch": epoch}

    def order(self, epoch: int) -> HeldEntry:
        """Documents in the epoch's order, their lengths, and the token at which every 64th begins."""
        return self.cache.hold("order", self.epoch_key(epoch), lambda: self._make_order(epoch))

    def _make_order(self, epoch: int) -> Entry:
        documents, shuffled = self.sequence(), self.shuffle(epoch, self.count)
        if documents is None:
            documents = shuffled if shuffled is not None else np.arange(self.count, dtype=np.uint32)
        elif shuffled is not None:
            documents = documents[shuffled]
        lengths = self.reader.document_lengths[documents].astype("<i4")
        sums = np.add.reduceat(lengths, np.arange(0, lengths.size, _GROUP), dtype=np.int64)
        arrays = {"begins": np.append(0, np.cumsum(sums)), "documents": documents, "lengths": lengths}
        return Entry({}, {name: CachedArray(values) for name, values in arrays.items()})


class Concatenated:
    """Documents one after another, whatever the sequence length."""

    def __init__(self, documents: SourceDocuments) -> None:
        self.documents = documents
        self._orders: dict[int, tuple[HeldEntry, NDArray[Any]]] = {}

    def epoch_tokens(self, seq_length: int) -> int:
        """Tokens of the documents."""
        return self.documents.tokens

    def pieces(self, position: int, count: int, seq_length: int) -> list[Piece]:
        """What stands at positions ``position`` to ``position + count``; ``count`` <= seq_length + 1."""
        found: list[Piece] = []
        while count:
            epoch, within = divmod(position, self.documents.tokens)
            order, begins = self._order(epoch)
            group = int(begins.searchsorted(within, side="right")) - 1
            first, last = group * _GROUP, min((group + 1) * _GROUP, self.documents.count)
            lengths = order.read("lengths", first, last)
            numbers = order.read("documents", first, last)
            ends = lengths.cumsum(dtype=np.int64)
            ends += begins[group]
            at = int(ends.searchsorted(within, side="right"))
            for number, length, end in zip(
                numbers[at:].tolist(), lengths[at:].tolist(), ends[at:].tolist(), strict=True
            ):
                if length == 0:
                    continue
                start = length - (end - within)
                stop = min(length, start + count)
                found.append(Piece(Range(number, start, stop), stop == length))
                taken = stop - start
                position, within, count = position + taken, within + taken, count - taken
                if not count:
                    break
        return found

    def _order(self, epoch: int) -> tuple[HeldEntry, NDArray[Any]]:
        found = self._orders.get(epoch)
        if found is None:
            entry = self.documents.order(epoch)
            found = (entry, entry.whole("begins"))
            kept = sorted(self._orders)[-(_EPOCHS_HELD - 1) :]
            self._orders = {**{key: self._orders[key] for key in kept}, epoch: found}
        return found


class BestFit:
    """Whole documents fitted into bins as long as a sample; each sequence length has its own bins."""

    def __init__(self, documents: SourceDocuments) -> None:
        self.documents = documents
        self._bins: dict[int, HeldEntry] = {}
        self._orders: dict[tuple[int, int], HeldEntry] = {}

    def bins(self, seq_length: int) -> HeldEntry:
        """The bins of a sequence length (facts: ``bins``, ``fill`` = share of them that is no padding)."""
        found = self._bins.get(seq_length)
        if found is None:
            key = self.documents.key() | {"capacity": seq_length}
            found = self.documents.cache.hold("bins", key, lambda: self._make_bins(seq_length))
            self._bins[seq_length] = found
        return found

    def _make_bins(self, seq_length: int) -> Entry:
        sequence = self.documents.sequence()
        lengths = self.documents.reader.document_lengths
        bins = best_fit(lengths if sequence is None else lengths[sequence], seq_length)
        numbers = bins.documents if sequence is None else sequence[bins.documents]
        count = bins.starts.size - 1
        facts = {"bins": count, "fill": self.documents.tokens / (count * seq_length)}
        arrays: dict[str, NDArray[Any]] = {"starts": bins.starts, "documents": numbers, "pieces": bins.pieces}
        return Entry(facts, {name: CachedArray(values) for name, values in arrays.items()})

    def epoch_tokens(self, seq_length: int) -> int:
        """Bins x sequence length: padding counts."""
        return int(self.bins(seq_length).facts["bins"]) * seq_length

    def pieces(self, position: int, count: int, seq_length: int) -> list[Piece]:
        """The bin that ``position`` falls in; a whole piece of a longer document goes on by one token if asked."""
        bins = self.bins(seq_length)
        epoch, number = divmod(position // seq_length, bins.facts["bins"])
        if self.documents.options.order != "ordered":
            number = int(self._order(epoch, seq_length).read("bins", number, number + 1)[0])
        begin, end = bins.read("starts", number, number + 2).tolist()
        found = []
        for document, piece in zip(
            bins.read("documents", begin, end).tolist(), bins.read("pieces", begin, end).tolist(), strict=True
        ):
            length = self.documents.reader.document_length(document)
            start = piece * seq_length
            stop = min(length, start + count)
            if end - begin > 1:
                stop = min(stop, start + seq_length)
            found.append(Piece(Range(document, start, stop), stop == length))
        return found

    def _order(self, epoch: int, seq_length: int) -> HeldEntry:
        found = self._orders.get((epoch, seq_length))
        if found is None:
            count = self.bins(seq_length).facts["bins"]
            key = self.documents.epoch_key(epoch) | {"capacity": seq_length}

            def make() -> Entry:
                order = self.documents.shuffle(epoch, count)
                assert order is not None
                return Entry({}, {"bins": CachedArray(order)})

            found = self.documents.cache.hold("bin_order", key, make)
            kept = sorted(self._orders)[-(_EPOCHS_HELD - 1) :]
            self._orders = {**{key: self._orders[key] for key in kept}, (epoch, seq_length): found}
        return found
