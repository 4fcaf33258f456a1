"""Which parameters train, and with which share of the learning rate and weight decay."""

from __future__ import annotations

from typing import Any

from torch import nn

from megatron_syne.config.schema import RunConfig


def set_trainable(chunks: list[nn.Module], config: RunConfig) -> None:
    """Freeze what ``optimizer.freeze`` and ``train_only`` say, before DDP is built; all ranks must call."""


def group_overrides(config: RunConfig) -> dict[Any, Any] | None:
    """megatron-core's ``config_overrides`` for ``optimizer.groups``; None = its own rule."""
    return None
