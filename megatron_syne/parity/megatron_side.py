"""The Megatron side: a real ``GPTModel`` of megatron-core without memory, whose layers are filled one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from megatron_syne.config.schema import ModelConfig, PrecisionConfig, RunConfig
from megatron_syne.convert.pieces import check_tensor_parallel
from megatron_syne.errors import ConfigError
from megatron_syne.models.config import padded_vocab_size
from megatron_syne.parity.filling import Lender
from megatron_syne.parity.probes import Probe, Run
from megatron_syne.platform.base import Platform, select


class Source(Protocol):
    """What is read of Megatron's weights (``convert.weights.WeightSource``)."""

    model: ModelConfig

    def parameter(self, name: str, tp_rank: int, tp_size: int) -> torch.Tensor:
        """A TP rank's part of a parameter, by its local name with the global layer number."""


class _EmptyWithoutMemory(TorchFunctionMode):
    """``torch.empty``, of which the engine makes its parameters, gives a shape alone. What is computed, such as
    the rotary frequencies, stays real (under ``torch.device("meta")`` it would not)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


class MegatronSide:
    """megatron-core's model as training builds it, on the CPU in fp32. Make it with :func:`megatron_side`."""

    def __init__(self, source: Source, platform: Platform, config: RunConfig) -> None:
        from megatron_syne.models.gpt import build_model, unwrap

        self._source = source
        with _EmptyWithoutMemory():
            self._model: Any = unwrap(build_model(config, source.model, platform)[0]).eval()

    def vocabulary(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows) of the embedding or the output layer in order, padding left out.

        Read as the parts of as many TP ranks as suit the model, since the whole can be gigabytes.
        """
        model = self._source.model
        size = _vocabulary_parts(model)
        each = padded_vocab_size(model, size) // size
        assert model.vocab_size is not None
        for rank in range(-(-model.vocab_size // each)):
            start = rank * each
            yield start, self._source.parameter(name, rank, size)[: model.vocab_size - start]

    def layer(self, index: int, probes: list[Probe], lender: Lender) -> Run:
        """A layer with its weights."""
        module = self._filled(self._model.decoder.layers[index], f"decoder.layers.{index}.", lender)
        rotary = self._model.rotary_pos_emb
        angles = [torch.cat([rotary(size, at) for at, size in probe.runs]) for probe in probes]

        def run(probe: int, hidden: torch.Tensor) -> torch.Tensor:
            out, _ = module(hidden_states=hidden[:, None], attention_mask=None, rotary_pos_emb=angles[probe])
            result: torch.Tensor = out[:, 0]
            return result

        return run

    def final_norm(self, lender: Lender) -> Run:
        """The norm before the output layer."""
        module = self._filled(self._model.decoder.final_layernorm, "decoder.final_layernorm.", lender)
        return lambda probe, hidden: module(hidden)

    def _filled(self, module: nn.Module, prefix: str, lender: Lender) -> Callable[..., Any]:
        return lender.fill(module, lambda name: self._source.parameter(prefix + name, 0, 1))


@contextmanager
def megatron_side(source: Source) -> Iterator[MegatronSide]:
    """Start megatron-core on the CPU as a world of one process, and end it again.

    Must come before megatron-core's first import and torch's first look for a GPU (``platform.base.select``).
    """
    platform = select("cpu")
    config = RunConfig(platform="cpu", precision=PrecisionConfig(params_dtype="fp32"))
    platform.start(0, config.precision)
    from megatron_syne.parallel.setup import start_model_parallel, stop_distributed, stop_model_parallel
    from megatron_syne.platform.cpu import CpuPlatform

    class WithoutMemory(CpuPlatform):
        """Everything as on the CPU, but parameters have shapes only."""

        @property
        def device(self) -> torch.device:
            return torch.device("meta")

    from torch.distributed import HashStore, init_process_group  # type: ignore[attr-defined]

    # not parallel.setup.start_distributed: variables of a launcher in the environment do not count here
    init_process_group(platform.backend, store=HashStore(), rank=0, world_size=1)
    try:
        start_model_parallel(config.parallel, seed=1)
        yield MegatronSide(source, WithoutMemory(), config)
    finally:
        stop_model_parallel()
        stop_distributed()


def _vocabulary_parts(model: ModelConfig) -> int:
    """A tensor-parallel size that the model allows, the larger the better."""
    for size in (32, 16, 8, 4, 2):
        with suppress(ConfigError):
            check_tensor_parallel(model, size)
            return size
    return 1
