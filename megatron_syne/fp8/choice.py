"""Whether FP8 is Transformer Engine's or emulated, and which layers stay in bf16. No torch."""

from __future__ import annotations

from megatron_syne.config.schema import PrecisionConfig


def emulates_fp8(precision: PrecisionConfig, platform: str) -> bool:
    """Whether FP8 is emulated: on the CPU platform always, on CUDA only where asked for."""
    if precision.fp8 is None:
        return False
    return platform == "cpu" or bool(precision.fp8_emulation)


def layers_in_bf16(precision: PrecisionConfig, num_layers: int) -> frozenset[int]:
    """Global numbers (from 0) of the layers that ``first_last_layers_bf16`` leaves in bf16."""
    if precision.fp8 is None or not precision.first_last_layers_bf16:
        return frozenset()
    first, last = precision.num_layers_at_start_in_bf16, precision.num_layers_at_end_in_bf16
    return frozenset([*range(min(first, num_layers)), *range(max(0, num_layers - last), num_layers)])


def describe_fp8(precision: PrecisionConfig, platform: str) -> str:
    """How FP8 is computed, for a log line: ``; FP8 delayed, emulated (bf16 products)``; empty without FP8."""
    if precision.fp8 is None:
        return ""
    how = "emulated (bf16 products)" if emulates_fp8(precision, platform) else "Transformer Engine's"
    return f"; FP8 {precision.fp8}, {how}"
