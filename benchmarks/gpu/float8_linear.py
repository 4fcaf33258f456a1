"""A linear layer whose three products are of float8 numbers, scaled anew each time (dynamic scaling).

What torchao's float8 training does by two of its recipes, written with ``torch._scaled_mm``: *tensorwise*, one scale a
tensor, gradients in E5M2; *rowwise*, one scale a row of what is summed over, all in E4M3. The scales are fp32, of each
tensor's own largest value. To be compiled: alone, casts and transpositions would be kernels of their own.
"""

from __future__ import annotations

from typing import Any

import torch

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def scaled(x: torch.Tensor, dtype: torch.dtype, rowwise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, columns] -> (float8 of it, fp32 scale that undoes it: a scalar, or [rows, 1])."""
    most = torch.finfo(dtype).max
    x = x.float()
    largest = x.abs().amax(dim=1, keepdim=True) if rowwise else x.abs().amax()
    scale = most / largest.clamp(min=1e-12)
    return (x * scale).clamp(-most, most).to(dtype), scale.reciprocal()


def product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, rowwise: bool, fast: bool) -> torch.Tensor:
    """bf16 a @ b^T through float8; a [m, k] (of ``dtype``), b [n, k] (E4M3). Each scale is of a row of k numbers."""
    first, undo_first = scaled(a, dtype, rowwise)
    second, undo_second = scaled(b, E4M3, rowwise)
    return torch._scaled_mm(
        first.contiguous(),
        second.contiguous().t(),
        scale_a=undo_first,
        scale_b=undo_second.t() if rowwise else undo_second,
        out_dtype=torch.bfloat16,
        use_fast_accum=fast,
    )


class _Float8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, rowwise: bool) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rowwise = rowwise
        return product(x, weight, E4M3, rowwise, fast=True)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        (gradient,), (x, weight), rowwise = gradients, ctx.saved_tensors, ctx.rowwise
        dtype = E4M3 if rowwise else E5M2
        # fast accumulation as in torchao's recipes: off for the gradients of tensorwise, on for all of rowwise
        to_x = product(gradient, weight.t(), dtype, rowwise, fast=rowwise)
        to_weight = product(gradient.t(), x.t(), dtype, rowwise, fast=rowwise)
        return to_x.to(x.dtype), to_weight.to(weight.dtype), None


def float8_linear(x: torch.Tensor, weight: torch.Tensor, rowwise: bool) -> torch.Tensor:
    """x [..., in] times weight [out, in], all sizes multiples of 16 -> bf16 [..., out]."""
    flat = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
    apply: Any = _Float8Linear.apply
    result: torch.Tensor = apply(flat, weight, rowwise)
    return result.view(*x.shape[:-1], weight.shape[0])
