"""A run's model: every field filled, two models compared, the vocabulary padded. No torch."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from megatron_syne.config.schema import ModelConfig
from megatron_syne.errors import ConfigError
from megatron_syne.models.family import ROPE_DEFAULTS, completed, family_of, known
from megatron_syne.models.hf_config import model_config_from_hf
from megatron_syne.models.json_file import read_json

DEFAULT_MODEL_TYPE = "llama"
"""The family of a model that is given by its sizes alone."""

PRESETS: dict[str, ModelConfig] = {
    name: completed(dataclasses.replace(preset, model_type=model_type))
    for model_type in known()
    for name, preset in family_of(model_type).presets.items()
}
"""Shapes of released models, of all families, by name."""


def resolve_model(model: ModelConfig) -> ModelConfig:
    """The model with every field filled: from ``hf_path`` or ``preset``, fields given beside them on top.

    Raises ConfigError that names all missing fields; DataError or MissingInput for the ``config.json``.
    """
    base = ModelConfig()
    if model.hf_path is not None and model.preset is not None:
        raise ConfigError("model: give hf_path or preset, not both")
    if model.preset is not None:
        if model.preset not in PRESETS:
            raise ConfigError(f"model.preset: {model.preset!r} is unknown; known: {', '.join(PRESETS)}")
        base = PRESETS[model.preset]
    elif model.hf_path is not None:
        path = Path(model.hf_path) / "config.json"
        base = model_config_from_hf(read_json(path), str(path))
    given = {k: v for k, v in dataclasses.asdict(model).items() if v is not None}
    resolved = dataclasses.replace(base, **given)
    resolved.model_type = resolved.model_type or DEFAULT_MODEL_TYPE
    if resolved.init_method_std is None:
        resolved.init_method_std = 0.02
    resolved = completed(resolved)
    optional = {"hf_path", "preset", "rope_scaling_factor", *ROPE_DEFAULTS, "window_size"}
    missing = [
        f"model.{f.name}"
        for f in dataclasses.fields(resolved)
        if f.name not in optional and getattr(resolved, f.name) is None
    ]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: not given; set hf_path or preset, or give them")
    _check_resolved(resolved)
    return resolved


def model_differences(ours: ModelConfig, theirs: ModelConfig) -> list[str]:
    """Fields in which two resolved models differ, as ``field: ours against theirs``.

    Left out is what does not belong to the weights: where the shape came from, and padding. What a record of
    an earlier version lacks is filled in first.
    """
    ours, theirs = completed(ours), completed(theirs)
    skip = {"hf_path", "preset", "make_vocab_size_divisible_by", "init_method_std"}
    return [
        f"{f.name}: {getattr(ours, f.name)!r} against {getattr(theirs, f.name)!r}"
        for f in dataclasses.fields(ModelConfig)
        if f.name not in skip and getattr(ours, f.name) != getattr(theirs, f.name)
    ]


def padded_vocab_size(model: ModelConfig, tensor_model_parallel_size: int) -> int:
    """Rows of the embedding over all TP ranks: the vocabulary rounded up to ``make_vocab_size_divisible_by``
    times TP (megatron's ``_vocab_size_with_padding``)."""
    assert model.vocab_size is not None, "resolve_model first"
    multiple = model.make_vocab_size_divisible_by * tensor_model_parallel_size
    return math.ceil(model.vocab_size / multiple) * multiple


def _check_resolved(model: ModelConfig) -> None:
    family = family_of(model.model_type)
    problems = [
        f"model.{name}: {getattr(model, name)!r} is not what {family.model_type!r} has ({value!r})"
        for name, value in family.constants.items()
        if getattr(model, name) != value
    ]
    if model.window_size is not None and "window_size" not in {field.name for field in family.fields}:
        problems.append(
            f"model.window_size: {model.window_size}: {family.model_type!r} has no sliding window"
        )
    for f in dataclasses.fields(model):
        value = getattr(model, f.name)
        if isinstance(value, int | float) and not isinstance(value, bool) and not value > 0:
            problems.append(f"model.{f.name}: {value} must be above 0")
    for name in ROPE_DEFAULTS:
        if model.rope_scaling_factor is None and getattr(model, name) is not None:
            problems.append(f"model.{name}: {getattr(model, name)} needs model.rope_scaling_factor")
    low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
    if low is not None and high is not None and not low < high:
        problems.append(f"model.rope_high_freq_factor: {high} must be above rope_low_freq_factor {low}")
    heads, groups = model.num_attention_heads, model.num_query_groups
    if not problems and heads and groups and heads % groups:
        problems.append(f"model.num_attention_heads: {heads} is not a multiple of num_query_groups {groups}")
    if not problems and model.kv_channels and model.kv_channels % 2:
        problems.append(f"model.kv_channels: {model.kv_channels} is odd, which rotary embedding cannot split")
    if problems:
        raise ConfigError("; ".join(problems))
