"""JSONL records in and out: every field kept, ours added at the end of the line, every line accounted for."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.util
import json
import os
import re
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from megatron_syne.data.documents.atomic import Outputs
from megatron_syne.data.documents.inputs import find_inputs, open_input
from megatron_syne.data.documents.jsonl import MAX_LINE_BYTES, BadLine, Line, record_of, text_in
from megatron_syne.errors import ConfigError, DataError

T = TypeVar("T")
MAX_FILES = 1000
_MARK = b"\xef\xbb\xbf"
_NOT_A_WORD = re.compile(r"[^\w]+|_+")


class Record(NamedTuple):
    """One document: where it stands and what its line says."""

    path: str
    line: Line
    fields: dict[str, Any]


@dataclass
class Tally:
    """Counts of lines: ``lines`` = blank + malformed + all dropped + ``written``."""

    lines: int = 0
    blank: int = 0
    malformed: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    written: int = 0

    def drop(self, reason: str, number: int = 1) -> None:
        """Count documents that are left out for a reason."""
        if number:
            self.dropped[reason] = self.dropped.get(reason, 0) + number

    def to_dict(self) -> dict[str, Any]:
        """The counts as JSON; they add up, or this program has a fault."""
        gone = self.blank + self.malformed + sum(self.dropped.values())
        assert self.lines == gone + self.written, f"lines are missing: {self}"
        return {
            "lines": self.lines,
            "written": self.written,
            "blank": self.blank,
            "malformed": self.malformed,
            "dropped": dict(sorted(self.dropped.items())),
        }

    def describe(self) -> str:
        """``10 lines: 8 written, 1 blank, 1 malformed``."""
        parts = {"written": self.written, "blank": self.blank, "malformed": self.malformed, **self.dropped}
        shown = [f"{n:,} {name}" for name, n in parts.items() if n or name == "written"]
        return f"{self.lines:,} lines: {', '.join(shown)}"


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command that reads records takes."""
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="FILE",
        help="JSONL (plain, .gz, .zst), parquet, folders of them, or - for standard input",
    )  # fmt: skip
    parser.add_argument(
        "--on-error", choices=["fail", "skip"], default="fail",
        help="malformed line: fail (default), or skip = set it aside in a quarantine file beside the output",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace existing outputs")
    parser.add_argument(
        "--max-line-bytes", type=int, default=MAX_LINE_BYTES, help="a longer line is malformed (64 MiB)"
    )


ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")


def add_output_arguments(parser: argparse.ArgumentParser, *, split: bool = True) -> None:
    """Where documents go; ``split``: by which fields is an option too."""
    parser.add_argument("--output", metavar="FILE", help="one file: .jsonl, .jsonl.gz or .jsonl.zst")
    parser.add_argument(
        "--output-dir", metavar="FOLDER", help="instead: a file for each group, named after it"
    )
    parser.add_argument("--ending", choices=ENDINGS, default=ENDINGS[0], help="of the files there (.jsonl)")
    if split:
        parser.add_argument(
            "--split-by", nargs="+", metavar="FIELD", help="with --output-dir: these fields make the groups"
        )


class Source:
    """The input files of a command, read once and in order; what is wrong is stopped at or set aside."""

    def __init__(self, options: argparse.Namespace, quarantine: BinaryIO) -> None:
        self.tally = Tally()
        self.files: list[dict[str, Any]] = []
        self._options = options
        self._quarantine = quarantine
        self._begin = self._last = time.monotonic()

    def chunks(self, extract: Callable[[Record], T]) -> Iterator[list[tuple[Record, T]]]:
        """Lists of (record, ``extract(record)``); a BadLine that ``extract`` raises is a malformed line."""
        options = self._options
        text_key = getattr(options, "text_key", "text")
        paths = find_inputs(options.input, lambda text: print(text, file=sys.stderr))
        if twice := [path for path, times in Counter(map(os.path.realpath, paths)).items() if times > 1]:
            raise ConfigError(f"--input: {twice[0]} is given twice; its documents would be doubled")
        for path in paths:
            file = open_input(path, max_line_bytes=options.max_line_bytes, text_key=text_key)
            for lines in file.chunks():
                yield [pair for line in lines if (pair := self._one(file.path, line, extract)) is not None]
                self._show()
            self.files.append({"file": file.path, "bytes": file.size, "sha256": file.sha256})

    def _one(self, path: str, line: Line, extract: Callable[[Record], T]) -> tuple[Record, T] | None:
        self.tally.lines += 1
        try:
            fields = record_of(line)
            if fields is None:
                self.tally.blank += 1
                return None
            record = Record(path, line, fields)
            return record, extract(record)
        except BadLine as error:
            if self._options.on_error == "fail":
                raise DataError(
                    f"{path}:{line.number}:{error.byte}: {error.reason} (line {line.number}, byte {error.byte}); "
                    "correct it, or pass --on-error skip to set such lines aside"
                ) from None
            self.tally.malformed += 1
            raw = line.raw.rstrip(b"\r\n").decode("utf-8", "surrogateescape")
            aside = {
                "file": path,
                "line": line.number,
                "byte": error.byte,
                "reason": error.reason,
                "raw": raw,
            }
            self._quarantine.write(json.dumps(aside).encode("ascii") + b"\n")
            return None

    def _show(self) -> None:
        now = time.monotonic()
        if now - self._last >= 10:
            self._last = now
            rate = self.tally.lines / (now - self._begin)
            print(f"{self.tally.lines:,} lines read, {rate:,.0f} a second", file=sys.stderr, flush=True)


def require(module: str, extra: str) -> None:
    """ConfigError where an optional library is absent, with the command that installs it."""
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"{module} is not installed here: pip install 'megatron_syne[{extra}]'")


def name_in(record: Record, key: str) -> str:
    """The string in a field that names a group (topic, language, source); raises BadLine where it is blank."""
    name = text_in(record.fields, key, record.line).strip()
    if not name:
        raise BadLine(f"field {key!r} must be a name, found a blank one", record.line.offset)
    return name


def line_of(record: Record, added: Mapping[str, Any]) -> bytes:
    """The record's line with fields added at its end, the bytes before them unchanged; none may be there yet."""
    if record.line.plain:  # a file of plain text has no line of JSON
        line = json.dumps(record.fields, ensure_ascii=False).encode("utf-8")
    else:
        line = record.line.raw.removeprefix(_MARK).strip()
    return with_fields(line, added)


def with_fields(line: bytes, added: Mapping[str, Any]) -> bytes:
    """A JSON object with fields added at its end, and a newline."""
    line = line.strip()
    if not added:
        return line + b"\n"
    text = json.dumps(dict(added), ensure_ascii=False)[1:]
    head = line[:-1].rstrip()
    return head + (b"" if head.endswith(b"{") else b", ") + text.encode("utf-8") + b"\n"


def refuse_present(record: Record, keys: Sequence[str], option: str) -> None:
    """DataError where a record has one of the fields that are to be added: nothing is written over."""
    for key in keys:
        if key in record.fields:
            raise DataError(
                f"{record.path}:{record.line.number}:{record.line.offset}: has a field {key!r} already, which "
                f"this command would add; choose another name with {option}"
            )


def file_stem(*names: str) -> str:
    """Names as a file name: words joined by ``_``, names by ``-``; Chinese stays, everything else goes.

    Raises DataError where nothing is left of a name.
    """
    stems = []
    for name in names:
        stem = _NOT_A_WORD.sub("_", unicodedata.normalize("NFKC", name).casefold()).strip("_")
        if not stem or len(stem.encode("utf-8")) > 120:
            raise DataError(f"{name[:40]!r}: no file can be named after it; rename it, or do not split by it")
        stems.append(stem)
    return "-".join(stems)


class Documents:
    """Where documents go: one file, or one for each group in a folder; compressed where the name says so.

    Beside ``<output>`` lie ``_<output>.report.json`` and, where lines were set aside, ``_<output>.quarantine.jsonl``;
    in a folder ``_report.json`` and ``_quarantine.jsonl``. A command that is given the folder as its input passes
    over names in ``_``.
    """

    def __init__(self, outputs: Outputs, options: argparse.Namespace) -> None:
        if (options.output is None) == (options.output_dir is None):
            raise ConfigError("give either --output (one file) or --output-dir (one file for each group)")
        if options.output_dir is None and getattr(options, "split_by", None):
            raise ConfigError("--split-by: needs --output-dir, where the files are put")
        self.files: list[dict[str, Any]] = []
        self._outputs, self._ending = outputs, options.ending
        self._folder = None if options.output_dir is None else Path(options.output_dir)
        self._names: dict[tuple[str, ...], _Writer] = {}
        self._by_path: dict[Path, tuple[str, ...]] = {}
        if self._folder is None:
            path = Path(options.output)
            self._names[()] = _Writer(outputs, path)
            beside = f"{path.parent}/_{path.name}."
        else:
            beside = f"{self._folder}/_"
        self._report = outputs.create(f"{beside}report.json", seal=True)
        self.quarantine = outputs.create(f"{beside}quarantine.jsonl", optional=True)

    def write(self, line: bytes, group: tuple[str, ...] = ()) -> None:
        """One document; ``group`` counts where there is a file for each."""
        self._writer(group if self._folder is not None else ()).write(line)

    def _writer(self, group: tuple[str, ...]) -> _Writer:
        if group in self._names:
            return self._names[group]
        path = Path(str(self._folder)) / (file_stem(*group) + self._ending)
        if path in self._by_path:
            raise DataError(
                f"{self._by_path[path]} and {group} would both be written to {path}; rename one of them"
            )
        if len(self._names) >= MAX_FILES:
            raise DataError(f"more than {MAX_FILES} groups to split into; is that the right field?")
        self._by_path[path] = group
        self._names[group] = _Writer(self._outputs, path)
        return self._names[group]

    def publish(self, source: Source, report: Mapping[str, Any]) -> None:
        """All files appear, with a report that accounts for every line."""
        self.files = [
            {"file": str(writer.path), "group": list(group), **writer.finish()}
            for group, writer in self._names.items()
        ]
        whole = {**report, "counts": source.tally.to_dict(), "inputs": source.files, "outputs": self.files}
        write_report(self._report, whole)
        self._outputs.publish()


class _Writer:
    def __init__(self, outputs: Outputs, path: Path) -> None:
        self.path, self._documents, self._bytes = path, 0, 0
        self._digest = hashlib.sha256()
        if not path.name.endswith(ENDINGS):
            raise ConfigError(f"{path}: documents are written as {', '.join(ENDINGS)}")
        stream = outputs.create(path)
        self._stream: Any = stream
        if path.suffix == ".gz":  # no name and no time in it: the same documents give the same bytes
            self._stream = gzip.GzipFile(filename="", mode="wb", fileobj=stream, mtime=0, compresslevel=6)
        elif path.suffix == ".zst":
            import zstandard

            self._stream = zstandard.ZstdCompressor().stream_writer(stream, closefd=False)
        self._plain = self._stream is stream

    def write(self, line: bytes) -> None:
        self._stream.write(line)
        self._digest.update(line)
        self._documents += 1
        self._bytes += len(line)

    def finish(self) -> dict[str, Any]:
        if not self._plain:
            self._stream.close()
        return {"documents": self._documents, "bytes": self._bytes, "sha256": self._digest.hexdigest()}


def write_report(stream: BinaryIO, report: Mapping[str, Any]) -> None:
    """A report as JSON that a person can read."""
    stream.write((json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode("utf-8"))
