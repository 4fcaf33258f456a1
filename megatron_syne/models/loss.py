"""The loss of a token: cross entropy over the true vocabulary, with z-loss where asked for."""

from __future__ import annotations

from typing import Any

from megatron_syne.config.schema import ModelConfig, RunConfig


def install_loss(gpt: Any, config: RunConfig, model: ModelConfig) -> None:
    """Make a ``GPTModel`` of the last stage compute this run's loss."""
