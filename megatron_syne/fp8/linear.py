"""Linear layers of emulated FP8: megatron-core's local ones, their products of values rounded to FP8.

Which copy is rounded where is Transformer Engine's choice (``pytorch/module/linear.py``): the input for the
forward product and the weight's gradient, the weight for the forward product and the input's gradient, the
output's gradient for both gradients. The bias and its gradient are not rounded. Under sequence parallelism
the input is gathered before it is rounded: the same values, since there amaxes are shared over TP.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from megatron_syne.fp8.emulation import ChunkScaling, Phase


class Fp8Product(torch.autograd.Function):
    """``x`` [..., in] times ``weight`` [out, in] transposed, plus bias; both gradients of rounded values too."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scaling: ChunkScaling,
        slot: int,
        phase: Phase,
    ) -> torch.Tensor:
        needs_input, needs_weight = ctx.needs_input_grad[:2]
        ctx.scaling, ctx.slot, ctx.has_bias = scaling, slot, bias is not None
        rows, columns = scaling.round_input(slot, x.reshape(-1, x.shape[-1]), phase, both=needs_weight)
        rounded = scaling.round_weight(slot, weight, phase)
        ctx.save_for_backward(columns if needs_weight else None, rounded if needs_input else None)
        output = rows @ rounded.t()
        if bias is not None:
            output = output + bias
        return output.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (grad,) = gradients
        x, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_input = grad_weight = grad_bias = None
        if x is not None or weight is not None:
            rows, columns = ctx.scaling.round_grad(ctx.slot, flat, both=x is not None)
            if weight is not None:
                grad_input = (rows @ weight).view(*grad.shape[:-1], weight.shape[1])
            if x is not None:
                grad_weight = columns.t() @ x
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = flat.sum(dim=0)
        return grad_input, grad_weight, grad_bias, None, None, None


class Fp8Linear:
    """What both kinds have in common: the product. Until :mod:`fp8.attach` hands it a scaling, the engine's own."""

    scaling: ChunkScaling | None = None
    slot = 0
    layer = 0
    """Global number of its transformer layer, from 0."""

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
        scaling = self.scaling
        if scaling is None or scaling.switches.off or self.layer in scaling.switches.bf16_layers:
            result: torch.Tensor = super()._forward_impl(input=input, weight=weight, **options)  # type: ignore[misc]
            return result
        group = options["tp_group"]
        if options["sequence_parallel"]:
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=group)
        elif options["allreduce_dgrad"]:
            input = copy_to_tensor_model_parallel_region(input, group=group)  # backward: all-reduce
        product: torch.Tensor = Fp8Product.apply(  # type: ignore[no-untyped-call]
            input, weight, options["bias"], scaling, self.slot, scaling.phase(self.slot)
        )
        return product


class Fp8ColumnParallelLinear(Fp8Linear, ColumnParallelLinear):  # type: ignore[misc]
    """``linear_qkv`` and ``linear_fc1``."""


class Fp8RowParallelLinear(Fp8Linear, RowParallelLinear):  # type: ignore[misc]
    """``linear_proj`` and ``linear_fc2``."""


def emulate_linears(spec: Any) -> None:
    """Put these layers into megatron-core's local layer ``ModuleSpec``, in place."""
    attention, mlp = spec.submodules.self_attention.submodules, spec.submodules.mlp.submodules
    attention.linear_qkv, attention.linear_proj = Fp8ColumnParallelLinear, Fp8RowParallelLinear
    mlp.linear_fc1, mlp.linear_fc2 = Fp8ColumnParallelLinear, Fp8RowParallelLinear
