"""JSONL files to token files: one document per line, EOS appended, no BOS, short documents dropped.

These are Llama-3-SynE's rules. The bytes written depend only on the inputs and the options, never on the
number of workers. Memory is bounded by a few chunks per worker, plus 4 bytes per document.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_syne.data.atomic import Outputs
from megatron_syne.data.indexed import MANIFEST_FORMAT, MANIFEST_VERSION, IndexedWriter, token_dtype
from megatron_syne.data.jsonl import MAX_LINE_BYTES, BadLine, Line, SourceFile, text_of
from megatron_syne.data.tokenizer import Tokenizer, load_tokenizer
from megatron_syne.errors import ConfigError, DataError, IOFault, SyneError

TRAIN, VALID = 0, 1
_CHUNKS_AHEAD = 3
_BYTES_PER_WORKER = 4 << 20


@dataclass(frozen=True)
class Job:
    """One preparation: several JSONL files to one prefix, or to two disjoint ones (training, validation)."""

    inputs: Sequence[str | Path]
    """JSONL files, in order."""
    tokenizer: str | Path
    """Folder (or file) of the tokenizer."""
    output_prefix: str | Path
    """``.bin``, ``.idx`` and ``.json`` are appended."""
    json_key: str = "text"
    """Field that holds the text."""
    min_tokens: int = 10
    """Documents with fewer tokens than this, counted before EOS, are dropped."""
    workers: int = 1
    """Most processes that tokenise; a small input takes fewer, as each must first load the tokenizer."""
    on_error: Literal["fail", "skip"] = "fail"
    """Malformed line: stop with nothing written, or move it to ``<prefix>.quarantine.jsonl``."""
    overwrite: bool = False
    """Replace existing outputs."""
    valid_prefix: str | Path | None = None
    """Prefix of the held-out documents; not given = none are held out."""
    valid_fraction: float = 0.02
    """Share of documents held out, chosen by a hash of seed and text: exact copies of a document fall on
    the same side, and the choice outlives a change in the order of files."""
    seed: int = 1234
    """Seed of that choice."""
    max_line_bytes: int = MAX_LINE_BYTES
    """A longer line is malformed: it would be read into memory whole."""


@dataclass
class Encoded:
    """What one chunk of lines became; lists are indexed by part (training, validation)."""

    tokens: list[NDArray[Any]] = field(default_factory=list)
    lengths: list[NDArray[np.int32]] = field(default_factory=list)
    too_short: list[int] = field(default_factory=lambda: [0, 0])
    lines: int = 0
    bytes_read: int = 0
    blank: int = 0
    empty: int = 0
    bad: list[tuple[Line, str, int]] = field(default_factory=list)


def prepare(job: Job, report: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
    """Run the job; returns the manifest of each part written. ``report`` gets a progress text now and then.

    Raises ConfigError, MissingInput, DataError, CannotCreate; then nothing is written.
    """
    _check(job)
    tokenizer = load_tokenizer(job.tokenizer)
    if tokenizer.eos_id is None:
        raise DataError(
            f"{job.tokenizer}: no end-of-text token is named; give tokenizer_config.json (eos_token) or "
            f"generation_config.json (eos_token_id) beside the tokenizer"
        )
    sources = [SourceFile(path, max_line_bytes=job.max_line_bytes) for path in job.inputs]
    prefixes = [str(job.output_prefix)] + ([str(job.valid_prefix)] if job.valid_prefix is not None else [])
    with Outputs(overwrite=job.overwrite) as outputs:
        writers = [
            IndexedWriter(
                outputs.create(f"{prefix}.bin"),
                outputs.create(f"{prefix}.idx"),
                token_dtype(tokenizer.vocab_size),
            )
            for prefix in prefixes
        ]
        quarantine = outputs.create(f"{prefixes[TRAIN]}.quarantine.jsonl", optional=True)
        seals = [outputs.create(f"{prefix}.json", seal=True) for prefix in prefixes]
        totals = Totals()
        progress = Progress(sum(source.size for source in sources), report)
        for source, encoded in _encode_all(sources, tokenizer, job):
            if encoded.bad and job.on_error == "fail":
                line, reason, byte = encoded.bad[0]
                raise DataError(
                    f"{source.path}:{line.number}:{byte}: {reason} (line {line.number}, byte {byte}); "
                    f"correct it, or pass --on-error skip to set such lines aside"
                )
            for part, writer in enumerate(writers):
                if encoded.lengths[part].size:
                    totals.highest[part] = max(totals.highest[part], int(encoded.tokens[part].max()))
                    writer.add(encoded.tokens[part], encoded.lengths[part])
            for line, reason, byte in encoded.bad:
                _set_aside(quarantine, source.path, line, reason, byte)
            totals.add(encoded)
            progress.update(encoded, sum(writer.tokens for writer in writers))
        manifests = []
        for part, (prefix, writer, seal) in enumerate(zip(prefixes, writers, seals, strict=True)):
            if writer.documents == 0:
                raise DataError(
                    f"{prefix}: no document is left of {totals.lines} lines ({totals.describe()}); "
                    + ("raise --valid-fraction" if part == VALID else "check the inputs and --min-tokens")
                )
            manifest = _manifest(job, tokenizer, sources, totals, part, len(prefixes), writer)
            seal.write((json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode("utf-8"))
            manifests.append(manifest)
        outputs.publish()
    return manifests


@dataclass
class Totals:
    """Counts over all chunks. Every line is counted once: see :func:`_manifest`."""

    lines: int = 0
    blank: int = 0
    empty: int = 0
    malformed: int = 0
    too_short: list[int] = field(default_factory=lambda: [0, 0])
    highest: list[int] = field(default_factory=lambda: [0, 0])

    def add(self, encoded: Encoded) -> None:
        self.lines += encoded.lines
        self.blank += encoded.blank
        self.empty += encoded.empty
        self.malformed += len(encoded.bad)
        for part in (TRAIN, VALID):
            self.too_short[part] += encoded.too_short[part]

    def describe(self) -> str:
        return (
            f"blank {self.blank}, empty {self.empty}, too short {sum(self.too_short)}, "
            f"malformed {self.malformed}"
        )


class Progress:
    """Says at most once a second how far the work is."""

    def __init__(self, total_bytes: int, report: Callable[[str], None] | None) -> None:
        self._total, self._report = max(total_bytes, 1), report
        self._done, self._documents = 0, 0
        self._begin = self._last = time.monotonic()

    def update(self, encoded: Encoded, tokens: int) -> None:
        self._done += encoded.bytes_read
        self._documents += sum(int(lengths.size) for lengths in encoded.lengths)
        now = time.monotonic()
        if self._report is None or now - self._last < 1:
            return
        self._last = now
        self._report(
            f"{100 * self._done / self._total:.0f}%  {self._documents:,} documents  {tokens:,} tokens  "
            f"{tokens / (now - self._begin):,.0f} tokens/s"
        )


def encode_lines(lines: Sequence[Line], tokenizer: Tokenizer, job: Job) -> Encoded:
    """Texts of some lines to tokens with EOS, by part; pure."""
    out = Encoded(lines=len(lines), bytes_read=sum(line.length for line in lines))
    texts: list[list[str]] = [[], []]
    for line in lines:
        try:
            text = text_of(line, job.json_key)
        except BadLine as error:
            out.bad.append((line, error.reason, error.byte))
            continue
        if text is None:
            out.blank += 1
        elif not text.strip():
            out.empty += 1
        else:
            texts[part_of(text, job)].append(text)
    dtype = token_dtype(tokenizer.vocab_size)
    for part, documents in enumerate(texts):
        kept = []
        for ids in tokenizer.encode_batch(documents) if documents else []:
            if len(ids) < job.min_tokens:
                out.too_short[part] += 1
            else:
                ids.append(tokenizer.eos_id)  # type: ignore[arg-type]  # prepare() refuses None
                kept.append(ids)
        lengths = np.array([len(ids) for ids in kept], dtype=np.int32)
        out.lengths.append(lengths)
        out.tokens.append(np.fromiter(itertools.chain.from_iterable(kept), dtype, int(lengths.sum())))
    return out


def part_of(text: str, job: Job) -> int:
    """Whether a document is for training or held out."""
    if job.valid_prefix is None:
        return TRAIN
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, key=b"%d" % job.seed).digest()
    return VALID if int.from_bytes(digest, "little") < job.valid_fraction * 2.0**64 else TRAIN


def _check(job: Job) -> None:
    if not job.inputs:
        raise ConfigError("--input: give at least one JSONL file")
    names = [os.path.realpath(path) for path in job.inputs]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise ConfigError(f"--input: {job.inputs[index]} is given twice; its documents would be doubled")
    if job.min_tokens < 0 or job.workers < 1 or job.max_line_bytes < 1:
        raise ConfigError("--min-tokens must be at least 0, --workers and --max-line-bytes at least 1")
    if job.valid_prefix is not None:
        if not 0 < job.valid_fraction < 1:
            raise ConfigError(f"--valid-fraction: must lie between 0 and 1, found {job.valid_fraction}")
        if os.path.realpath(job.valid_prefix) == os.path.realpath(job.output_prefix):
            raise ConfigError("--valid-prefix: must differ from --output-prefix")


def _set_aside(stream: BinaryIO, path: str, line: Line, reason: str, byte: int) -> None:
    """A quarantine record; ``raw.encode("utf-8", "surrogateescape")`` gives the bytes of the line back."""
    raw = line.raw.rstrip(b"\r\n").decode("utf-8", "surrogateescape")
    record = {"file": path, "line": line.number, "byte": byte, "reason": reason, "raw": raw}
    stream.write(json.dumps(record).encode("ascii") + b"\n")


def _manifest(
    job: Job,
    tokenizer: Tokenizer,
    sources: Sequence[SourceFile],
    totals: Totals,
    part: int,
    parts: int,
    writer: IndexedWriter,
) -> dict[str, Any]:
    """lines = documents + blank + empty + malformed + too_short + other_part, for either part."""
    dropped = {"blank": 0, "empty": 0, "malformed": 0, "too_short": totals.too_short[part]}
    if part == TRAIN:
        dropped |= {"blank": totals.blank, "empty": totals.empty, "malformed": totals.malformed}
    manifest: dict[str, Any] = {
        "format": MANIFEST_FORMAT,
        "version": MANIFEST_VERSION,
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "max_token_id": totals.highest[part],
        "counts": {
            "lines": totals.lines,
            "documents": writer.documents,
            "tokens": writer.tokens,
            "dropped": dropped,
            "other_part": totals.lines - writer.documents - sum(dropped.values()),
        },
        "options": {"json_key": job.json_key, "min_tokens": job.min_tokens, "on_error": job.on_error},
        "tokenizer": {
            "kind": tokenizer.kind,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
        },
        "sources": [{"file": s.path, "bytes": s.size, "sha256": s.sha256} for s in sources],
        "files": writer.finish(),
    }
    if parts == 2:
        manifest["split"] = {
            "part": ("train", "valid")[part],
            "valid_fraction": job.valid_fraction,
            "seed": job.seed,
        }
    return manifest


def _encode_all(
    sources: Sequence[SourceFile], tokenizer: Tokenizer, job: Job
) -> Iterator[tuple[SourceFile, Encoded]]:
    """Every chunk of every source, encoded, in order."""
    chunks = ((source, lines) for source in sources for lines in source.chunks())
    workers = min(job.workers, sum(source.size for source in sources) // _BYTES_PER_WORKER)
    if workers <= 1:
        for source, lines in chunks:
            yield source, encode_lines(lines, tokenizer, job)
        return
    context = multiprocessing.get_context("spawn")  # a forked copy of threads of tokenizers can hang
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(job, tokenizer.fingerprint)
    )
    waiting: deque[tuple[SourceFile, Future[Encoded]]] = deque()
    try:
        for source, lines in chunks:
            waiting.append((source, pool.submit(_encode_in_worker, lines)))
            if len(waiting) >= _CHUNKS_AHEAD * workers:
                yield waiting[0][0], waiting.popleft()[1].result()
        while waiting:
            yield waiting[0][0], waiting.popleft()[1].result()
    except BrokenProcessPool:
        raise IOFault(
            "a tokenising worker died (out of memory?); start again, with fewer --workers if it repeats"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: tuple[Tokenizer, Job] | None = None


def _start_worker(job: Job, fingerprint: str) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers for ctrl-C
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    tokenizer = load_tokenizer(job.tokenizer)
    if tokenizer.fingerprint != fingerprint:
        raise SyneError(f"{job.tokenizer}: changed while the job ran")
    _worker = (tokenizer, job)


def _leave_with_parent() -> None:
    """A parent that is killed outright cannot stop its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(lines: Sequence[Line]) -> Encoded:
    assert _worker is not None
    return encode_lines(lines, *_worker)
