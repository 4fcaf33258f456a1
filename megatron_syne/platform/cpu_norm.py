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
            normed: torch.Tensor = _RmsNorm.apply(x, weight, self.eps)  # type: ignore[no-untyped-call]
            return normed.to(dtype)
        return F.layer_norm(x, weight.shape, weight, bias, self.eps).to(dtype)


class _RmsNorm(torch.autograd.Function):
    """RMSNorm (Zhang and Sennrich, arXiv 1910.07467) computed in fp32, with its gradient by hand: torch's own is put
    together out of a dozen small operations and takes 1.7 times as long here.

    With r = 1 / rms(x), n = r x and mean over the last dimension: y = w n;
    dx = r (w dy - n mean(w dy n)), dw = sum over tokens of dy n.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        normed: torch.Tensor = wide * scale
        return normed.mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        width = x.shape[-1]
        above, wide_weight = gradients[0].float(), weight.float()
        normed = x * scale
        product = (above * normed).reshape(-1, width)
        mean = torch.mv(product, wide_weight).div_(-width).view(scale.shape)
        below = (above * wide_weight).addcmul_(normed, mean).mul_(scale)
        return below.to(x.dtype), product.sum(dim=0).to(weight.dtype), None
