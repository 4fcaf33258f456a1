"""NEFTune: noise on the embeddings while training (arXiv 2310.05914)."""

from __future__ import annotations

from typing import Any

import torch

from megatron_syne.config.schema import RunConfig


def add_embedding_noise(gpt: Any, config: RunConfig) -> None:
    """Make a ``GPTModel`` of the first stage add ``train.neftune_noise_alpha``'s noise while it trains."""


def announce_samples(model: Any, sample_ids: torch.Tensor | None) -> None:
    """Say which samples of the run ([micro batch], int64) the next micro-batch holds: the noise is theirs."""
