"""What a family of models is to configurations, and how the families are found. No torch.

One module in ``megatron_syne/models/families`` per ``model_type`` of Hugging Face's configuration, holding
``FAMILY``. What reads and writes ``config.json`` (``hf_config``) knows no family by name.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from megatron_syne.config.schema import ModelConfig
from megatron_syne.errors import ConfigError
from megatron_syne.models import families

REQUIRED: Any = object()

ROPE_DEFAULTS = {
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_original_max_position_embeddings": 8192,
}
"""Llama-3.1's constants, which a scaling without them has (all released models have these)."""


@dataclass(frozen=True)
class Field:
    """A number or flag in ``config.json`` that is a field of :class:`ModelConfig`."""

    key: str
    """Hugging Face's name."""
    name: str
    """Ours."""
    kind: type
    """``int``, ``float`` or ``bool``."""
    default: Any = REQUIRED
    """What transformers' class takes where the key is absent."""
    null: bool = False
    """Whether ``null`` has a meaning (derived from other fields, or none)."""


@dataclass(frozen=True)
class Family:
    """Everything that tells one family's configuration from another's."""

    model_type: str
    architecture: str
    """Name of transformers' class."""
    fields: tuple[Field, ...]
    only: Mapping[str, Any]
    """Keys that would change the model, and the one value of each that is computed here."""
    written: tuple[str, ...]
    """Keys of ``only`` that an exported ``config.json`` states."""
    constants: Mapping[str, Any]
    """Fields of :class:`ModelConfig` that follow from the family, since no key gives them."""
    presets: Mapping[str, ModelConfig]
    """Shapes of released models, as their ``config.json`` has them."""
    harmless: frozenset[str] = frozenset()
    """Keys of this family that do not change what the model computes."""
    brings_code: bool = False
    """Whether released folders name code of their own (``auto_map``). It is never run; the key is let pass,
    since what the code computes is known here."""


LLAMA_CONSTANTS: Mapping[str, Any] = {
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": False,
    "add_qkv_bias": False,
}
"""``Family.constants`` of Llama and of everything computed like it."""

RMS_NORM_EPS = Field("rms_norm_eps", "layernorm_epsilon", float, 1e-6)


def llama_fields(
    positions: int = 2048, groups: int | None = None, epsilon: Field = RMS_NORM_EPS
) -> tuple[Field, ...]:
    """The fields of ``LlamaConfig`` and of the configurations made after it, which differ in the defaults of
    ``max_position_embeddings`` and ``num_key_value_heads``."""
    return (
        Field("num_hidden_layers", "num_layers", int),
        Field("hidden_size", "hidden_size", int),
        Field("intermediate_size", "ffn_hidden_size", int),
        Field("num_attention_heads", "num_attention_heads", int),
        Field("num_key_value_heads", "num_query_groups", int, groups, null=True),
        Field("head_dim", "kv_channels", int, None, null=True),
        Field("vocab_size", "vocab_size", int),
        Field("max_position_embeddings", "max_position_embeddings", int, positions),
        epsilon,
        Field("initializer_range", "init_method_std", float, 0.02),
        Field("tie_word_embeddings", "share_embeddings_and_output_weights", bool, False),
    )


def shape(
    hidden: int,
    layers: int,
    heads: tuple[int, int],
    head: int,
    ffn: int,
    *,
    vocab: int,
    positions: int,
    base: float,
    eps: float = 1e-5,
    factor: float | None = None,
    window: int | None = None,
    tied: bool = False,
) -> ModelConfig:
    """A preset: ``heads`` are query and key/value heads, ``head`` the size of one, ``factor`` Llama-3.1's."""
    return ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads[0],
        num_query_groups=heads[1],
        kv_channels=head,
        vocab_size=vocab,
        max_position_embeddings=positions,
        layernorm_epsilon=eps,
        window_size=window,
        rotary_base=base,
        rope_scaling_factor=factor,
        share_embeddings_and_output_weights=tied,
        init_method_std=0.02,
    )


@cache
def known() -> tuple[str, ...]:
    """The ``model_type`` of every family, in alphabetical order."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(families.__path__)))


def family_of(model_type: str | None) -> Family:
    """The family of a ``model_type``. Raises ConfigError for one that is not known."""
    if model_type not in known():
        supported = ", ".join(map(repr, known()))
        raise ConfigError(f"model.model_type: {model_type!r} is not supported; supported: {supported}")
    family: Family = importlib.import_module(f"{families.__name__}.{model_type}").FAMILY
    return family


def completed(model: ModelConfig) -> ModelConfig:
    """The model with what follows from its family and from its other fields filled in where it is not given.

    Raises ConfigError for a family that is not known.
    """
    implied = dict(family_of(model.model_type).constants)
    if model.rope_scaling_factor is not None:
        implied |= ROPE_DEFAULTS
    hidden, heads = model.hidden_size, model.num_attention_heads
    if hidden and heads and hidden % heads == 0:
        implied["kv_channels"] = hidden // heads
    absent = {name: value for name, value in implied.items() if getattr(model, name) is None}
    return dataclasses.replace(model, **absent)
