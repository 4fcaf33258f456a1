"""Token files, read: opened without loading them, checked whole once, damage named."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_syne.data.tokens.index_cache import Entry, IndexCache, OpenFile
from megatron_syne.data.tokens.index_check import IndexArrays, check_index, document_extents
from megatron_syne.data.tokens.indexed import IDX_HEADER, IDX_MAGIC, TOKEN_CODES
from megatron_syne.data.tokens.manifest import file_sha256, read_manifest, require_file
from megatron_syne.errors import DataError

_BLOCK = 1 << 20


class IndexedReader:
    """Documents of one prefix; the index is mapped, tokens are read as they are asked for.

    Opening checks all but the tokens. What has to read the whole index is remembered in ``cache``, with the SHA-256
    of the ``.idx`` then held to the manifest too; without a cache it is done at every opening. Raises MissingInput
    where a file is absent, DataError (file, expected, found) where the files are damaged or do not belong together.
    ``require_manifest=False`` opens files made by other tools.
    """

    def __init__(
        self, prefix: str | Path, require_manifest: bool = True, cache: IndexCache | None = None
    ) -> None:
        self.prefix = str(prefix)
        self.bin_path, self.idx_path, self.manifest_path = (
            Path(self.prefix + suffix) for suffix in (".bin", ".idx", ".json")
        )
        for file in (self.bin_path, self.idx_path):
            require_file(file, "tokenise the source with tools/prepare_data.py")
        self._cache = cache or IndexCache(None)
        self._bin = OpenFile(self.bin_path)
        self._idx = OpenFile(self.idx_path)
        self._bin_bytes = os.fstat(self._bin.descriptor).st_size
        index = self._map_index()
        self.manifest: dict[str, Any] | None = None
        if require_manifest or self.manifest_path.exists():
            self.manifest = read_manifest(self.manifest_path)
        facts = self._cache.entry("index", self._identity(), lambda: Entry(self._check())).facts
        self._idx_sha256: str | None = facts.get("idx_sha256")
        self.num_tokens: int = facts["tokens"]
        self.num_documents: int = facts["documents"]
        if self.manifest is not None:
            self._compare_manifest(self.manifest)
        self.document_lengths: NDArray[Any] = index.lengths
        """Tokens of each document, its EOS included; mapped."""
        self._starts: NDArray[np.int64] | None = None
        if not facts["plain"]:
            self._starts, self.document_lengths = document_extents(index)
        self._limit: int | None = None

    def _map_index(self) -> IndexArrays:
        idx, size = self.idx_path, os.path.getsize(self.idx_path)
        with open(idx, "rb") as stream:
            header = stream.read(IDX_HEADER.size)
        if len(header) < IDX_HEADER.size:
            raise DataError(f"{idx}: truncated: {size} bytes, the header alone has {IDX_HEADER.size}")
        magic, version, code, sequences, boundaries = IDX_HEADER.unpack(header)
        if magic != IDX_MAGIC:
            raise DataError(f"{idx}: not an index: starts with {magic!r}, expected {IDX_MAGIC!r}")
        if version != 1:
            raise DataError(f"{idx}: version {version}; this program reads version 1")
        if code not in TOKEN_CODES:
            raise DataError(f"{idx}: token type {code}; expected 8 (uint16) or 4 (int32)")
        expected = IDX_HEADER.size + 12 * sequences + 8 * boundaries
        if size != expected:
            raise DataError(
                f"{idx}: {size} bytes, expected {expected} for {sequences} sequences and {boundaries} "
                f"document boundaries: truncated or damaged; prepare it again"
            )
        self.dtype = TOKEN_CODES[code]
        at = IDX_HEADER.size
        # As plain arrays: a memmap's own indexing costs ten times as much
        lengths, pointers, bounds = (
            np.memmap(idx, kind, "r", begin, (count,)).view(np.ndarray) if count else np.zeros(0, kind)
            for kind, begin, count in (
                ("<i4", at, sequences),
                ("<i8", at + 4 * sequences, sequences),
                ("<i8", at + 12 * sequences, boundaries),
            )
        )
        return IndexArrays(lengths, pointers, bounds, self.dtype.itemsize)

    def _identity(self) -> dict[str, Any]:
        """What is the same as long as nobody touches the files."""
        states = [os.stat(path) for path in (self.bin_path, self.idx_path)]
        return {
            "path": os.path.abspath(self.prefix),
            "files": [[state.st_size, state.st_mtime_ns, state.st_ino] for state in states],
            "manifest": None if self.manifest is None else file_sha256(self.manifest_path),
        }

    def _check(self) -> dict[str, Any]:
        # a mapping of its own: all that it has touched is let go with it
        facts = check_index(self._map_index(), self.idx_path, self.bin_path, self._bin_bytes)
        if self._cache.folder is not None:
            facts["idx_sha256"] = file_sha256(self.idx_path)
            if self.manifest is not None:
                self._hold_to_manifest("idx", self.idx_path, facts["idx_sha256"])
        return facts

    def _compare_manifest(self, manifest: dict[str, Any]) -> None:
        for name, expected, found in (
            ("dtype", manifest["dtype"], self.dtype.name),
            ("counts.documents", manifest["counts"]["documents"], self.num_documents),
            ("counts.tokens", manifest["counts"]["tokens"], self.num_tokens),
            ("files.bin.bytes", manifest["files"]["bin"]["bytes"], self._bin_bytes),
            ("files.idx.bytes", manifest["files"]["idx"]["bytes"], os.path.getsize(self.idx_path)),
        ):
            if expected != found:
                raise DataError(
                    f"{self.manifest_path}: {name} says {expected}, the files beside it have {found}; they "
                    f"do not belong together, prepare them again"
                )

    def _hold_to_manifest(self, name: str, path: Path, found: str) -> None:
        assert self.manifest is not None
        expected = self.manifest["files"][name]["sha256"]
        if expected != found:
            raise DataError(f"{path}: SHA-256 is {found}, the manifest says {expected}: damaged or changed")

    def check_vocab(self, vocab_size: int) -> None:
        """Refuse (DataError) a tokenizer, or tokens, that an embedding of ``vocab_size`` rows cannot hold.

        From then on :meth:`read` holds every token to it, which catches damage inside the ``.bin`` too.
        """
        highest = self.manifest["max_token_id"] if self.manifest else self._scanned()["highest"]
        tokenizer = self.manifest["tokenizer"]["vocab_size"] if self.manifest else highest + 1
        if max(highest + 1, tokenizer) > vocab_size:
            raise DataError(
                f"{self.bin_path}: tokenised with a vocabulary of {tokenizer} (highest token id {highest}), but "
                f"the model's embedding has {vocab_size} rows; prepare the data with the model's own tokenizer"
            )
        self._limit = vocab_size

    def _scanned(self) -> dict[str, Any]:
        """What no manifest tells, from one pass over the ``.bin``, remembered in the cache."""
        return self._cache.entry("tokens", self._identity(), lambda: Entry(self._scan())).facts

    def _scan(self) -> dict[str, Any]:
        digest, highest = hashlib.sha256(), 0
        for begin in range(0, self.num_tokens, _BLOCK):
            tokens = self.read(begin, min(_BLOCK, self.num_tokens - begin))
            if int(tokens.min()) < 0:
                raise DataError(f"{self.bin_path}: negative token id near token {begin}; damaged")
            highest = max(highest, int(tokens.max()))
            digest.update(tokens.tobytes())
        return {"highest": highest, "bin_sha256": digest.hexdigest()}

    def document_start(self, document: int) -> int:
        """Token of the file at which a document begins.

        Not by the mapping: a page that is touched maps its neighbours too, which at a hundred million documents
        adds up to gigabytes.
        """
        if self._starts is not None:
            return int(self._starts[document])
        at = IDX_HEADER.size + 4 * len(self.document_lengths) + 8 * document
        return int.from_bytes(os.pread(self._idx.descriptor, 8, at), "little") // self.dtype.itemsize

    def document_length(self, document: int) -> int:
        """Tokens of a document; not by the mapping either."""
        if self._starts is not None:
            return int(self.document_lengths[document])
        return int.from_bytes(os.pread(self._idx.descriptor, 4, IDX_HEADER.size + 4 * document), "little")

    def read(self, start: int, count: int) -> NDArray[Any]:
        """``count`` tokens from token ``start`` of the file; DataError, OSError."""
        tokens = np.empty(count, self.dtype)
        if count:
            self.read_into(start, memoryview(tokens).cast("B"))  # type: ignore[arg-type]
            self.check_tokens(tokens, start)
        return tokens

    def read_into(self, start: int, view: memoryview) -> None:
        """Fill the bytes of a view from token ``start`` on, values not checked.

        ``pread`` and no mapping: an I/O fault or a file cut short is an error here, and not a signal.
        """
        at = start * self.dtype.itemsize
        while (got := os.preadv(self._bin.descriptor, [view], at)) < view.nbytes:
            if got == 0:
                raise DataError(f"{self.bin_path}: ends at byte {at}; cut short since it was opened")
            at, view = at + got, view[got:]

    def check_tokens(self, tokens: NDArray[Any], near: int) -> None:
        """Hold tokens that were read to the vocabulary of :meth:`check_vocab` (DataError)."""
        if self._limit is not None and tokens.size:
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self._limit:
                raise DataError(
                    f"{self.bin_path}: token id {high if low >= 0 else low} near token {near} is outside "
                    f"the vocabulary of {self._limit}; the file is damaged, prepare it again"
                )

    def document(self, index: int) -> NDArray[Any]:
        """Tokens of one document, its EOS last."""
        return self.read(self.document_start(index), self.document_length(index))

    def field(self, name: str) -> NDArray[np.float64]:
        """A number kept with each document (``prepare_data.py --keep``), mapped and held to its SHA-256."""
        expected = self.field_sha256(name)
        path = Path(f"{self.prefix}.{name}.npy")
        require_file(path, "prepare the source again")
        if (found := file_sha256(path)) != expected:
            raise DataError(f"{path}: SHA-256 is {found}, the manifest says {expected}: damaged or changed")
        try:
            values = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise DataError(f"{path}: not an array of numbers: {error}") from None
        if values.dtype != np.float64 or values.shape != (self.num_documents,) or np.isnan(values).any():
            raise DataError(
                f"{path}: must hold one number (float64) for each of {self.num_documents} documents"
            )
        return values.view(np.ndarray)  # type: ignore[no-any-return]

    def field_sha256(self, name: str) -> str:
        """SHA-256 of the numbers kept under a name, as the manifest records it; DataError where there are none."""
        fields = (self.manifest or {}).get("fields")
        fields = fields if isinstance(fields, dict) else {}
        record = fields.get(name) if re.fullmatch(r"\w[\w.-]*", name) else None
        if not isinstance(record, dict) or not isinstance(record.get("sha256"), str):
            raise DataError(
                f"{self.prefix}: no number {name!r} is kept with its documents (kept: "
                f"{', '.join(sorted(fields)) or 'none'}); prepare it again with --keep {name}"
            )
        return str(record["sha256"])

    @property
    def eos_id(self) -> int:
        """What pads a sample: EOS, as the manifest names it; 0 where there is none (padding weighs nothing)."""
        eos = (self.manifest or {}).get("tokenizer", {}).get("eos_id")
        return eos if isinstance(eos, int) else 0

    def bin_sha256(self) -> str:
        """SHA-256 of the ``.bin`` as the manifest records it; read from the file where there is none."""
        if self.manifest is not None:
            return str(self.manifest["files"]["bin"]["sha256"])
        return str(self._scanned()["bin_sha256"])

    def idx_sha256(self) -> str:
        """The same of the ``.idx``."""
        if self.manifest is not None:
            return str(self.manifest["files"]["idx"]["sha256"])
        if self._idx_sha256 is None:
            self._idx_sha256 = file_sha256(self.idx_path)
        return self._idx_sha256

    def verify(self) -> None:
        """Read both files whole and hold them to the manifest's SHA-256 (DataError)."""
        if self.manifest is None:
            raise DataError(f"{self.manifest_path}: no manifest to verify against")
        for name, path in (("bin", self.bin_path), ("idx", self.idx_path)):
            self._hold_to_manifest(name, path, file_sha256(path))
