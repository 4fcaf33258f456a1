"""A preparation in n parts, for an array of jobs, and their merge to the very files that one run gives.

The inputs count as one long row of bytes, cut into n equal stretches. A plain JSONL file is cut there, at the next
line; any other (compressed, parquet, plain text) belongs whole to the part in whose stretch it begins.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from megatron_syne.data.documents.inputs import check_file, is_plain_jsonl
from megatron_syne.data.preparation.job import Job
from megatron_syne.data.preparation.journal import request_of
from megatron_syne.errors import CannotCreate

_PIECE = 1 << 20


class Part(NamedTuple):
    """A file, or the bytes of it that a shard reads."""

    file: str
    span: tuple[int, int] | None = None


def plan_shard(files: Sequence[str], index: int, count: int) -> list[Part]:
    """What the ``index``-th (from 0) of ``count`` shards reads; all of them together read every line once."""
    sizes = [check_file(file).st_size for file in files]
    total = sum(sizes)
    begin, end = total * index // count, total * (index + 1) // count
    parts, at = [], 0
    for file, size in zip(files, sizes, strict=True):
        low, high = max(begin - at, 0), min(end - at, size)
        begins_here = begin <= at < end or (index == count - 1 and at == total)
        if begins_here and (high == size or not is_plain_jsonl(file)):
            parts.append(Part(file))
        elif low < high and is_plain_jsonl(file):
            span = _line_start(file, low, size), _line_start(file, high, size)
            if span[0] < span[1]:
                parts.append(Part(file) if span == (0, size) else Part(file, span))
        at += size
    return parts


def _line_start(file: str, at: int, size: int) -> int:
    """Where the first line begins that begins at byte ``at`` or behind it."""
    if at == 0 or at >= size:
        return min(at, size)
    with open(file, "rb") as stream:
        stream.seek(at - 1)
        while piece := stream.read(_PIECE):
            if (end := piece.find(b"\n")) >= 0:
                return stream.tell() - len(piece) + end + 1
    return size


def lines_before(part: Part) -> int:
    """Lines of the file before the part."""
    left, lines = part.span[0] if part.span else 0, 0
    with open(part.file, "rb") as stream:
        while piece := stream.read(min(_PIECE, left)):
            lines += piece.count(b"\n")
            left -= len(piece)
    return lines


def shard_request(job: Job, files: Sequence[str], fingerprint: str) -> str:
    """What all shards of one preparation have in common."""
    split = [job.valid_fraction, job.seed] if job.valid_prefix is not None else None
    inputs = [[file, os.path.getsize(file)] for file in files]
    return request_of(1, job.options(), split, job.max_line_bytes, list(job.keep), fingerprint, inputs)


def finished_shard(job: Job, request: str) -> list[dict[str, Any]] | None:
    """The manifests of a shard made before, None where it is still to do (CannotCreate: one of another request)."""
    manifests = []
    for prefix in job.prefixes():
        if not os.path.exists(f"{prefix}.json"):
            return None
        with open(f"{prefix}.json", encoding="utf-8") as stream:
            try:
                manifest = json.load(stream)
                found = manifest["shard"]["request"]
            except (ValueError, KeyError, TypeError):
                found = None
        if found != request and not job.overwrite:
            raise CannotCreate(
                f"{prefix}.json: exists already, made from other inputs or with other options; choose another "
                f"output prefix or pass --overwrite"
            )
        manifests.append(manifest)
    return manifests
