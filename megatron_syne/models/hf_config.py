"""Llama: Hugging Face ``config.json`` to :class:`ModelConfig` and back, and the shapes known by name.

Nothing is dropped in silence: a key that is neither read here nor listed as harmless is refused, since a
field that a converter ignores changes the model without any error. Both of transformers' forms are read
(4.x: ``rope_theta``, ``rope_scaling``, ``torch_dtype``; 5.x: ``rope_parameters``, ``dtype``) and both are
written, because 4.x reading a 5.x-only file falls back to a rope base of 10000 without a word. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_syne.config.schema import ModelConfig
from megatron_syne.errors import DataError, SecurityRefusal

ARCHITECTURE = "LlamaForCausalLM"
MODEL_TYPE = "llama"

_LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

_REQUIRED = object()
# Hugging Face key, our field, type, default of transformers' LlamaConfig (None: derived below).
_FIELDS: tuple[tuple[str, str, type, Any], ...] = (
    ("num_hidden_layers", "num_layers", int, _REQUIRED),
    ("hidden_size", "hidden_size", int, _REQUIRED),
    ("intermediate_size", "ffn_hidden_size", int, _REQUIRED),
    ("num_attention_heads", "num_attention_heads", int, _REQUIRED),
    ("num_key_value_heads", "num_query_groups", int, None),
    ("head_dim", "kv_channels", int, None),
    ("vocab_size", "vocab_size", int, _REQUIRED),
    ("max_position_embeddings", "max_position_embeddings", int, 2048),
    ("rms_norm_eps", "layernorm_epsilon", float, 1e-6),
    ("initializer_range", "init_method_std", float, 0.02),
    ("tie_word_embeddings", "share_embeddings_and_output_weights", bool, False),
)

# Keys that would change the model, and the only values of them that this stack computes.
_ONLY: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "hidden_act": ("silu",),
    "attention_dropout": (0,),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "use_sliding_window": (False,),
}

# Keys that do not change what the model computes; they are carried over to an exported config.json.
# fmt: off
_HARMLESS = frozenset({
    "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "architectures", "auto_map",
    "bos_token_id", "dtype", "eos_token_id", "id2label", "is_decoder", "label2id", "model_type",
    "name_or_path", "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp",
    "return_dict", "rope_parameters", "rope_scaling", "rope_theta", "tokenizer_class", "torch_dtype",
    "torchscript", "transformers_version", "unk_token_id", "unsloth_fixed", "unsloth_version", "use_cache",
})
# fmt: on

# Shapes of released models, as their config.json has them.
PRESETS: dict[str, ModelConfig] = {}


def _preset(
    name: str,
    hidden: int,
    layers: int,
    heads: tuple[int, int],
    head: int,
    ffn: int,
    *,
    vocab: int = 128256,
    positions: int = 8192,
    base: float = 500000.0,
    factor: float | None = None,
    tied: bool = False,
) -> None:
    PRESETS[name] = ModelConfig(
        model_type=MODEL_TYPE,
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads[0],
        num_query_groups=heads[1],
        kv_channels=head,
        vocab_size=vocab,
        max_position_embeddings=positions,
        layernorm_epsilon=1e-5,
        rotary_base=base,
        rope_scaling_factor=factor,
        share_embeddings_and_output_weights=tied,
        init_method_std=0.02,
    )


_preset("llama3_8b", 4096, 32, (32, 8), 128, 14336)
_preset("llama3_70b", 8192, 80, (64, 8), 128, 28672)
_preset("llama3_1_8b", 4096, 32, (32, 8), 128, 14336, positions=131072, factor=8.0)
_preset("llama3_1_405b", 16384, 126, (128, 8), 128, 53248, positions=131072, factor=8.0)
_preset("llama3_2_1b", 2048, 16, (32, 8), 64, 8192, positions=131072, factor=32.0, tied=True)
_preset("llama3_2_3b", 3072, 28, (24, 8), 128, 8192, positions=131072, factor=32.0, tied=True)
_preset("llama2_7b", 4096, 32, (32, 32), 128, 11008, vocab=32000, positions=4096, base=10000.0)
_preset("tinyllama_1_1b", 2048, 22, (32, 4), 64, 5632, vocab=32000, positions=2048, base=10000.0)


def model_config_from_hf(config: Mapping[str, Any], where: str) -> ModelConfig:
    """A fully resolved :class:`ModelConfig` from the contents of a ``config.json``.

    ``where`` is named in messages. Raises DataError that lists every field which is missing, malformed,
    unknown, or would be dropped; SecurityRefusal where the model wants to bring code (``auto_map``).
    """
    if config.get("auto_map") is not None:
        raise SecurityRefusal(
            f"{where}: auto_map asks to run code that comes with the model; this is never done. "
            f"Supported without it: {ARCHITECTURE}"
        )
    architectures = config.get("architectures") or [ARCHITECTURE]
    if architectures != [ARCHITECTURE] or config.get("model_type", MODEL_TYPE) != MODEL_TYPE:
        raise DataError(
            f"{where}: architectures {architectures!r}, model_type {config.get('model_type')!r}: "
            f"not supported; supported: {ARCHITECTURE!r}, {MODEL_TYPE!r}"
        )
    problems = _unsupported(config)
    values = _read_fields(config, problems)
    rope = _read_rope(config, problems)
    try:
        config_dtype(config, where)
    except DataError as error:
        problems.append(str(error).removeprefix(f"{where}: "))
    if problems:
        raise DataError(f"{where}: " + "; ".join(problems))
    return ModelConfig(model_type=MODEL_TYPE, rotary_base=rope[0], rope_scaling_factor=rope[1], **values)


def hf_config_from_model(
    model: ModelConfig,
    dtype: str,
    bos_token_id: int | None = None,
    eos_token_id: int | list[int] | None = None,
    base: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The ``config.json`` of a resolved model: inverse of :func:`model_config_from_hf`.

    ``dtype`` is torch's name (``bfloat16``). Starts from ``base``, the configuration of the source, so that
    nothing that it carried is lost; writes the forms of transformers 4.x and 5.x side by side.
    """
    config = dict(base or {})
    config["architectures"], config["model_type"] = [ARCHITECTURE], MODEL_TYPE
    for key, field, _, _ in _FIELDS:
        config[key] = getattr(model, field)
    config.update(hidden_act="silu", attention_bias=False, mlp_bias=False)
    config["rope_theta"] = model.rotary_base
    config["rope_scaling"] = None
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": model.rotary_base}
    if model.rope_scaling_factor is not None:
        scaling = {"rope_type": "llama3", "factor": model.rope_scaling_factor, **_LLAMA3_ROPE}
        config["rope_scaling"] = scaling
        config["rope_parameters"] = {**scaling, "rope_theta": model.rotary_base}
    config["dtype"] = config["torch_dtype"] = dtype
    for key, given in (("bos_token_id", bos_token_id), ("eos_token_id", eos_token_id)):
        # An absent key would mean LlamaConfig's defaults 1 and 2, so "none" is written out.
        config[key] = given if given is not None else config.get(key)
    config.setdefault("attention_dropout", 0.0)
    config.setdefault("use_cache", True)
    return config


def config_dtype(config: Mapping[str, Any], where: str) -> str | None:
    """Torch's name of the weights' format (``dtype`` or ``torch_dtype``); None where neither stands."""
    names = {str(config[key]).removeprefix("torch.") for key in ("dtype", "torch_dtype") if config.get(key)}
    if len(names) > 1:
        raise DataError(
            f"{where}: dtype {config['dtype']!r} and torch_dtype {config['torch_dtype']!r} disagree"
        )
    return names.pop() if names else None


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    """Keys that are set to what this stack does not compute, and keys that it does not know."""
    problems = []
    known = _HARMLESS | {field[0] for field in _FIELDS}
    for key, value in config.items():
        if value is None or key in known:
            continue
        if key not in _ONLY:
            problems.append(f"{key}: {_short(value)} is not known here and would be dropped")
        elif value not in _ONLY[key]:
            problems.append(f"{key}: {_short(value)} is not supported; supported: {_ONLY[key][0]!r}")
    return problems


def _read_fields(config: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, field, kind, default in _FIELDS:
        value = config.get(key)
        if value is None:
            if default is _REQUIRED:
                problems.append(f"{key}: missing")
            values[field] = default
        elif kind is bool and not isinstance(value, bool):
            problems.append(f"{key}: expected true or false, found {_short(value)}")
        elif kind is not bool and not (_is_number(value) and value > 0 and kind(value) == value):
            problems.append(f"{key}: expected a positive {kind.__name__}, found {_short(value)}")
        else:
            values[field] = kind(value)
    if problems:
        return values
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    values["num_query_groups"] = groups = values["num_query_groups"] or heads
    if values["kv_channels"] is None:
        if hidden % heads:
            problems.append(f"hidden_size: {hidden} is not a multiple of num_attention_heads {heads}")
        values["kv_channels"] = hidden // heads
    if values["kv_channels"] % 2:
        problems.append(f"head_dim: {values['kv_channels']} is odd, which rotary embedding cannot split")
    if heads % groups:
        problems.append(f"num_attention_heads: {heads} is not a multiple of num_key_value_heads {groups}")
    return values


def _read_rope(config: Mapping[str, Any], problems: list[str]) -> tuple[float, float | None]:
    """``(base, llama3 factor or None)``; ``rope_parameters`` counts, the older keys must agree with it."""
    theta, scaling = config.get("rope_theta"), config.get("rope_scaling")
    old = _rope_form(
        {**_object(scaling, "rope_scaling", problems), "rope_theta": theta}, problems, "rope_scaling"
    )
    if config.get("rope_parameters") is None:
        return old
    parameters = _object(config["rope_parameters"], "rope_parameters", problems)
    new = _rope_form({"rope_theta": theta, **parameters}, problems, "rope_parameters")
    old_form_given = theta is not None or scaling is not None
    if old_form_given and not problems and new != (old[0] if theta is not None else new[0], old[1]):
        problems.append(
            f"rope_parameters: {_short(parameters)} disagrees with rope_theta {theta!r}, "
            f"rope_scaling {_short(scaling)}"
        )
    return new


def _rope_form(rope: dict[str, Any], problems: list[str], name: str) -> tuple[float, float | None]:
    rope = {key: value for key, value in rope.items() if value is not None}
    kind = rope.pop("rope_type", rope.get("type", "default"))
    if rope.pop("type", kind) != kind:
        problems.append(f"{name}: type and rope_type disagree")
    theta = rope.pop("rope_theta", 10000.0)  # transformers' default
    if rope.pop("partial_rotary_factor", 1) != 1:
        problems.append(f"{name}: partial_rotary_factor other than 1 is not supported")
    if not (_is_number(theta) and theta > 0):
        problems.append(f"rope_theta: expected a positive number, found {_short(theta)}")
        theta = 10000.0
    if kind not in ("default", "llama3"):
        problems.append(f"{name}: rope_type {_short(kind)} is not supported; supported: 'default', 'llama3'")
        return float(theta), None
    factor: Any = rope.pop("factor", None) if kind == "llama3" else None
    if kind == "llama3" and not (_is_number(factor) and factor > 0):
        problems.append(f"{name}: factor: expected a positive number, found {_short(factor)}")
        factor = None
    for key, value in _LLAMA3_ROPE.items() if kind == "llama3" else ():
        found = rope.pop(key, None)
        if found != value:
            problems.append(
                f"{name}: {key}: {_short(found)} is not supported; "
                f"supported: {value} (fixed in megatron-core)"
            )
    for key, value in rope.items():
        problems.append(f"{name}: {key}: {_short(value)} is not known here and would be dropped")
    return float(theta), None if factor is None else float(factor)


def _object(value: Any, name: str, problems: list[str]) -> dict[str, Any]:
    if value is None or isinstance(value, dict):
        return value or {}
    problems.append(f"{name}: expected an object, found {_short(value)}")
    return {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
