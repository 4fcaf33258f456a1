"""Figures of speed: the formula of models.flops over the time, the GPUs and the peak."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_syne.config.schema import ModelConfig, MonitorConfig, PrecisionConfig, RunConfig
from megatron_syne.models.flops import model_flops_per_token
from megatron_syne.monitor import speed
from megatron_syne.monitor.speed import Speed, peak_flops
from megatron_syne.planner.hardware import GPUS

MODEL = ModelConfig(
    model_type="llama",
    num_layers=2, hidden_size=64, ffn_hidden_size=192, num_attention_heads=8, num_query_groups=4, kv_channels=8,
    vocab_size=512, max_position_embeddings=128, layernorm_epsilon=1e-5, rotary_base=500000,
    share_embeddings_and_output_weights=False,
)  # fmt: skip


def trainer_at(sample: int) -> Any:
    """The second half of the run has samples of 256 tokens."""
    return SimpleNamespace(
        state=SimpleNamespace(consumed_samples=sample),
        train_data=SimpleNamespace(seq_length_at=lambda first: 128 if first < 16 else 256),
    )


@pytest.mark.parametrize(("first", "length"), [(0, 128), (8, 128), (16, 256)])
def test_flops_are_of_the_stages_length(first: int, length: int) -> None:
    watched = Speed(RunConfig(monitor=MonitorConfig(peak_flops=2e12)), MODEL, None, world_size=4)
    watched.on_step_start(trainer_at(first))
    metrics = {"step_seconds": 0.5, "tokens_per_second": 1000.0}
    watched.on_step_end(trainer_at(first + 8), metrics)
    expected = model_flops_per_token(MODEL, length) * 8 * length / 0.5 / 4
    assert metrics["tflops_per_gpu"] == pytest.approx(expected / 1e12)
    assert metrics["mfu"] == pytest.approx(expected / 2e12)
    assert metrics["tokens_per_second_per_gpu"] == 250.0


def test_without_a_peak_there_is_no_mfu() -> None:
    watched = Speed(RunConfig(), MODEL, None, world_size=1)
    metrics = {"step_seconds": 0.5, "tokens_per_second": 1000.0}
    watched.on_step_end(trainer_at(8), metrics)
    assert "mfu" not in metrics and metrics["tflops_per_gpu"] > 0


@pytest.mark.parametrize(
    ("precision", "given", "device", "peak"),
    [
        ({}, None, "known", 1e15),
        ({"fp8": "delayed"}, None, "known", 2e15),
        ({"fp8": "delayed", "fp8_emulation": True}, None, "known", 1e15),
        ({"fp8": "delayed"}, None, "without fp8", 5e14),
        ({}, None, "unknown", None),
        ({}, None, None, None),
        ({}, 3e14, "known", 3e14),
        ({}, 3e14, None, 3e14),
    ],
)
def test_peak(
    precision: Any,
    given: float | None,
    device: str | None,
    peak: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpus = {
        "known": replace(GPUS["h100"], bf16_flops=1e15, fp8_flops=2e15),
        "without fp8": replace(GPUS["h100"], bf16_flops=5e14, fp8_flops=0.0),
    }
    monkeypatch.setattr(speed, "gpu_of_device", gpus.get)
    config = RunConfig(precision=PrecisionConfig(**precision), monitor=MonitorConfig(peak_flops=given))
    assert peak_flops(config, device) == peak
