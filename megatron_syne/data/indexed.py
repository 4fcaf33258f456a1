"""Token files: megatron-core's ``.bin/.idx`` format, plus the ``.json`` manifest that describes them.

``.bin`` holds the token ids of all documents one after another. ``.idx`` holds, little-endian::

    9 bytes   "MMIDIDX\\0\\0"
    uint64    version, 1
    uint8     type of a token: 8 = uint16, 4 = int32
    uint64    S = number of sequences
    uint64    D = number of document boundaries (documents + 1)
    int32[S]  tokens of each sequence
    int64[S]  byte of the .bin at which each sequence begins
    int64[D]  first sequence of each document, then S

What is written here is byte-identical with megatron-core's ``IndexedDatasetBuilder``, and either side reads
the other's files; written again so that preparing and planning need neither torch nor megatron-core.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
from array import array
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_syne.errors import DataError, MissingInput

MANIFEST_FORMAT = "megatron_syne.tokens"
MANIFEST_VERSION = 1

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_CODES: dict[int, np.dtype[Any]] = {8: np.dtype("<u2"), 4: np.dtype("<i4")}
_BLOCK = 1 << 20
_MAX_MANIFEST_BYTES = 1 << 26


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Smallest type of a token, by megatron-core's rule (``DType.optimal_dtype``)."""
    return _CODES[8] if vocab_size < 65500 else _CODES[4]


class IndexedWriter:
    """Write documents to an open ``.bin`` and, at ``finish``, their index to an open ``.idx``."""

    def __init__(self, bin_stream: BinaryIO, idx_stream: BinaryIO, dtype: np.dtype[Any]) -> None:
        self._bin, self._idx, self._dtype = bin_stream, idx_stream, dtype
        self._lengths = array("i")
        self._bin_digest, self._idx_digest = hashlib.sha256(), hashlib.sha256()
        self.tokens = 0

    @property
    def documents(self) -> int:
        """Documents written so far."""
        return len(self._lengths)

    def add(self, tokens: NDArray[Any], lengths: NDArray[Any]) -> None:
        """Append documents given as their concatenated tokens and their lengths (one sequence each)."""
        assert int(lengths.sum()) == tokens.size
        data = np.ascontiguousarray(tokens, dtype=self._dtype).tobytes()
        self._bin.write(data)
        self._bin_digest.update(data)
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())
        self.tokens += tokens.size

    def finish(self) -> dict[str, dict[str, Any]]:
        """Write the index; returns size and SHA-256 of both files, as the manifest has them."""
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        code = next(code for code, dtype in _CODES.items() if dtype == self._dtype)
        size = self._put(_HEADER.pack(_MAGIC, 1, code, len(lengths), len(lengths) + 1))
        for begin in range(0, len(lengths), _BLOCK):
            size += self._put(lengths[begin : begin + _BLOCK].astype("<i4").tobytes())
        at = 0
        for begin in range(0, len(lengths), _BLOCK):
            ends = at + np.cumsum(lengths[begin : begin + _BLOCK], dtype=np.int64) * self._dtype.itemsize
            size += self._put(np.concatenate(([at], ends[:-1])).astype("<i8").tobytes())
            at = int(ends[-1])
        for begin in range(0, len(lengths) + 1, _BLOCK):
            end = min(begin + _BLOCK, len(lengths) + 1)
            size += self._put(np.arange(begin, end, dtype="<i8").tobytes())
        return {
            "bin": {"bytes": self.tokens * self._dtype.itemsize, "sha256": self._bin_digest.hexdigest()},
            "idx": {"bytes": size, "sha256": self._idx_digest.hexdigest()},
        }

    def _put(self, data: bytes) -> int:
        self._idx.write(data)
        self._idx_digest.update(data)
        return len(data)


class IndexedReader:
    """Documents of one prefix, memory-mapped; everything that can be checked without reading the ``.bin`` is.

    Raises MissingInput where a file is absent, DataError (file, expected, found) where the three files are
    damaged or do not belong together. ``require_manifest=False`` opens files made by other tools.
    """

    def __init__(self, prefix: str | Path, require_manifest: bool = True) -> None:
        self.prefix = str(prefix)
        self.bin_path, self.idx_path, self.manifest_path = (
            Path(self.prefix + suffix) for suffix in (".bin", ".idx", ".json")
        )
        for file in (self.bin_path, self.idx_path):
            _require_file(file, "tokenise the source with tools/prepare_data.py")
        self._open_index()
        self.manifest: dict[str, Any] | None = None
        if require_manifest or self.manifest_path.exists():
            self.manifest = read_manifest(self.manifest_path)
            self._compare_manifest(self.manifest)
        self._limit: int | None = None
        self._tokens = np.memmap(self.bin_path, dtype=self.dtype, mode="r")

    def _open_index(self) -> None:
        idx, size = self.idx_path, os.path.getsize(self.idx_path)
        with open(idx, "rb") as stream:
            header = stream.read(_HEADER.size)
        if len(header) < _HEADER.size:
            raise DataError(f"{idx}: truncated: {size} bytes, the header alone has {_HEADER.size}")
        magic, version, code, sequences, boundaries = _HEADER.unpack(header)
        if magic != _MAGIC:
            raise DataError(f"{idx}: not an index: starts with {magic!r}, expected {_MAGIC!r}")
        if version != 1:
            raise DataError(f"{idx}: version {version}; this program reads version 1")
        if code not in _CODES:
            raise DataError(f"{idx}: token type {code}; expected 8 (uint16) or 4 (int32)")
        expected = _HEADER.size + 12 * sequences + 8 * boundaries
        if size != expected:
            raise DataError(
                f"{idx}: {size} bytes, expected {expected} for {sequences} sequences and {boundaries} "
                f"document boundaries: truncated or damaged; prepare it again"
            )
        self.dtype = _CODES[code]
        at = _HEADER.size
        lengths = np.memmap(idx, "<i4", "r", at, (sequences,)) if sequences else np.zeros(0, "<i4")
        pointers = np.memmap(idx, "<i8", "r", at + 4 * sequences, (sequences,)) if sequences else lengths
        bounds = np.memmap(idx, "<i8", "r", at + 12 * sequences, (boundaries,)) if boundaries else lengths
        self._check_index(lengths, pointers, bounds)

    def _check_index(self, lengths: NDArray[Any], pointers: NDArray[Any], bounds: NDArray[Any]) -> None:
        """Lengths and pointers say the same thing twice: any single damage shows as a contradiction."""
        bin_bytes, item = os.path.getsize(self.bin_path), self.dtype.itemsize
        if lengths.size and int(lengths.min()) < 0:
            raise DataError(
                f"{self.idx_path}: sequence {int(lengths.argmin())} has a negative length; damaged"
            )
        ends = np.cumsum(lengths, dtype=np.int64) * item
        wrong = np.flatnonzero(pointers != ends - lengths.astype(np.int64) * item)
        if wrong.size:
            first = int(wrong[0])
            raise DataError(
                f"{self.idx_path}: sequence {first} points to byte {int(pointers[first])}, but the sequences "
                f"before it end at {int(ends[first]) - int(lengths[first]) * item}; damaged, prepare it again"
            )
        total = int(ends[-1]) if ends.size else 0
        if total != bin_bytes:
            raise DataError(
                f"{self.bin_path}: {bin_bytes} bytes, but its index describes {total}: truncated, or the two "
                f"files are not a pair; prepare them again"
            )
        if total == 0:
            raise DataError(f"{self.bin_path}: holds no token")
        if bounds.size < 2 or bounds[0] != 0 or bounds[-1] != lengths.size or np.any(np.diff(bounds) < 0):
            raise DataError(
                f"{self.idx_path}: document boundaries must rise from 0 to {lengths.size}; damaged"
            )
        starts = np.append(pointers, total) // item
        if bounds.size == lengths.size + 1 and np.array_equal(bounds, np.arange(bounds.size)):
            self.document_starts: NDArray[np.int64] = starts[:-1]
        else:  # several sequences to a document: other tools cut documents into sentences
            self.document_starts = starts[bounds[:-1]]
        self.document_lengths: NDArray[np.int64] = np.diff(np.append(self.document_starts, total // item))
        self.num_tokens = total // item
        self.num_documents = int(bounds.size) - 1

    def _compare_manifest(self, manifest: dict[str, Any]) -> None:
        for name, expected, found in (
            ("dtype", manifest["dtype"], self.dtype.name),
            ("counts.documents", manifest["counts"]["documents"], self.num_documents),
            ("counts.tokens", manifest["counts"]["tokens"], self.num_tokens),
            ("files.bin.bytes", manifest["files"]["bin"]["bytes"], os.path.getsize(self.bin_path)),
            ("files.idx.bytes", manifest["files"]["idx"]["bytes"], os.path.getsize(self.idx_path)),
        ):
            if expected != found:
                raise DataError(
                    f"{self.manifest_path}: {name} says {expected}, the files beside it have {found}; they "
                    f"do not belong together, prepare them again"
                )

    def check_vocab(self, vocab_size: int) -> None:
        """Refuse (DataError) a tokenizer, or tokens, that an embedding of ``vocab_size`` rows cannot hold.

        From then on :meth:`read` holds every token to it, which catches damage inside the ``.bin`` too.
        """
        highest = self.manifest["max_token_id"] if self.manifest else self._scan_highest()
        tokenizer = self.manifest["tokenizer"]["vocab_size"] if self.manifest else highest + 1
        if max(highest + 1, tokenizer) > vocab_size:
            raise DataError(
                f"{self.bin_path}: tokenised with a vocabulary of {tokenizer} (highest token id {highest}), but "
                f"the model's embedding has {vocab_size} rows; prepare the data with the model's own tokenizer"
            )
        self._limit = vocab_size

    def _scan_highest(self) -> int:
        blocks = range(0, self.num_tokens, _BLOCK)
        return max(int(self._tokens[begin : begin + _BLOCK].max()) for begin in blocks)

    def read(self, start: int, count: int) -> NDArray[Any]:
        """``count`` tokens from token ``start`` of the file, as a view of the mapped memory."""
        tokens = self._tokens[start : start + count]
        assert tokens.size == count, f"{self.bin_path}: tokens {start}..{start + count} of {self.num_tokens}"
        if self._limit is not None and count:
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self._limit:
                raise DataError(
                    f"{self.bin_path}: token id {high if low >= 0 else low} near token {start} is outside "
                    f"the vocabulary of {self._limit}; the file is damaged, prepare it again"
                )
        return tokens

    def document(self, index: int) -> NDArray[Any]:
        """Tokens of one document, its EOS last."""
        return self.read(int(self.document_starts[index]), int(self.document_lengths[index]))

    def bin_sha256(self) -> str:
        """SHA-256 of the ``.bin`` as the manifest records it; read from the file where there is none."""
        if self.manifest is not None:
            return str(self.manifest["files"]["bin"]["sha256"])
        return file_sha256(self.bin_path)

    def verify(self) -> None:
        """Read both files whole and hold them to the manifest's SHA-256 (DataError)."""
        if self.manifest is None:
            raise DataError(f"{self.manifest_path}: no manifest to verify against")
        for name, path in (("bin", self.bin_path), ("idx", self.idx_path)):
            expected, found = self.manifest["files"][name]["sha256"], file_sha256(path)
            if expected != found:
                raise DataError(
                    f"{path}: SHA-256 is {found}, the manifest says {expected}: damaged or changed"
                )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


_FIELDS: dict[str, type] = {
    "dtype": str,
    "max_token_id": int,
    "counts.documents": int,
    "counts.tokens": int,
    "tokenizer.vocab_size": int,
    "tokenizer.fingerprint": str,
    "files.bin.bytes": int,
    "files.bin.sha256": str,
    "files.idx.bytes": int,
    "files.idx.sha256": str,
}


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, with the fields that are used checked for presence and type (MissingInput, DataError)."""
    _require_file(
        path, "the preparation did not finish, or another tool made these files; prepare them again"
    )
    if (size := path.stat().st_size) > _MAX_MANIFEST_BYTES:
        raise DataError(f"{path}: {size} bytes is no manifest (limit {_MAX_MANIFEST_BYTES})")
    try:
        manifest = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        raise DataError(f"{path}: not a manifest of prepared tokens (format {MANIFEST_FORMAT!r} expected)")
    if manifest.get("version") != MANIFEST_VERSION:
        raise DataError(
            f"{path}: version {manifest.get('version')!r}; this program reads {MANIFEST_VERSION}; "
            f"prepare it again"
        )
    for field, kind in _FIELDS.items():
        value: Any = manifest
        for part in field.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if type(value) is not kind:
            raise DataError(f"{path}: field {field} must be a {kind.__name__}, found {value!r}")
    return manifest


def _require_file(path: Path, remedy: str) -> None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise MissingInput(f"{path}: {error.strerror}; {remedy}") from None
    if not stat.S_ISREG(mode):
        raise DataError(f"{path}: not a regular file")
