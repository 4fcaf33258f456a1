"""How families are found, and what each must give."""

from __future__ import annotations

import dataclasses
import pkgutil

import pytest

from megatron_syne.config.schema import ModelConfig
from megatron_syne.convert import families as tables
from megatron_syne.convert.table import entries, hf_tensors
from megatron_syne.errors import ConfigError
from megatron_syne.models.config import PRESETS
from megatron_syne.models.family import completed, family_of, known
from megatron_syne.preflight.size import model_parameters


def test_every_family_has_a_map_and_a_table() -> None:
    assert set(known()) == {module.name for module in pkgutil.iter_modules(tables.__path__)}
    assert {"llama", "mistral", "qwen2"} <= set(known())


@pytest.mark.parametrize("model_type", ["os", "llama.os", "..config", "", None])
def test_nothing_else_is_imported(model_type: str | None) -> None:
    with pytest.raises(ConfigError, match="'llama', "):
        family_of(model_type)


@pytest.mark.parametrize("model_type", known())
def test_the_map_is_complete(model_type: str) -> None:
    family = family_of(model_type)
    assert family.model_type == model_type
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    assert {field.name for field in family.fields} | set(family.constants) <= fields
    assert len({field.key for field in family.fields}) == len(family.fields)
    assert set(family.written) <= set(family.only)
    assert not {field.key for field in family.fields} & (set(family.only) | family.harmless)
    assert completed(ModelConfig(model_type=model_type)).normalization in ("RMSNorm", "LayerNorm")


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_has_as_many_parameters_as_the_closed_formula(name: str) -> None:
    count = 0
    for shape in hf_tensors(PRESETS[name]).values():
        count += shape[0] * (shape[1] if len(shape) > 1 else 1)
    assert count == model_parameters(PRESETS[name])
    assert len({entry.te or entry.megatron for entry in entries(PRESETS[name])}) == len(
        entries(PRESETS[name])
    )


RELEASED = {  # as their makers count them, in billions
    "llama_7b": 6.74, "llama_13b": 13.02, "llama_30b": 32.53, "llama_65b": 65.29,
    "llama2_7b": 6.74, "llama2_13b": 13.02, "llama2_70b": 68.98, "code_llama_34b": 33.74,
    "llama3_8b": 8.03, "llama3_70b": 70.55, "llama3_1_405b": 405.85, "llama3_2_1b": 1.24, "llama3_2_3b": 3.21,
    "tinyllama_1_1b": 1.10, "mistral_7b_v0_1": 7.24, "mistral_7b_v0_3": 7.25,
    "qwen2_0_5b": 0.49, "qwen2_7b": 7.62, "qwen2_72b": 72.71, "qwen2_5_14b": 14.77, "qwen2_5_32b": 32.76,
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_presets_have_the_released_size(name: str) -> None:
    assert round(model_parameters(PRESETS[name]) / 1e9, 2) == RELEASED[name]
