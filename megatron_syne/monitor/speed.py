"""How fast a step was, as figures that hardware is judged by; on every rank, so that all have the same metrics.

Model FLOPs are of ``models.flops``, of all positions of the step's samples (also of those whose loss is masked: they
are computed). MFU is of the peak of one GPU: ``monitor.peak_flops``, or the data sheet's dense rate of bf16 products,
of FP8 products where the run has an FP8 recipe (emulated FP8 is computed in bf16).
"""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING

from megatron_syne.config.schema import ModelConfig, RunConfig
from megatron_syne.models.flops import model_flops_per_token
from megatron_syne.planner.hardware import gpu_of_device
from megatron_syne.training.callback import Callback

if TYPE_CHECKING:
    from megatron_syne.training.trainer import Trainer


class Speed(Callback):
    """Adds ``tokens_per_second_per_gpu``, ``tflops_per_gpu``, and ``mfu`` where a peak is known."""

    def __init__(
        self, config: RunConfig, model: ModelConfig, device_name: str | None, world_size: int
    ) -> None:
        self.flops_per_token = cache(partial(model_flops_per_token, model))
        """By sequence length."""
        self.world_size = world_size
        self.peak = peak_flops(config, device_name)
        self.first_sample = 0

    def on_step_start(self, trainer: Trainer) -> None:
        """Note where the step's samples begin."""
        self.first_sample = trainer.state.consumed_samples

    def on_step_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Add the figures."""
        length = trainer.train_data.seq_length_at(self.first_sample)
        positions = (trainer.state.consumed_samples - self.first_sample) * length
        flops = self.flops_per_token(length) * positions
        rate = flops / metrics["step_seconds"] / self.world_size
        metrics["tokens_per_second_per_gpu"] = metrics["tokens_per_second"] / self.world_size
        metrics["tflops_per_gpu"] = rate / 1e12
        if self.peak is not None:
            metrics["mfu"] = rate / self.peak


def peak_flops(config: RunConfig, device_name: str | None) -> float | None:
    """FLOP/s of one GPU that MFU is of; None where none is given or known (a CPU has none)."""
    if config.monitor.peak_flops is not None:
        return config.monitor.peak_flops
    gpu = gpu_of_device(device_name) if device_name is not None else None
    if gpu is None:
        return None
    in_fp8 = config.precision.fp8 is not None and not config.precision.fp8_emulation
    return gpu.peak_flops(in_fp8)
