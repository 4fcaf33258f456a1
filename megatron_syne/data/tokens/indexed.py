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
import os
import struct
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

IDX_MAGIC = b"MMIDIDX\x00\x00"
IDX_HEADER = struct.Struct("<9sQBQQ")
IDX_HEADER_BYTES = IDX_HEADER.size
TOKEN_CODES: dict[int, np.dtype[Any]] = {8: np.dtype("<u2"), 4: np.dtype("<i4")}
_BLOCK = 1 << 20


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Smallest type of a token, by megatron-core's rule (``DType.optimal_dtype``)."""
    return TOKEN_CODES[8] if vocab_size < 65500 else TOKEN_CODES[4]


class IndexedWriter:
    """Write documents to a ``.bin`` and its ``.idx``, both open for writing and reading (``r+b``, ``w+b``).

    Memory does not grow with the documents: their lengths go straight to their place in the index, and
    ``finish`` reads them back for what follows there.
    """

    def __init__(self, bin_stream: BinaryIO, idx_stream: BinaryIO, dtype: np.dtype[Any]) -> None:
        self._bin, self._idx, self._dtype = bin_stream, idx_stream, dtype
        self._digest = hashlib.sha256()
        self._idx.write(bytes(IDX_HEADER.size))  # no reader takes it for an index before ``finish``
        self.tokens = 0
        self.documents = 0

    def add(self, tokens: NDArray[Any], lengths: NDArray[Any]) -> None:
        """Append documents given as their concatenated tokens and their lengths (one sequence each)."""
        assert int(lengths.sum()) == tokens.size
        self.add_tokens(np.ascontiguousarray(tokens, dtype=self._dtype).tobytes())
        self.add_lengths(lengths)

    def add_tokens(self, data: bytes) -> None:
        """Append to the ``.bin`` alone; ``add_lengths`` must make it good."""
        self._bin.write(data)
        self._digest.update(data)
        self.tokens += len(data) // self._dtype.itemsize

    def add_lengths(self, lengths: NDArray[Any]) -> None:
        """Append to the ``.idx`` alone."""
        self._idx.write(np.ascontiguousarray(lengths, dtype="<i4").tobytes())
        self.documents += len(lengths)

    def bin_sha256(self) -> str:
        """SHA-256 of the ``.bin`` so far."""
        return self._digest.hexdigest()

    def resume(self, tokens: int, documents: int) -> None:
        """Go on behind so much of what both files already hold; the rest of them is cut off."""
        self.tokens, self.documents = tokens, documents
        self._idx.seek(IDX_HEADER.size + 4 * documents)
        self._idx.truncate()
        self._digest = hashlib.sha256()
        self._bin.seek(0)
        left = tokens * self._dtype.itemsize
        while block := self._bin.read(min(_BLOCK, left)):
            self._digest.update(block)
            left -= len(block)
        self._bin.truncate()

    def finish(self) -> dict[str, dict[str, Any]]:
        """Write the index; returns size and SHA-256 of both files, as the manifest has them."""
        count, item = self.documents, self._dtype.itemsize
        code = next(code for code, dtype in TOKEN_CODES.items() if dtype == self._dtype)
        header = IDX_HEADER.pack(IDX_MAGIC, 1, code, count, count + 1)
        digest = hashlib.sha256(header)
        for begin in range(0, count, _BLOCK):
            digest.update(self._lengths(begin).tobytes())
        at = 0
        for begin in range(0, count, _BLOCK):
            ends = at + np.cumsum(self._lengths(begin), dtype=np.int64) * item
            self._put(np.concatenate(([at], ends[:-1])).astype("<i8").tobytes(), digest)
            at = int(ends[-1])
        assert at == self.tokens * item
        for begin in range(0, count + 1, _BLOCK):
            self._put(np.arange(begin, min(begin + _BLOCK, count + 1), dtype="<i8").tobytes(), digest)
        size = self._idx.seek(0, os.SEEK_END)
        self._idx.seek(0)
        self._idx.write(header)
        self._idx.seek(0, os.SEEK_END)
        return {
            "bin": {"bytes": at, "sha256": self._digest.hexdigest()},
            "idx": {"bytes": size, "sha256": digest.hexdigest()},
        }

    def _lengths(self, begin: int) -> NDArray[np.int32]:
        self._idx.seek(IDX_HEADER.size + 4 * begin)
        return np.frombuffer(self._idx.read(4 * min(_BLOCK, self.documents - begin)), dtype="<i4")

    def _put(self, data: bytes, digest: hashlib._Hash) -> None:
        self._idx.seek(0, os.SEEK_END)
        self._idx.write(data)
        digest.update(data)
