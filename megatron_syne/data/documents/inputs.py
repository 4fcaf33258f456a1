"""Files of documents, read once as blocks of lines: JSONL, plain text, parquet; gzip, zstd; folders; stdin.

What a file is comes from its first bytes (gzip, zstd, parquet) and from ``.txt`` in its name (plain text: the
file is one document); everything else is JSONL. Memory is bounded by the longest line that is allowed, whatever
the file: compressed bytes are unpacked in small pieces, so that a bomb is met by the limit of a line.
Nothing depends on how a file is cut into blocks, so any number of workers sees the same lines.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from megatron_syne.data.documents.blocks import PIECE, Block, lines_of, unpacked, whole_of
from megatron_syne.data.documents.jsonl import MAX_LINE_BYTES, Line
from megatron_syne.errors import ConfigError, DataError, MissingInput

BLOCK_BYTES = 1 << 20
STDIN = "-"

_KINDS = (".jsonl", ".ndjson", ".json", ".txt", ".parquet")
_PACKED = (".gz", ".zst")
_GZIP, _ZSTD, _PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
_UNREAD = {b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
_HEAD_BYTES = 6


def find_inputs(paths: Sequence[str | Path], report: Callable[[str], None] | None = None) -> list[str]:
    """The files that ``paths`` name, in order; a folder stands for the files below it, sorted by path.

    Of a folder only names in ``.jsonl``, ``.ndjson``, ``.json``, ``.txt`` (each also ``.gz`` or ``.zst``) and
    ``.parquet`` are taken; others are told to ``report``, hidden ones and those in ``_`` passed over in silence.
    ``-`` is the standard input. Raises MissingInput for what does not exist and for a folder without inputs.
    """
    files: list[str] = []
    for path in map(str, paths):
        if path == STDIN or not os.path.isdir(path):
            files.append(path)
            continue
        found: list[str] = []
        others: list[str] = []
        for folder, below, names in os.walk(path):
            below[:] = [name for name in below if not name.startswith((".", "_"))]
            for name in names:
                if not name.startswith((".", "_")):
                    (found if _is_known(name) else others).append(os.path.join(folder, name))
        if not found:
            raise MissingInput(
                f"{path}: no input in this folder; known endings are {', '.join(_KINDS)}, .gz, .zst"
            )
        if others and report is not None:
            report(f"{path}: {len(others)} files of other kinds are left out, such as {min(others)}")
        files += sorted(found, key=lambda file: Path(file).parts)
    return files


def _is_known(name: str) -> bool:
    stem, ending = os.path.splitext(name.lower())
    if ending in _PACKED:
        stem, ending = os.path.splitext(stem)
        return ending in _KINDS and ending != ".parquet"
    return ending in _KINDS


def open_input(
    path: str | Path,
    *,
    max_line_bytes: int = MAX_LINE_BYTES,
    text_key: str = "text",
    fields: Sequence[str] | None = None,
    block_bytes: int = BLOCK_BYTES,
    span: tuple[int, int] | None = None,
) -> InputFile:
    """One input, to be read once. ``fields``: of a parquet file, only these columns; not given = all.

    ``span``: only these bytes of a plain JSONL file, which must begin and end at lines; its lines then count
    from the first of the span. Raises MissingInput where it cannot be read, DataError where it is no file.
    """
    return InputFile(str(path), max_line_bytes, text_key, fields, block_bytes, span)


class InputFile:
    """One input: ``blocks()`` or ``chunks()``, once; then ``sha256`` and ``size`` of the file's own bytes.

    Both raise DataError for a file that is not what its name says, or that changes under the reader. A gzip or
    zstd file that ends early or is damaged gives all its whole lines, and then one with a ``fault``.
    """

    def __init__(
        self,
        path: str,
        max_line_bytes: int,
        text_key: str,
        fields: Sequence[str] | None,
        block_bytes: int,
        span: tuple[int, int] | None,
    ) -> None:
        self.path, self.size, self.sha256 = path, 0, ""
        self.read = 0
        """Bytes of the file read so far: of ``size``, how far the work is."""
        if path != STDIN:
            self.size = check_file(path).st_size if span is None else span[1] - span[0]
        self._limit, self._text_key, self._fields = max_line_bytes, text_key, fields
        self._block_bytes, self._span = block_bytes, span
        self._digest = hashlib.sha256()

    def chunks(self) -> Iterator[list[Line]]:
        """Lists of consecutive lines of about ``block_bytes`` together (at least one line each)."""
        for block in self.blocks():
            yield block.lines()

    def blocks(self) -> Iterator[Block]:
        """The same as bytes, for other processes to take apart."""
        if self.path == STDIN:
            yield from self._blocks_of(sys.stdin.buffer)
            self.size, self.sha256 = self.read, self._digest.hexdigest()
            return
        with open(self.path, "rb") as stream:
            before = os.fstat(stream.fileno())
            if self._span:
                stream.seek(self._span[0])
            yield from self._blocks_of(stream)
            after = os.fstat(stream.fileno())
        same = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
        if not same or self.read != (self.size if self._span else after.st_size):
            raise DataError(f"{self.path}: changed while it was read; start again once it is complete")
        self.size, self.sha256 = self.read, self._digest.hexdigest()

    def _blocks_of(self, stream: BinaryIO) -> Iterator[Block]:
        offset = self._span[0] if self._span else 0
        head = stream.read(min(_HEAD_BYTES, self.size) if self._span else _HEAD_BYTES)
        name = self.path.lower()
        if offset:
            pieces = self._raw(stream, head, self._block_bytes)
        elif head.startswith(_PARQUET):
            pieces = self._parquet(stream, head)
        elif head.startswith(_GZIP) or name.endswith(".gz"):
            pieces = unpacked(self._raw(stream, head, PIECE["gzip"]), "gzip", self._block_bytes)
        elif head.startswith(_ZSTD) or name.endswith(".zst"):
            pieces = unpacked(self._raw(stream, head, PIECE["zstd"]), "zstd", self._block_bytes)
        else:
            self._refuse(head)
            pieces = self._raw(stream, head, self._block_bytes)
        if name.removesuffix(".gz").removesuffix(".zst").endswith(".txt"):
            yield whole_of(pieces, self._limit, self._text_key)
        else:
            yield from lines_of(pieces, self._limit, offset)

    def _refuse(self, head: bytes) -> None:
        for magic, kind in _UNREAD.items():
            if head.startswith(magic):
                raise DataError(
                    f"{self.path}: is compressed with {kind}; unpack it, or pack it with gzip or zstd"
                )
        if head.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise DataError(f"{self.path}:1:0: is UTF-16; convert it to UTF-8 first")
        if self.path.lower().endswith(".parquet"):
            raise DataError(f"{self.path}: is no parquet file: starts with {head!r}, expected {_PARQUET!r}")

    def _raw(self, stream: BinaryIO, piece: bytes, size: int) -> Iterator[bytes]:
        """Bytes of the file from ``piece`` on, hashed; the sizes of the pieces are always the same."""
        end = self.size if self._span else sys.maxsize
        piece += stream.read(min(size, end) - len(piece)) if len(piece) < min(size, end) else b""
        while piece:
            self._digest.update(piece)
            self.read += len(piece)
            yield piece
            piece = stream.read(min(size, end - self.read))

    def _parquet(self, stream: BinaryIO, head: bytes) -> Iterator[bytes]:
        """Rows as JSON lines, about ``block_bytes`` at a time; the file is hashed afterwards."""
        if self.path == STDIN:
            raise DataError("standard input: is parquet, which is read from its end; give a file")
        try:
            import pyarrow.parquet
        except ImportError:
            raise ConfigError(f"{self.path}: to read parquet: pip install 'megatron_syne[data]'") from None

        try:
            with pyarrow.parquet.ParquetFile(self.path, pre_buffer=False) as table:
                columns = self._columns(table.schema_arrow.names)
                for group in range(table.num_row_groups):
                    meta = table.metadata.row_group(group)
                    rows = max(1, self._block_bytes * meta.num_rows // max(1, meta.total_byte_size))
                    for batch in table.iter_batches(
                        rows, row_groups=[group], columns=columns, use_threads=False
                    ):
                        yield b"".join(_json_rows(batch))
        except (pyarrow.ArrowException, OSError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"{self.path}: damaged, or no parquet file that can be read: {first}") from None
        for _ in self._raw(stream, head, self._block_bytes):
            pass

    def _columns(self, here: Sequence[str]) -> list[str] | None:
        if self._fields is None:
            return None
        if missing := [name for name in self._fields if name not in here]:
            raise DataError(
                f"{self.path}: no column {missing[0]!r}; columns here: {', '.join(sorted(here)[:8])}"
            )
        return list(self._fields)


def is_plain_jsonl(path: str) -> bool:
    """Whether a file can be cut at any line: neither compressed nor parquet nor one document."""
    with open(path, "rb") as stream:
        head = stream.read(_HEAD_BYTES)
    return not head.startswith((_GZIP, _ZSTD, _PARQUET)) and not path.lower().endswith(
        (*_PACKED, ".parquet", ".txt")
    )


def check_file(path: str) -> os.stat_result:
    """Its status; raises MissingInput, DataError where it cannot be an input."""
    try:
        status = os.stat(path)
    except OSError as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise MissingInput(f"{path}: {what}") from None
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path}: not a regular file")
    if not os.access(path, os.R_OK):
        raise MissingInput(f"{path}: may not be read by this user")
    return status


def _json_rows(batch: Any) -> Iterator[bytes]:
    try:
        rows = batch.to_pylist()
    except (
        UnicodeDecodeError
    ):  # strings that are no UTF-8: their bytes become lone surrogates, refused row by row
        import pyarrow

        plain = [
            column.cast(pyarrow.binary()) if pyarrow.types.is_string(column.type) else column
            for column in batch.columns
        ]
        names = batch.schema.names
        rows = [
            {
                name: value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value
                for name, value in zip(names, values, strict=True)
            }
            for values in zip(*(column.to_pylist() for column in plain), strict=True)
        ]
        for row in rows:
            yield json.dumps(row, default=str).encode("ascii") + b"\n"
        return
    for row in rows:
        yield json.dumps(row, default=str, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
