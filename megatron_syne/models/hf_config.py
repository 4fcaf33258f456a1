"""Hugging Face ``config.json`` to :class:`ModelConfig` and back, for every family.

Nothing is dropped in silence: a key that is neither read here nor listed as harmless is refused, since a
field that a converter ignores changes the model without any error. Both of transformers' forms are read
(4.x: ``rope_theta``, ``rope_scaling``, ``torch_dtype``; 5.x: ``rope_parameters``, ``dtype``) and both are
written. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_syne.config.schema import ModelConfig
from megatron_syne.errors import DataError, SecurityRefusal
from megatron_syne.models.family import REQUIRED, Family, completed, family_of, known
from megatron_syne.models.hf_rope import is_number, read_rope, shown, written_rope

# Keys of every configuration that would change the model, and the only value of them that this stack computes.
_ONLY: dict[str, Any] = {
    "attention_dropout": 0,
    "rope_interleaved": False,
    "partial_rotary_factor": 1,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
}

# Keys that do not change what the model computes; they are carried over to an exported config.json. The last
# line is read elsewhere in this module.
# fmt: off
_HARMLESS = frozenset({
    "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "bos_token_id", "eos_token_id",
    "id2label", "is_decoder", "label2id", "name_or_path", "output_attentions", "output_hidden_states",
    "pad_token_id", "pretraining_tp", "return_dict", "tokenizer_class", "torchscript",
    "transformers_version", "unk_token_id", "unsloth_fixed", "unsloth_version", "use_cache",
    "architectures", "auto_map", "dtype", "layer_types", "model_type", "rope_parameters", "rope_scaling",
    "rope_theta", "torch_dtype",
})
# fmt: on


def model_config_from_hf(config: Mapping[str, Any], where: str) -> ModelConfig:
    """A fully resolved :class:`ModelConfig` from the contents of a ``config.json``.

    ``where`` is named in messages. Raises DataError that lists every field which is missing, malformed,
    unknown, or would be dropped; SecurityRefusal where the model wants to bring code (``auto_map``) and what
    that code computes is not known.
    """
    family = _family(config, where)
    problems = _unsupported(config, family)
    values = _read_fields(config, family, problems)
    values |= read_rope(config, problems)
    if not problems:
        problems += _layer_types(config, values)
    try:
        config_dtype(config, where)
    except DataError as error:
        problems.append(str(error).removeprefix(f"{where}: "))
    if problems:
        raise DataError(f"{where}: " + "; ".join(problems))
    return completed(ModelConfig(model_type=family.model_type, **values))


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
    model, family = completed(model), family_of(model.model_type)
    config = dict(base or {})
    config["architectures"], config["model_type"] = [family.architecture], family.model_type
    for field in family.fields:
        config[field.key] = getattr(model, field.name)
    config.update({key: family.only[key] for key in family.written})
    config.update(written_rope(model))
    if config.get("layer_types") is not None:  # as many as there are layers now
        config["layer_types"] = [_layer_type(model.window_size)] * int(model.num_layers or 0)
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


def _family(config: Mapping[str, Any], where: str) -> Family:
    """By ``model_type``, or where that is absent by the architecture; the two must agree."""
    model_type, architectures = config.get("model_type"), config.get("architectures") or None
    families = [family_of(name) for name in known()]
    family = next((f for f in families if f.model_type == model_type), None)
    if model_type is None:
        family = next((f for f in families if [f.architecture] == architectures), None)
    supported = ", ".join(f"{f.architecture!r} ({f.model_type!r})" for f in families)
    if config.get("auto_map") is not None and not (family and family.brings_code):
        raise SecurityRefusal(
            f"{where}: auto_map asks to run code that comes with the model; this is never done. "
            f"Supported without it: {supported}"
        )
    if family is None or architectures not in (None, [family.architecture]):
        raise DataError(
            f"{where}: architectures {shown(architectures)}, model_type {shown(model_type)}: "
            f"not supported; supported: {supported}"
        )
    return family


def _unsupported(config: Mapping[str, Any], family: Family) -> list[str]:
    """Keys that are set to what this stack does not compute, and keys that it does not know."""
    problems = []
    known_keys = _HARMLESS | family.harmless | {field.key for field in family.fields}
    only = _ONLY | dict(family.only)
    for key, value in config.items():
        if value is None or key in known_keys:
            continue
        if key not in only:
            problems.append(f"{key}: {shown(value)} is not known here and would be dropped")
        elif value != only[key]:
            problems.append(f"{key}: {shown(value)} is not supported; supported: {only[key]!r}")
    return problems


def _read_fields(config: Mapping[str, Any], family: Family, problems: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for field in family.fields:
        value = config.get(field.key, field.default)
        if value is REQUIRED or (value is None and not field.null):
            problems.append(f"{field.key}: missing")
        elif value is None:
            values[field.name] = None
        elif field.kind is bool and not isinstance(value, bool):
            problems.append(f"{field.key}: expected true or false, found {shown(value)}")
        elif field.kind is not bool and not (is_number(value) and value > 0 and field.kind(value) == value):
            problems.append(f"{field.key}: expected a positive {field.kind.__name__}, found {shown(value)}")
        else:
            values[field.name] = field.kind(value)
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


def _layer_types(config: Mapping[str, Any], values: dict[str, Any]) -> list[str]:
    """All layers attend alike here: 5.x's list may say nothing else."""
    found, layers = config.get("layer_types"), values["num_layers"]
    expected = _layer_type(values.get("window_size"))
    if found is None or found == [expected] * layers:
        return []
    return [f"layer_types: expected {layers} times {expected!r}, found {shown(found)}"]


def _layer_type(window_size: int | None) -> str:
    return "full_attention" if window_size is None else "sliding_attention"
