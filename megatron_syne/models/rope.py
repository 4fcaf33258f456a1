"""Frequencies of the rotary embedding, with every constant of Llama-3.1's scaling. Pure."""

from __future__ import annotations

import math

import torch

from megatron_syne.config.schema import ModelConfig


def rotary_frequencies(model: ModelConfig) -> torch.Tensor:
    """Radians per position of each pair of channels of a resolved model: fp32, ``[kv_channels / 2]``.

    Plain: ``base ** (-2 i / kv_channels)``. Scaled as transformers' ``_compute_llama3_parameters``: waves
    longer than ``original / low`` are slowed by the factor, those shorter than ``original / high`` left alone,
    and those between blended linearly in the number of turns within the original length. megatron-core's own
    scaling takes the factor only and fixes the rest (1, 4, 8192).
    """
    size, base, factor = model.kv_channels, model.rotary_base, model.rope_scaling_factor
    assert size and base, "resolve_model first"
    plain = 1.0 / (base ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
    if factor is None:
        return plain
    low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
    original = model.rope_original_max_position_embeddings
    assert low and high and original, "resolve_model first"
    wavelength = 2 * math.pi / plain
    kept = (original / wavelength - low) / (high - low)
    blended = (1 - kept) * plain / factor + kept * plain
    scaled = torch.where(wavelength > original / low, plain / factor, blended)
    return torch.where(wavelength < original / high, plain, scaled)
