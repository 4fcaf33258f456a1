"""Documents to token files: EOS appended, no BOS, short documents dropped, unless asked otherwise.

The defaults are Llama-3-SynE's rules. The bytes written depend only on the inputs and the options, never on the
number of workers, nor on how often the run was killed on the way: a run started again goes on from its journal.
Memory is bounded by a few blocks (or the longest lines) per worker.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, BinaryIO

from megatron_syne.data.documents.atomic import Outputs
from megatron_syne.data.documents.blocks import Block
from megatron_syne.data.documents.inputs import BLOCK_BYTES, STDIN, InputFile, find_inputs, open_input
from megatron_syne.data.documents.jsonl import Line
from megatron_syne.data.preparation.counts import Progress, Totals, counts_of, manifest_bytes, manifest_of
from megatron_syne.data.preparation.encode import Encoded
from megatron_syne.data.preparation.job import TRAIN, VALID, Job, check_inputs, check_job
from megatron_syne.data.preparation.journal import Journal, request_of
from megatron_syne.data.preparation.shards import (
    Part,
    finished_shard,
    lines_before,
    plan_shard,
    shard_request,
)
from megatron_syne.data.preparation.workers import Workers
from megatron_syne.data.tokenizer import Tokenizer, load_tokenizer
from megatron_syne.data.tokens.fields import NumberWriter, stale_fields
from megatron_syne.data.tokens.indexed import IndexedWriter, token_dtype
from megatron_syne.errors import CannotCreate, ConfigError, DataError

__all__ = ["Job", "prepare"]

JOURNAL_SECONDS = 10.0
"""Work that a killed run loses, at most about."""
_BYTES_PER_WORKER = 4 << 20
_PACKED_PER_WORKER = 1 << 20  # compressed text and parquet hold several times their size


def prepare(
    job: Job, report: Callable[[str], None] | None = None, say: Callable[[str], None] | None = None
) -> list[dict[str, Any]]:
    """Run the job; returns the manifest of each prefix written.

    ``report`` gets a progress text now and then, ``say`` what the user should know once. Raises ConfigError,
    MissingInput, DataError, CannotCreate; then nothing is published. A shard that is finished is left alone.
    """
    check_job(job)
    files = find_inputs(job.inputs, say)
    check_inputs(files)
    parts = [Part(file) for file in files] if job.shard is None else plan_shard(files, *job.shard)
    inputs = [_open(part, job) for part in parts]
    with Workers(_worker_count(job, inputs, files), job) as workers:
        return _prepare(job, files, parts, inputs, workers, report, say)


def _worker_count(job: Job, inputs: Sequence[InputFile], files: Sequence[str]) -> int:
    """Fewer than asked for where the input is small: each must first get the tokenizer."""
    packed = any(one.path.endswith((".gz", ".zst", ".parquet")) for one in inputs)
    room = sum(one.size for one in inputs) // (_PACKED_PER_WORKER if packed else _BYTES_PER_WORKER)
    return job.workers if STDIN in files else min(job.workers, room)


def _prepare(
    job: Job,
    files: Sequence[str],
    parts: Sequence[Part],
    inputs: Sequence[InputFile],
    workers: Workers,
    report: Callable[[str], None] | None,
    say: Callable[[str], None] | None,
) -> list[dict[str, Any]]:
    tokenizer = load_tokenizer(job.tokenizer)
    _check_tokens(job, tokenizer)
    if job.shard is not None:
        for prefix in (str(job.output_prefix), job.valid_prefix):
            if prefix is not None and os.path.lexists(f"{prefix}.json") and not job.overwrite:
                raise CannotCreate(
                    f"{prefix}.json: exists already: merged before? Pass --overwrite to do it again"
                )
        done = finished_shard(job, shard_request(job, files, tokenizer.fingerprint))
        if done is not None and not job.overwrite:
            if say is not None:
                say(f"{job.prefixes()[TRAIN]}: finished before; nothing to do")
            return done
    outputs = Outputs(overwrite=job.overwrite)
    with outputs:
        try:
            run = _Run(job, tokenizer, files, parts, inputs, outputs, say)
            run.encode(workers, Progress(sum(one.size for one in inputs), report))
            return run.publish()
        except DataError:
            outputs.keep_partial = False  # the same inputs would only fail again
            raise


def _open(part: Part, job: Job) -> InputFile:
    return open_input(
        part.file,
        max_line_bytes=job.max_line_bytes,
        text_key=job.json_key,
        fields=[job.json_key, *job.keep],
        span=part.span,
    )


def _check_tokens(job: Job, tokenizer: Tokenizer) -> None:
    if job.append_eod and tokenizer.eos_id is None:
        raise DataError(
            f"{job.tokenizer}: no end-of-text token is named; give tokenizer_config.json (eos_token) or "
            f"generation_config.json (eos_token_id) beside the tokenizer"
        )
    if job.prepend_bos and tokenizer.bos_id is None:
        raise ConfigError(f"--prepend-bos: {job.tokenizer} names no beginning-of-text token")
    if job.fim is not None:
        job.fim.sentinels(tokenizer)


class _Run:
    """The open outputs of a job, and how far it has come."""

    def __init__(
        self,
        job: Job,
        tokenizer: Tokenizer,
        files: Sequence[str],
        parts: Sequence[Part],
        inputs: Sequence[InputFile],
        outputs: Outputs,
        say: Callable[[str], None] | None,
    ) -> None:
        self._job, self._tokenizer, self._files = job, tokenizer, files
        self._parts, self._inputs, self._outputs = parts, inputs, outputs
        self._prefixes = job.prefixes()
        self.totals = Totals()
        self._input, self._lines = 0, 0  # inputs done, and lines done of the next one
        self._sources: list[dict[str, Any]] = []
        journal = outputs.create(f"{self._prefixes[TRAIN]}.journal", keep=True, scratch=True)
        self._journal = Journal(journal, self._request())
        left = self._journal.state
        outputs.keep_partial = left is not None
        if left is not None and left.get("publishing") and not all(map(os.path.exists, self._seals())):
            outputs.overwrite = True  # killed while it gave the files their names: they are ours
        self._writers: list[IndexedWriter] = []
        self._numbers: list[list[NumberWriter]] = []
        self._streams: list[BinaryIO] = []
        dtype = token_dtype(tokenizer.vocab_size)
        for prefix in self._prefixes:
            pair = self._create(f"{prefix}.bin"), self._create(f"{prefix}.idx")
            self._writers.append(IndexedWriter(*pair, dtype))
            columns = [self._create(f"{prefix}.{name}.npy") for name in job.keep]
            self._numbers.append([NumberWriter(stream) for stream in columns])
        self._quarantine = self._create(f"{self._prefixes[TRAIN]}.quarantine.jsonl", optional=True)
        self._seal_streams = [outputs.create(path, seal=True) for path in self._seals()]
        if self._journal.found:
            self._resume(left, say)
        self._written = time.monotonic()

    def _create(self, path: str, optional: bool = False) -> BinaryIO:
        stream = self._outputs.create(path, keep=self._journal.state is not None, optional=optional)
        self._streams.append(stream)
        return stream

    def _seals(self) -> list[str]:
        return [f"{prefix}.json" for prefix in self._prefixes]

    def _request(self) -> str:
        job = self._job
        seen: list[list[Any]] = []
        for part in self._parts:
            if part.file == STDIN:  # never twice the same
                seen.append([STDIN, os.getpid(), time.time_ns()])
            else:
                status = os.stat(part.file)
                seen.append([part.file, part.span, status.st_size, status.st_mtime_ns])
        split = [job.valid_fraction, job.seed] if job.valid_prefix is not None else None
        limits = [job.max_line_bytes, BLOCK_BYTES, list(job.keep)]
        return request_of(1, job.options(), split, limits, self._prefixes, self._tokenizer.fingerprint, seen)

    def _resume(self, left: dict[str, Any] | None, say: Callable[[str], None] | None) -> None:
        prefix = self._prefixes[TRAIN]
        if left is None or not self._take_over(left):
            self._journal.clear()
            self._outputs.keep_partial = False
            text = f"{prefix}: what a killed run left is of other inputs or options, or damaged; starting from zero"
        else:
            documents = sum(writer.documents for writer in self._writers)
            text = f"{prefix}: going on where a killed run stopped, behind {documents:,} documents"
        if say is not None:
            say(text)

    def _take_over(self, left: dict[str, Any]) -> bool:
        """Cut the outputs back to what the journal says; False, and all of them empty, where they are not that."""
        ends = left["ends"]
        whole = all(
            os.fstat(stream.fileno()).st_size >= end for stream, end in zip(self._streams, ends, strict=True)
        )
        for part, (writer, columns) in enumerate(zip(self._writers, self._numbers, strict=True)):
            tokens, documents, digest = left["parts"][part] if whole else (0, 0, None)
            writer.resume(tokens, documents)
            for column in columns:
                column.resume(documents)
            whole = whole and writer.bin_sha256() == digest
        self._quarantine.seek(ends[-1] if whole else 0)
        self._quarantine.truncate()
        if whole:
            self.totals = Totals(**left["totals"])
            self._input, self._lines, self._sources = left["input"], left["lines"], left["sources"]
            return True
        for writer, columns in zip(self._writers, self._numbers, strict=True):
            writer.resume(0, 0)
            for column in columns:
                column.resume(0)
        return False

    def encode(self, workers: Workers, progress: Progress) -> None:
        """Read, tokenise and write everything that is left."""
        before = sum(one.size for one in self._inputs[: self._input])
        for index, block, encoded in workers.encode(self._blocks(), self._tokenizer):
            if index > self._input:
                before += sum(one.size for one in self._inputs[self._input : index])
                self._finish_inputs(index)
            self._add(self._inputs[index], self._parts[index], encoded)
            self._lines = block.first_line + encoded.lines - 1
            if time.monotonic() - self._written >= JOURNAL_SECONDS and STDIN not in self._files:
                self._record()
            tokens = sum(writer.tokens for writer in self._writers)
            documents = sum(writer.documents for writer in self._writers)
            progress.update(before + self._inputs[index].read, documents, tokens)
        self._finish_inputs(len(self._inputs))

    def _blocks(self) -> Iterator[tuple[int, Block]]:
        done = self._lines
        for index in range(self._input, len(self._inputs)):
            for block in self._inputs[index].blocks():
                if block.first_line > done:
                    yield index, block
            done = 0

    def _finish_inputs(self, end: int) -> None:
        for index in range(self._input, end):
            one, part = self._inputs[index], self._parts[index]
            source = {"file": one.path, "bytes": one.size, "sha256": one.sha256}
            self._sources.append(source if part.span is None else {**source, "start": part.span[0]})
        self._input, self._lines = end, 0

    def _add(self, source: InputFile, part: Part, encoded: Encoded) -> None:
        if encoded.bad:
            base = lines_before(part) if part.span else 0
            for line, reason, byte in encoded.bad:
                number = line.number + base
                if self._job.on_error == "fail":
                    raise DataError(
                        f"{source.path}:{number}:{byte}: {reason} (line {number}, byte {byte}); "
                        f"correct it, or pass --on-error skip to set such lines aside"
                    )
                _set_aside(self._quarantine, source.path, line._replace(number=number), reason, byte)
        for index, writer in enumerate(self._writers):
            if encoded.lengths[index].size:
                writer.add(encoded.tokens[index], encoded.lengths[index])
                for column, values in zip(self._numbers[index], encoded.numbers[index], strict=True):
                    column.add(values)
        self.totals.add(encoded)

    def _state(self) -> dict[str, Any]:
        return {
            "input": self._input,
            "lines": self._lines,
            "sources": self._sources,
            "totals": asdict(self.totals),
            "parts": [[one.tokens, one.documents, one.bin_sha256()] for one in self._writers],
            "ends": [stream.tell() for stream in self._streams],
        }

    def _record(self) -> None:
        self._journal.write(self._state(), self._streams)
        self._outputs.keep_partial = True
        self._written = time.monotonic()

    def publish(self) -> list[dict[str, Any]]:
        """Finish and name the files; returns the manifests."""
        job, manifests = self._job, []
        state = {
            **self._state(),
            "publishing": True,
        }  # of the files as they are before the indices are finished
        for part, (prefix, writer) in enumerate(zip(self._prefixes, self._writers, strict=True)):
            if writer.documents == 0 and job.shard is None:
                raise DataError(
                    f"{prefix}: no document is left of {self.totals.lines} lines ({self.totals.describe()}); "
                    + ("raise --valid-fraction" if part == VALID else "check the inputs and --min-tokens")
                )
            counts = counts_of(self.totals, part, writer.documents, writer.tokens)
            fields = {
                name: column.finish() for name, column in zip(job.keep, self._numbers[part], strict=True)
            }
            highest = self.totals.highest[part]
            manifest = manifest_of(
                job, self._tokenizer, part, highest, counts, self._sources, writer.finish(), fields
            )
            if job.shard is not None:
                request = shard_request(job, self._files, self._tokenizer.fingerprint)
                manifest["shard"] = {"index": job.shard[0], "count": job.shard[1], "request": request}
            self._seal_streams[part].write(manifest_bytes(manifest))
            manifests.append(manifest)
        self._outputs.flush()
        self._journal.write(state, [])
        self._outputs.keep_partial = True
        stale = [file for prefix in self._prefixes for file in stale_fields(prefix, job.keep)]
        self._outputs.publish()
        for file in stale:
            file.unlink(missing_ok=True)
        return manifests


def _set_aside(stream: BinaryIO, path: str, line: Line, reason: str, byte: int) -> None:
    """A quarantine record; ``raw.encode("utf-8", "surrogateescape")`` gives the bytes of the line back."""
    raw = line.raw.rstrip(b"\r\n").decode("utf-8", "surrogateescape")
    record = {"file": path, "line": line.number, "byte": byte, "reason": reason, "raw": raw}
    stream.write(json.dumps(record).encode("ascii") + b"\n")
