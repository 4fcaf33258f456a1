"""Pieces of bytes, cut anywhere, to blocks of whole lines; gzip and zstd unpacked on the way.

Memory is bounded by the longest line that is allowed: of a longer one only the beginning is kept, and compressed
bytes are unpacked in small pieces, so that a bomb is met by the limit of a line.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from megatron_syne.data.documents.jsonl import Line

# Fed to the unpackers at a time: gzip grows at most 1,032 fold, zstd 32,768 fold (a block of one repeated byte).
PIECE = {"gzip": 1 << 14, "zstd": 1 << 10}
_KEPT_OF_OVERLONG = 1 << 10


class Block(NamedTuple):
    """Consecutive whole lines of one input, as bytes: cheap to hand to another process."""

    first_line: int
    offset: int
    data: bytes
    length: int
    """Bytes of the input that the block stands for: more than ``data`` has for a single line above the limit."""
    limit: int
    plain: str = ""
    fault: str = ""

    def lines(self) -> list[Line]:
        """The lines of the block, newlines included."""
        if self.plain or self.fault or self.length > len(self.data):
            return [Line(self.first_line, self.offset, self.data, self.length, self.plain, self.fault)]
        lines, at = [], self.offset
        for number, raw in enumerate(io.BytesIO(self.data), self.first_line):
            length = len(raw)
            if length > self.limit + 1 or (length > self.limit and not raw.endswith(b"\n")):
                raw = raw[:_KEPT_OF_OVERLONG]
            lines.append(Line(number, at, raw, length))
            at += length
        return lines


class _Damaged(Exception):
    """A compressed file that cannot be unpacked further."""


def _unpacker(kind: Literal["gzip", "zstd"]) -> Any:
    if kind == "gzip":
        return zlib.decompressobj(wbits=31)
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj()


def unpacked(pieces: Iterator[bytes], kind: Literal["gzip", "zstd"], size: int) -> Iterator[bytes]:
    """Unpacked bytes, at least ``size`` at a time; members (gzip) and frames (zstd) follow one another."""
    unpacker = _unpacker(kind)
    held: list[bytes] = []
    filled, at, members = 0, 0, 0
    damage = ""
    try:
        for piece in pieces:
            at += len(piece)
            while piece:
                if unpacker is None:
                    if members and not piece.strip(b"\0"):
                        break  # padding, as tapes and gzip have it
                    unpacker = _unpacker(kind)
                data = unpacker.decompress(piece)
                held.append(data)
                filled += len(data)
                if filled >= size:
                    yield b"".join(held)
                    held, filled = [], 0
                piece = b""
                if unpacker.eof:
                    piece, unpacker, members = unpacker.unused_data, None, members + 1
    except Exception as error:  # zlib.error, zstandard.ZstdError
        if type(error).__name__ not in ("error", "ZstdError"):
            raise
        damage = f"damaged {kind} data near byte {at} of the file itself: {error}"
        for _ in pieces:  # the rest is hashed all the same
            pass
    if filled:
        yield b"".join(held)
    if not damage and unpacker is not None:
        damage = f"the {kind} data ends early, at byte {at} of the file itself: truncated?"
    if damage:
        raise _Damaged(damage)


def lines_of(pieces: Iterator[bytes], limit: int, offset: int) -> Iterator[Block]:
    """Pieces cut anywhere to blocks of whole lines; of a line above the limit only the beginning is kept."""
    held: list[bytes] = []
    number, size = 1, 0  # size: bytes since the last end of a line, held or not
    fault = ""
    try:
        for piece in pieces:
            first = piece.find(b"\n") + 1
            if first and size > limit:  # the end of an overlong line
                yield Block(number, offset, b"".join(held), size + first, limit)
                number, offset, held, size = number + 1, offset + size + first, [], 0
                piece = piece[first:]
            last = piece.rfind(b"\n") + 1
            if last:
                data = b"".join([*held, piece[:last]])
                yield Block(number, offset, data, len(data), limit)
                number, offset, held, size = number + data.count(b"\n"), offset + len(data), [], 0
                piece = piece[last:]
            if piece:
                size += len(piece)
                held.append(piece)
                if size > limit:
                    held = [b"".join(held)[:_KEPT_OF_OVERLONG]]
    except _Damaged as error:
        fault = str(error)
    if size or fault:
        yield Block(number, offset, b"".join(held), size, limit, fault=fault)


def whole_of(pieces: Iterator[bytes], limit: int, text_key: str) -> Block:
    """A file that is one document."""
    held: list[bytes] = []
    size, fault = 0, ""
    try:
        for piece in pieces:
            size += len(piece)
            held = [*held, piece] if size <= limit else [b"".join(held)[:_KEPT_OF_OVERLONG]]
    except _Damaged as error:
        fault = str(error)
    return Block(1, 0, b"".join(held), size, limit, text_key, fault)
