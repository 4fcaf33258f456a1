"""A checkpoint of another model is refused; a new stage may change positions, and nothing else."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_syne.checkpoint.optimizer_state import overshoot
from megatron_syne.checkpoint.stored import check_same_model
from megatron_syne.config.schema import ModelConfig
from megatron_syne.errors import ConfigError

MODEL = ModelConfig(num_layers=2, hidden_size=8, rotary_base=10000.0, max_position_embeddings=4096)
LONGER = replace(MODEL, rotary_base=500000.0, max_position_embeddings=32768)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    (tmp_path / "state.json").write_text(json.dumps({"model": asdict(MODEL)}))
    return tmp_path


def test_the_same(stored: Path) -> None:
    assert check_same_model(stored, replace(MODEL, hf_path="elsewhere")) == []


def test_a_stage_may_change_positions(stored: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check_same_model(stored, LONGER)
    assert "rotary_base: checkpoint 10000.0, configuration 500000.0" in str(caught.value)
    assert "a new stage may change" in str(caught.value)
    assert check_same_model(stored, LONGER, stage_begins=True) == [
        "max_position_embeddings: checkpoint 4096, configuration 32768",
        "rotary_base: checkpoint 10000.0, configuration 500000.0",
    ]


def test_nothing_else_may_change(stored: Path) -> None:
    other = replace(LONGER, hidden_size=16)
    for begins in (False, True):
        with pytest.raises(ConfigError, match="hidden_size: checkpoint 8, configuration 16"):
            check_same_model(stored, other, stage_begins=begins)


def test_how_far_uncorrected_moments_overshoot() -> None:
    assert overshoot(0.9, 0.95) == pytest.approx(1.10, abs=0.01)
    assert overshoot(0.9, 0.999) == pytest.approx(6.6, abs=0.1)
