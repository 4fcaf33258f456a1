"""A block of lines to tokens: a pure function, so the bytes do not depend on where it runs (see ``workers``)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_syne.data.documents.blocks import Block
from megatron_syne.data.documents.jsonl import BadLine, Line, number_in, record_of, text_in
from megatron_syne.data.preparation.fim import cut, rearrange
from megatron_syne.data.preparation.job import TRAIN, VALID, Job
from megatron_syne.data.tokenizer import Tokenizer
from megatron_syne.data.tokens.indexed import token_dtype


@dataclass
class Encoded:
    """What one block became; lists are indexed by part (training, validation)."""

    tokens: list[NDArray[Any]] = field(default_factory=list)
    """[tokens of all documents], flat."""
    lengths: list[NDArray[np.int32]] = field(default_factory=list)
    numbers: list[NDArray[np.float64]] = field(default_factory=list)
    """[fields kept, documents]."""
    text_bytes: list[int] = field(default_factory=lambda: [0, 0])
    too_short: list[int] = field(default_factory=lambda: [0, 0])
    highest: list[int] = field(default_factory=lambda: [0, 0])
    lines: int = 0
    blank: int = 0
    empty: int = 0
    bad: list[tuple[Line, str, int]] = field(default_factory=list)
    """Malformed lines: (line, reason, byte)."""


def encode_block(block: Block, tokenizer: Tokenizer, job: Job) -> Encoded:
    """Texts of some lines to tokens, by part; pure."""
    lines = block.lines()
    out = Encoded(lines=len(lines))
    texts: list[list[str]] = [[], []]
    numbers: list[list[list[float]]] = [[], []]
    for line in lines:
        try:
            record = record_of(line)
            if record is None:
                out.blank += 1
                continue
            text = text_in(record, job.json_key, line)
            kept = [number_in(record, name, line) for name in job.keep]
        except BadLine as error:
            out.bad.append((line, error.reason, error.byte))
            continue
        if not text or text.isspace():
            out.empty += 1
        else:
            part = part_of(text, job)
            texts[part].append(text)
            numbers[part].append(kept)
    for part, documents in enumerate(texts):
        _encode_part(out, part, documents, numbers[part], tokenizer, job)
    return out


def part_of(text: str, job: Job) -> int:
    """Whether a document is for training or held out."""
    if job.valid_prefix is None:
        return TRAIN
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, key=b"%d" % job.seed).digest()
    return VALID if int.from_bytes(digest, "little") < job.valid_fraction * 2.0**64 else TRAIN


def _encode_part(
    out: Encoded,
    part: int,
    texts: Sequence[str],
    numbers: Sequence[Sequence[float]],
    tokenizer: Tokenizer,
    job: Job,
) -> None:
    dtype = token_dtype(tokenizer.vocab_size)
    documents, counts = _tokens_of(texts, tokenizer, job, dtype)
    kept = [index for index, count in enumerate(counts) if count >= max(job.min_tokens, 1)]
    out.too_short[part] = len(counts) - len(kept)
    out.text_bytes[part] = sum(len(texts[index].encode("utf-8")) for index in kept)
    lengths = np.array([documents[index].size for index in kept], dtype=np.int32)
    flat = np.concatenate([documents[index] for index in kept]) if kept else np.zeros(0, dtype)
    if job.append_eod:
        assert tokenizer.eos_id is not None
        flat = np.insert(flat, np.cumsum(lengths), tokenizer.eos_id)
        lengths += 1
    if job.prepend_bos:
        assert tokenizer.bos_id is not None
        flat = np.insert(flat, np.cumsum(lengths) - lengths, tokenizer.bos_id)
        lengths += 1
    out.highest[part] = int(flat.max()) if flat.size else 0
    out.tokens.append(flat.astype(dtype, copy=False))
    out.lengths.append(lengths)
    columns = np.array([numbers[index] for index in kept], dtype=np.float64)
    out.numbers.append(np.ascontiguousarray(columns.reshape(len(kept), len(job.keep)).T))


def _tokens_of(
    texts: Sequence[str], tokenizer: Tokenizer, job: Job, dtype: np.dtype[Any]
) -> tuple[list[NDArray[Any]], list[int]]:
    """Tokens of each document, and how many are its own (no sentinels)."""
    if not texts:
        return [], []
    if job.fim is None:
        documents = tokenizer.encode_batch(texts)
        return documents, [document.size for document in documents]
    cuts = [cut(text, job.fim, job.seed) for text in texts]
    sentinels = job.fim.sentinels(tokenizer)
    pieces: list[str] = []
    for text, found in zip(texts, cuts, strict=True):
        pieces += [text] if found is None else found[:3]
    encoded = iter(tokenizer.encode_batch(pieces))
    documents, counts = [], []
    for found in cuts:
        if found is None:
            documents.append(next(encoded))
            counts.append(documents[-1].size)
        else:
            three = [next(encoded) for _ in range(3)]
            documents.append(rearrange(three, found.suffix_first, sentinels, dtype))
            counts.append(sum(piece.size for piece in three))
    return documents, counts
