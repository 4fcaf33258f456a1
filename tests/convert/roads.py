"""The two directions in one call each, as the tool takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_syne.config.schema import ParallelConfig
from megatron_syne.convert.engine import convert
from megatron_syne.convert.files import Progress, quiet
from megatron_syne.convert.formats.detect import open_weights
from megatron_syne.convert.formats.hf import plan_hf
from megatron_syne.convert.formats.shards import plan_shards
from megatron_syne.convert.numbers import SHORT_NAMES


def to_shards(
    source: Path,
    out: Path,
    parallel: ParallelConfig | None = None,
    make_vocab_size_divisible_by: int = 1,
    overwrite: bool = False,
    progress: Progress = quiet,
) -> Path:
    """Any weights to shards; the new folder."""
    weights = open_weights(source)
    try:
        target = plan_shards(
            weights, parallel or ParallelConfig(), make_vocab_size_divisible_by=make_vocab_size_divisible_by
        )
        convert(weights, target, out, overwrite=overwrite, progress=progress)
    finally:
        weights.close()
    return out


def to_hf(source: Path, out: Path, dtype: str | None = None, overwrite: bool = False, **options: Any) -> Path:
    """Any weights to a Hugging Face folder; the new folder."""
    weights = open_weights(source)
    try:
        target = plan_hf(weights, dtype=None if dtype is None else SHORT_NAMES[dtype], **options)
        convert(weights, target, out, overwrite=overwrite)
    finally:
        weights.close()
    return out
