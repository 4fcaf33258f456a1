"""What a preparation is asked to do."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_syne.data.documents.inputs import STDIN
from megatron_syne.data.documents.jsonl import MAX_LINE_BYTES
from megatron_syne.data.preparation.fim import FillInMiddle
from megatron_syne.data.tokens.fields import check_field_name
from megatron_syne.errors import ConfigError

TRAIN, VALID = 0, 1


@dataclass(frozen=True)
class Job:
    """One preparation: inputs to one prefix, or to two disjoint ones (training, validation)."""

    inputs: Sequence[str | Path]
    """Files (JSONL, plain text, parquet; gzip, zstd), folders, or ``-``; in order."""
    tokenizer: str | Path
    """Folder (or file) of the tokenizer."""
    output_prefix: str | Path
    """``.bin``, ``.idx`` and ``.json`` are appended."""
    json_key: str = "text"
    """Field that holds the text."""
    min_tokens: int = 10
    """Documents with fewer tokens than this, counted without EOS, BOS and sentinels, are dropped."""
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
    """Seed of that choice and of fill-in-the-middle."""
    max_line_bytes: int = MAX_LINE_BYTES
    """A longer line is malformed: it would be read into memory whole."""
    append_eod: bool = True
    """End each document with EOS."""
    prepend_bos: bool = False
    """Begin each document with BOS."""
    keep: Sequence[str] = ()
    """Fields whose number is stored with each document."""
    fim: FillInMiddle | None = None
    """Fill in the middle; not given = documents stay as they are."""
    shard: tuple[int, int] | None = None
    """(i, n): only the i-th (from 0) of n parts of the inputs, to ``<prefix>.shard-i-of-n``."""

    def prefixes(self) -> list[str]:
        """Prefixes written: of training, and of validation if asked for."""
        names = [str(self.output_prefix)] + ([] if self.valid_prefix is None else [str(self.valid_prefix)])
        return names if self.shard is None else [shard_prefix(name, *self.shard) for name in names]

    def options(self) -> dict[str, Any]:
        """What the manifest says of the options: those that decide the bytes."""
        options: dict[str, Any] = {
            "json_key": self.json_key,
            "min_tokens": self.min_tokens,
            "on_error": self.on_error,
            "append_eod": self.append_eod,
            "prepend_bos": self.prepend_bos,
        }
        if self.fim is not None:
            tokens = list(self.fim.tokens)
            options["fim"] = {
                "rate": self.fim.rate,
                "spm_rate": self.fim.spm_rate,
                "tokens": tokens,
                "seed": self.seed,
            }
        return options


def shard_prefix(prefix: str, index: int, count: int) -> str:
    """Prefix of one part of a sharded preparation."""
    return f"{prefix}.shard-{index:05d}-of-{count:05d}"


def check_job(job: Job) -> None:
    """Refuse (ConfigError) what cannot run, before anything is opened."""
    if not job.inputs:
        raise ConfigError("--input: give at least one file or folder")
    if job.min_tokens < 0 or job.workers < 1 or job.max_line_bytes < 1:
        raise ConfigError("--min-tokens must be at least 0, --workers and --max-line-bytes at least 1")
    if job.valid_prefix is not None:
        if not 0 < job.valid_fraction < 1:
            raise ConfigError(f"--valid-fraction: must lie between 0 and 1, found {job.valid_fraction}")
        if os.path.realpath(job.valid_prefix) == os.path.realpath(job.output_prefix):
            raise ConfigError("--valid-prefix: must differ from --output-prefix")
    for name in job.keep:
        check_field_name(name)
    if len(set(job.keep)) < len(job.keep) or job.json_key in job.keep:
        raise ConfigError("--keep: each field once, and not the text")
    if job.shard is not None:
        index, count = job.shard
        if not 0 <= index < count <= 99_999:
            raise ConfigError(f"--shard: {index}/{count}: expected i/n with 0 <= i < n <= 99999")
        if STDIN in map(str, job.inputs):
            raise ConfigError("--shard: standard input cannot be cut into parts; give files")


def check_inputs(files: Sequence[str]) -> None:
    """Refuse (ConfigError) the same file twice."""
    seen: set[str] = set()
    for file in files:
        name = file if file == STDIN else os.path.realpath(file)
        if name in seen:
            raise ConfigError(f"--input: {file} is given twice; its documents would be doubled")
        seen.add(name)
