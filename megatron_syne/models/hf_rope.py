"""The rotary embedding in a Hugging Face ``config.json``: read in both of transformers' forms, written in both.

4.x: ``rope_theta`` and ``rope_scaling``; 5.x: ``rope_parameters``. Both are written, because 4.x reading a
5.x-only file falls back to a rope base of 10000 without a word. Supported are the plain embedding and Llama-3.1's
scaling with any constants; linear, dynamic, yarn and longrope scaling are refused. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_syne.config.schema import ModelConfig

DEFAULT_BASE = 10000.0
"""transformers' default of ``rope_theta`` in all families here."""

_LLAMA3: tuple[tuple[str, str, type], ...] = (
    ("factor", "rope_scaling_factor", float),
    ("low_freq_factor", "rope_low_freq_factor", float),
    ("high_freq_factor", "rope_high_freq_factor", float),
    ("original_max_position_embeddings", "rope_original_max_position_embeddings", int),
)
"""Hugging Face key, our field, type: all four are required, as in transformers."""


def read_rope(config: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Fields of :class:`ModelConfig`: ``rotary_base`` and, where it is scaled, the four of the scaling.

    ``rope_parameters`` counts, the older keys must agree with it. What is wrong is added to ``problems``.
    """
    theta, scaling = config.get("rope_theta"), _object(config.get("rope_scaling"), "rope_scaling", problems)
    if scaling.get("rope_theta", theta) != theta:  # 4.x ignores the inner one, 5.x takes it
        problems.append(
            f"rope_scaling: rope_theta {scaling['rope_theta']!r} disagrees with rope_theta {theta!r}"
        )
    old = _form(scaling | {"rope_theta": theta}, problems, "rope_scaling")
    if config.get("rope_parameters") is None:
        return old
    parameters = _object(config["rope_parameters"], "rope_parameters", problems)
    new = _form({"rope_theta": theta, **parameters}, problems, "rope_parameters")
    if theta is None:
        old["rotary_base"] = new["rotary_base"]
    if (theta is not None or scaling) and not problems and new != old:
        problems.append(
            f"rope_parameters: {shown(parameters)} disagrees with rope_theta {theta!r}, "
            f"rope_scaling {shown(config.get('rope_scaling'))}"
        )
    return new


def written_rope(model: ModelConfig) -> dict[str, Any]:
    """The keys of ``config.json`` in both forms; inverse of :func:`read_rope`."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if model.rope_scaling_factor is not None:
        rope = {"rope_type": "llama3"} | {key: getattr(model, name) for key, name, _ in _LLAMA3}
    return {
        "rope_theta": model.rotary_base,
        "rope_scaling": rope if model.rope_scaling_factor is not None else None,
        "rope_parameters": rope | {"rope_theta": model.rotary_base},
    }


def _form(rope: dict[str, Any], problems: list[str], where: str) -> dict[str, Any]:
    """One form, its base under ``rope_theta``."""
    rope = {key: value for key, value in rope.items() if value is not None}
    kind = rope.pop("rope_type", rope.get("type", "default"))
    if rope.pop("type", kind) != kind:
        problems.append(f"{where}: type and rope_type disagree")
    if rope.pop("partial_rotary_factor", 1) != 1:
        problems.append(f"{where}: partial_rotary_factor other than 1 is not supported")
    base = rope.pop("rope_theta", DEFAULT_BASE)
    if not (is_number(base) and base > 0):
        problems.append(f"rope_theta: expected a positive number, found {shown(base)}")
        base = DEFAULT_BASE
    values: dict[str, Any] = {"rotary_base": float(base)}
    if kind not in ("default", "llama3"):
        problems.append(f"{where}: rope_type {shown(kind)} is not supported; supported: 'default', 'llama3'")
        return values
    for key, name, number in _LLAMA3 if kind == "llama3" else ():
        found = rope.pop(key, None)
        if not (is_number(found) and found > 0 and number(found) == found):
            problems.append(f"{where}: {key}: expected a positive {number.__name__}, found {shown(found)}")
        else:
            values[name] = number(found)
    low, high = values.get("rope_low_freq_factor"), values.get("rope_high_freq_factor")
    if low is not None and high is not None and not low < high:
        problems.append(f"{where}: high_freq_factor {high} must be above low_freq_factor {low}")
    for key, value in rope.items():
        problems.append(f"{where}: {key}: {shown(value)} is not known here and would be dropped")
    return values


def _object(value: Any, name: str, problems: list[str]) -> dict[str, Any]:
    if value is None or isinstance(value, dict):
        return value or {}
    problems.append(f"{name}: expected an object, found {shown(value)}")
    return {}


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def shown(value: Any) -> str:
    """A value for a message, cut short."""
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
