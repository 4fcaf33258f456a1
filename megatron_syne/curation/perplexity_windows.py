"""What a model is asked about a document: its windows of tokens, and the batches that many of them make.

A document's perplexity is ``exp(sum of -log p / number of predicted tokens)`` over all of its tokens. It is read
as the model was taught: the beginning-of-text token first, where the tokenizer names one, so that the first
token of the text is predicted too; no end-of-text. What is longer than the context is cut into windows one
after another, as packing cuts samples: each begins with the last token of the one before, so that every token is
predicted once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_syne.config.schema import ParallelConfig

MOST_CONTEXT = 8192
"""Longest window unless asked for more: the logits of one row grow with it (4 bytes x vocabulary x tokens)."""


_IN_FLIGHT = 4
"""Micro-batches per pipeline stage: of a pass, (PP - 1) / (4 PP + PP - 1) of the time is its bubble."""
_MULTIPLE = 16
"""Padded lengths are multiples of this times TP x CP, so that sequence and context parallelism and FP8 can cut
them."""


class Batch(NamedTuple):
    """Windows that are computed together: ``rows`` are their numbers, padded on the right to ``length``."""

    rows: list[int]
    length: int


def windows_of(
    ids: Sequence[int] | NDArray[Any], bos_id: int | None, context: int, first_tokens: int | None = None
) -> list[NDArray[np.int64]]:
    """Windows of a document's tokens, each of at most ``context`` + 1 tokens of which all but the first are
    predicted. None where nothing can be predicted: an empty text, or a single token without one before it."""
    if first_tokens is not None:
        ids = ids[:first_tokens]
    if len(ids) == 0:
        return []
    begin = [] if bos_id is None else [bos_id]
    tokens = np.concatenate([begin, ids]).astype(np.int64)
    return [tokens[at : at + context + 1] for at in range(0, len(tokens) - 1, context)]


def batches_of(lengths: Sequence[int], batch_tokens: int, alike: int = 1) -> list[Batch]:
    """Windows of the given numbers of predicted tokens in batches: longest first, equal ones in their order.

    ``alike``: so many forward passes of one shape are computed at a time (replicas, pipeline); a batch is what
    all of them take, and each of its passes has at most ``batch_tokens`` tokens, padding counted, or one row.
    """
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    batches, at = [], 0
    while at < len(order):
        length = lengths[order[at]]
        rows = max(1, batch_tokens // length) * alike
        batches.append(Batch(order[at : at + rows], length))
        at += rows
    return batches


def padded_rows(windows: Sequence[NDArray[np.int64]], rows: int, length: int) -> NDArray[np.int64]:
    """``[2, rows, length]``: inputs and labels of the windows, -1 where a label is padding (its input is 0)."""
    result = np.zeros((2, rows, length), dtype=np.int64)
    result[1] = -1
    for row, window in enumerate(windows):
        result[0, row, : len(window) - 1] = window[:-1]
        result[1, row, : len(window) - 1] = window[1:]
    return result


def micro_batches(parallel: ParallelConfig) -> int:
    """Micro-batches of one pass through the pipeline, on each replica."""
    stages = parallel.pipeline_model_parallel_size
    return 1 if stages == 1 else _IN_FLIGHT * stages


def padded_length(length: int, parallel: ParallelConfig) -> int:
    """The length that windows of ``length`` tokens are padded to."""
    multiple = _MULTIPLE * parallel.tensor_model_parallel_size * parallel.context_parallel_size
    return -(-length // multiple) * multiple
