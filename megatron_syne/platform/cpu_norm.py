"""Norms for the CPU platform: the engine's local ones refuse sequence parallelism and zero-centred weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


class LocalNorm(torch.nn.Module):
    """RMSNorm or LayerNorm, as the engine's configuration says, over the last dimension.

    A zero-centred weight is kept less 1; the sum is taken in fp32, as Transformer Engine does.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = bool(config.layernorm_zero_centered_gamma)
        start = torch.zeros if self.zero_centered else torch.ones
        self.weight = torch.nn.Parameter(start(hidden_size, dtype=config.params_dtype))
        self.bias: torch.nn.Parameter | None = None
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            # read by finalize_model_grads: each TP rank has seen only its part of the sequence
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., hidden]`` -> the same shape and format."""
        dtype, weight, bias = x.dtype, self.weight, self.bias
        if self.zero_centered:
            x, weight = x.float(), weight.float() + 1
            bias = None if bias is None else bias.float()
        if bias is None:
            return F.rms_norm(x, weight.shape, weight, self.eps).to(dtype)
        return F.layer_norm(x, weight.shape, weight, bias, self.eps).to(dtype)
