"""Find a rank's FP8 layers in its model and hand them out as one :class:`Fp8Layers`."""

from __future__ import annotations

from typing import Any

from megatron_syne.config.schema import PrecisionConfig, RunConfig
from megatron_syne.fp8.choice import emulates_fp8, layers_in_bf16
from megatron_syne.fp8.layers import Fp8Layers
from megatron_syne.platform.base import Platform

LINEARS = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
"""The FP8 layers of a transformer layer; attention, norms, embedding and output layer stay in bf16."""


def attach_fp8(chunks: list[Any], config: RunConfig, platform: Platform) -> Fp8Layers | None:
    """This rank's FP8 layers, emulated or Transformer Engine's; None without FP8. Before DDP is built."""
    precision = config.precision
    if precision.fp8 is None:
        return None
    from megatron.core import parallel_state

    decoders = [decoder_of(chunk) for chunk in chunks]
    found = [(decoder, linears(decoder)) for decoder in decoders]
    group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
    bf16_layers = layers_in_bf16(precision, decoders[0].config.num_layers)
    if emulates_fp8(precision, platform.name):
        from megatron_syne.fp8.emulated_layers import EmulatedFp8

        return EmulatedFp8(found, settings(precision, group), bf16_layers)
    from megatron_syne.platform.cuda_fp8 import EngineFp8

    return EngineFp8(found, precision, bf16_layers)


def settings(precision: PrecisionConfig, group: Any) -> Any:
    """The emulation's settings."""
    from megatron_syne.fp8.emulation import Settings
    from megatron_syne.fp8.recipes import formats

    forward, backward = formats(precision.fp8_format)
    return Settings(
        recipe=str(precision.fp8),
        forward=forward,
        backward=backward,
        margin=precision.fp8_margin,
        history_len=precision.fp8_amax_history_len,
        algo=precision.fp8_amax_compute_algo,
        group=group,
    )


def decoder_of(chunk: Any) -> Any:
    """The decoder block inside DDP and the 16-bit wrapper."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk.decoder


def linears(decoder: Any) -> dict[str, tuple[int, Any]]:
    """``decoder.layers.3.mlp.linear_fc1`` -> (3, module), by global layer numbers (the engine's begin at 1)."""
    return {
        f"decoder.layers.{layer.layer_number - 1}.{name}": (
            layer.layer_number - 1,
            layer.get_submodule(name),
        )
        for layer in decoder.layers
        for name in LINEARS
    }
