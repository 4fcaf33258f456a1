"""Documents in, the same documents with their perplexity out: reading, batching by length, writing, resuming.

Which model gives the numbers is the caller's: a :class:`Scorer`, for transformers (``perplexity_hf``) or for our
own parallel model (``megatron_syne.score``).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_syne.curation.perplexity_options import Task
from megatron_syne.curation.perplexity_output import GrowingOutput, InputSoFar
from megatron_syne.curation.perplexity_windows import windows_of
from megatron_syne.curation.records import Record, refuse_present, with_fields
from megatron_syne.data.documents.inputs import STDIN, InputFile, find_inputs, open_input
from megatron_syne.data.documents.jsonl import BadLine, Line, record_of, text_in
from megatron_syne.data.tokenizer import Tokenizer
from megatron_syne.errors import DataError

PART_BYTES = 1 << 22
"""Input that is sorted by length and written as one part, for each replica of the model."""


class Scorer(Protocol):
    """A model: of each window the sum of ``-log p`` over its tokens but the first, in nats."""

    def __call__(self, windows: Sequence[NDArray[np.int64]]) -> NDArray[np.float64]: ...


@dataclass
class Counts:
    """Lines by what became of them: their sum is ``lines``; and what was computed."""

    lines: int = 0
    scored: int = 0
    without_prediction: int = 0
    """Written with ``null``: no token that could be predicted."""
    blank: int = 0
    malformed: int = 0
    """Set aside in ``_OUTPUT.quarantine.jsonl`` (``on_error`` = skip)."""
    tokens: int = 0
    """Predicted tokens."""
    nll: float = 0.0
    """Sum of ``-log p`` over them, in nats."""

    def describe(self) -> str:
        """One line for people."""
        mean = f"{math.exp(self.nll / self.tokens):,.3f}" if self.tokens else "none"
        return (
            f"{self.lines:,} lines: {self.scored:,} scored, {self.without_prediction:,} without a token to "
            f"predict, {self.blank:,} blank, {self.malformed:,} malformed; {self.tokens:,} tokens, "
            f"perplexity over all {mean}"
        )


def score_files(
    task: Task,
    tokenizer: Tokenizer,
    scorer: Scorer,
    vocab_size: int,
    model_identity: dict[str, Any],
    part_bytes: int = PART_BYTES,
    show: Callable[[str], None] = lambda text: None,
) -> Counts:
    """Write ``task.output``: every line of the inputs in their order, with perplexity and predicted tokens.

    A run that was killed goes on where it was and gives the same bytes. ``vocab_size`` and ``model_identity``
    (plain JSON that tells one model from another) are the model's. Raises DataError for a malformed line (unless
    they are set aside) or a model that gives no finite number, CannotCreate, MissingInput.
    """
    files = find_inputs(task.inputs, show)
    work = {
        "model": model_identity,
        "tokenizer": tokenizer.fingerprint,
        "inputs": files,
        "context": task.context,
        "first_tokens": task.first_tokens,
        "fields": [task.text_key, task.field, task.tokens_field],
        "on_error": task.on_error,
        "max_line_bytes": task.max_line_bytes,
    }
    counts, so_far, documents = Counts(), InputSoFar(), Documents(files, task)
    with GrowingOutput(task.output, work, task.overwrite) as output:
        if output.states:  # the lines that are in the output already
            counts = Counts(**output.states[-1]["counts"])
            where = ""
            for path, line in itertools.islice(documents, counts.lines):
                so_far.add(line.raw)
                where = f"{path}:{line.number}"
            so_far.check(output.states[-1]["input"], where)
            show(f"{output.partial}: goes on after {counts.lines:,} lines")
        begin, tokens_before, share_before = time.monotonic(), counts.tokens, documents.share()
        while part := documents.take(part_bytes):
            for _, line in part:
                so_far.add(line.raw)
            data, aside = score_part(part, task, tokenizer, scorer, vocab_size, counts)
            output.add(data, {"counts": vars(counts), "input": so_far.hexdigest(), "aside": aside})
            seconds, share = max(time.monotonic() - begin, 1e-9), documents.share()
            text = f"{counts.lines:,} lines, {counts.tokens:,} tokens"
            text += f", {(counts.tokens - tokens_before) / seconds:,.0f} tokens/s, {100 * share:.0f} %"
            if 1 > share > share_before:
                text += f", about {_duration(seconds * (1 - share) / (share - share_before))} left"
            show(text)
        if task.on_error == "skip":
            _write_quarantine(quarantine_of(Path(task.output)), output.states)
        output.publish()
    return counts


class Documents:
    """The lines of all files one after another, with the path of each."""

    def __init__(self, files: list[str], task: Task) -> None:
        self._sizes = [0 if file == STDIN else _size(file) for file in files]
        self._files, self._task = files, task
        self._read_before = 0
        self._now: InputFile | None = None
        self._lines = self._walk()

    def __iter__(self) -> Iterator[tuple[str, Line]]:
        return self._lines

    def take(self, size: int) -> list[tuple[str, Line]]:
        """Lines of at least ``size`` bytes together, or all that are left."""
        part = []
        for path, line in self._lines:
            part.append((path, line))
            size -= len(line.raw)
            if size <= 0:
                break
        return part

    def share(self) -> float:
        """How much of the files' bytes has been read (0 where that cannot be known: standard input)."""
        read = self._read_before + (self._now.read if self._now else 0)
        return min(1.0, read / total) if (total := sum(self._sizes)) else 0.0

    def _walk(self) -> Iterator[tuple[str, Line]]:
        task = self._task
        for path, size in zip(self._files, self._sizes, strict=True):
            self._now = open_input(path, max_line_bytes=task.max_line_bytes, text_key=task.text_key)
            for chunk in self._now.chunks():
                for line in chunk:
                    yield path, line
            self._now, self._read_before = None, self._read_before + size


def score_part(
    part: list[tuple[str, Line]],
    task: Task,
    tokenizer: Tokenizer,
    scorer: Scorer,
    vocab_size: int,
    counts: Counts,
) -> tuple[bytes, list[dict[str, Any]]]:
    """The lines of one part with their numbers, as JSONL, and the malformed ones; ``counts`` grows."""
    records, texts, aside = [], [], []
    for path, line in part:
        counts.lines += 1
        try:
            fields = record_of(line)
            if fields is None:
                counts.blank += 1
                continue
            text = text_in(fields, task.text_key, line)
        except BadLine as bad:
            if task.on_error == "fail":
                raise DataError(
                    f"{path}:{line.number}:{bad.byte}: {bad.reason} (line {line.number}, byte {bad.byte}); "
                    "correct it, or pass --on-error skip to set such lines aside"
                ) from None
            counts.malformed += 1
            kept = line.raw.rstrip(b"\r\n").decode("utf-8", "surrogateescape")
            aside.append(
                {"file": path, "line": line.number, "byte": bad.byte, "reason": bad.reason, "raw": kept}
            )
            continue
        record = Record(path, line, fields)
        refuse_present(record, [task.field, task.tokens_field], "--field and --tokens-field")
        records.append(record)
        texts.append(text)
    owners, windows = [], []
    for number, ids in enumerate(tokenizer.encode_batch(texts)):
        for window in windows_of(ids, tokenizer.bos_id, task.context, task.first_tokens):
            if window.max() >= vocab_size:
                raise DataError(
                    f"{records[number].path}:{records[number].line.number}: token {window.max()} is beyond the "
                    f"model's vocabulary of {vocab_size}; is the tokenizer the model's own?"
                )
            owners.append(number)
            windows.append(window)
    sums = scorer(windows) if windows else np.zeros(0)
    nll = np.bincount(owners, weights=sums, minlength=len(records)).tolist()
    predicted = np.bincount(owners, weights=[len(one) - 1 for one in windows], minlength=len(records))
    written = []
    for record, total, tokens in zip(records, nll, predicted.astype(int).tolist(), strict=True):
        place = f"{record.path}:{record.line.number}"
        added: dict[str, Any] = {task.field: perplexity(total, tokens, place), task.tokens_field: tokens}
        line = record.line
        raw = json.dumps(record.fields, ensure_ascii=False).encode("utf-8") if line.plain else line.raw
        written.append(with_fields(raw, added))
        counts.scored += tokens > 0
        counts.without_prediction += tokens == 0
        counts.tokens += tokens
        counts.nll += total
    return b"".join(written), aside


def perplexity(nll: float, tokens: int, place: str) -> float | None:
    """exp(mean), to 9 digits; None where nothing was predicted. DataError where the model gave no number."""
    if tokens == 0:
        return None
    mean = nll / tokens
    if not math.isfinite(mean) or mean > 700:
        raise DataError(f"{place}: the model gives a mean -log p of {mean}; are its weights sound?")
    return float(f"{math.exp(mean):.9g}")


def quarantine_of(output: Path) -> Path:
    """Where malformed lines go: the leading ``_`` keeps them out of a folder given as input."""
    return output.with_name(f"_{output.name}.quarantine.jsonl")


def _write_quarantine(path: Path, states: list[dict[str, Any]]) -> None:
    """What was set aside, as ``prepare_data`` writes it; no file where there is nothing."""
    aside = [entry for state in states for entry in state["aside"]]
    path.unlink(missing_ok=True)
    if aside:
        path.write_text("".join(json.dumps(entry) + "\n" for entry in aside), encoding="ascii")


def _size(path: str) -> int:
    with contextlib.suppress(OSError):  # opening it says what is wrong
        return os.path.getsize(path)
    return 0


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds + 0.5), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
