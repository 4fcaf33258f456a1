"""What a preparation counts, how it shows its progress, and the manifest made from it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_syne.data.preparation.encode import Encoded
from megatron_syne.data.preparation.job import TRAIN, Job
from megatron_syne.data.tokenizer import Tokenizer
from megatron_syne.data.tokens.indexed import token_dtype
from megatron_syne.data.tokens.manifest import MANIFEST_FORMAT, MANIFEST_VERSION


@dataclass
class Totals:
    """Counts over all blocks; lists are indexed by part. Every line is counted once: see :func:`manifest_of`."""

    lines: int = 0
    blank: int = 0
    empty: int = 0
    malformed: int = 0
    too_short: list[int] = field(default_factory=lambda: [0, 0])
    text_bytes: list[int] = field(default_factory=lambda: [0, 0])
    highest: list[int] = field(default_factory=lambda: [0, 0])

    def add(self, encoded: Encoded) -> None:
        self.lines += encoded.lines
        self.blank += encoded.blank
        self.empty += encoded.empty
        self.malformed += len(encoded.bad)
        for part in range(2):
            self.too_short[part] += encoded.too_short[part]
            self.text_bytes[part] += encoded.text_bytes[part]
            self.highest[part] = max(self.highest[part], encoded.highest[part])

    def describe(self) -> str:
        return (
            f"blank {self.blank}, empty {self.empty}, too short {sum(self.too_short)}, "
            f"malformed {self.malformed}"
        )


def counts_of(totals: Totals, part: int, documents: int, tokens: int) -> dict[str, Any]:
    """lines = documents + blank + empty + malformed + too_short + other_part, for either part.

    ``bytes`` are the UTF-8 bytes of the texts kept. Malformed lines are those in the quarantine.
    """
    dropped = {"blank": 0, "empty": 0, "malformed": 0, "too_short": totals.too_short[part]}
    if part == TRAIN:
        dropped |= {"blank": totals.blank, "empty": totals.empty, "malformed": totals.malformed}
    return {
        "lines": totals.lines,
        "documents": documents,
        "tokens": tokens,
        "bytes": totals.text_bytes[part],
        "dropped": dropped,
        "other_part": totals.lines - documents - sum(dropped.values()),
    }


def manifest_of(
    job: Job,
    tokenizer: Tokenizer,
    part: int,
    highest: int,
    counts: dict[str, Any],
    sources: Sequence[dict[str, Any]],
    files: dict[str, Any],
    fields: dict[str, Any],
) -> dict[str, Any]:
    """The manifest of one prefix."""
    manifest: dict[str, Any] = {
        "format": MANIFEST_FORMAT,
        "version": MANIFEST_VERSION,
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "max_token_id": highest,
        "counts": counts,
        "options": job.options(),
        "tokenizer": {
            "kind": tokenizer.kind,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
        },
        "sources": list(sources),
        "files": files,
    }
    if fields:
        manifest["fields"] = fields
    if job.valid_prefix is not None:
        manifest["split"] = {
            "part": ("train", "valid")[part],
            "valid_fraction": job.valid_fraction,
            "seed": job.seed,
        }
    return manifest


def manifest_bytes(manifest: dict[str, Any]) -> bytes:
    """The manifest as it is written."""
    return (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "surrogateescape")


class Progress:
    """Says at most once a second how far the work is."""

    def __init__(self, total_bytes: int, report: Callable[[str], None] | None) -> None:
        self._total, self._report = total_bytes, report
        self._begin = self._last = time.monotonic()
        self._tokens_before = -1

    def update(self, read_bytes: int, documents: int, tokens: int) -> None:
        if self._tokens_before < 0:  # of a resumed run, those of its predecessor are no speed of ours
            self._tokens_before = tokens
        now = time.monotonic()
        if self._report is None or now - self._last < 1:
            return
        self._last = now
        share = f"{100 * min(read_bytes / self._total, 1):.0f}%  " if self._total else ""
        speed = (tokens - self._tokens_before) / (now - self._begin)
        self._report(f"{share}{documents:,} documents  {tokens:,} tokens  {speed:,.0f} tokens/s")
