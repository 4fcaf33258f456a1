"""CUDA GPUs: nccl, Transformer Engine layers, FP8 recipes, fused Adam; apex where it is found.

Nothing falls back silently: without Transformer Engine the platform refuses to start and says which import
failed, since megatron-core alone would quietly build its local layers instead.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from megatron_syne.config.schema import PrecisionConfig, RunConfig
from megatron_syne.errors import ConfigError
from megatron_syne.fp8.choice import describe_fp8, emulates_fp8
from megatron_syne.platform.adam_slices import StepsInSlices, in_slices
from megatron_syne.platform.base import Platform
from megatron_syne.platform.cuda_kernels import (
    be_deterministic,
    cross_entropy_options,
    describe_attention,
    import_failure,
    run_uncompiled_without_triton,
    spare_cross_entropy_its_wait,
    triton_failure,
)


def require_transformer_engine(precision: PrecisionConfig) -> None:
    """Raise ConfigError, with the import that failed, unless Transformer Engine and the engine's use of it work."""
    what = f"precision.fp8: {precision.fp8!r}" if precision.fp8 else "platform: cuda"
    for module in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine_torch"):
        failure = import_failure(module)
        if failure:
            raise ConfigError(
                f"{what} needs Transformer Engine, but {failure}; install the extra megatron_syne[te] for this "
                "torch and CUDA, or set platform=cpu"
            )
    from megatron.core.extensions import transformer_engine as bridge

    if not bridge.HAVE_TE:
        raise ConfigError(
            f"{what}: Transformer Engine imports, but megatron-core could not import the parts it uses "
            "(its HAVE_TE is False); install transformer-engine >=2.9,<2.12 for megatron-core 0.16.1"
        )


def fp8_options(precision: PrecisionConfig) -> dict[str, Any]:
    """megatron-core's ``TransformerConfig`` fields for an FP8 recipe; empty where FP8 is off, or emulated.

    Emulated layers are not Transformer Engine's: with the engine's ``fp8`` set it would open its contexts.
    """
    if precision.fp8 is None or emulates_fp8(precision, "cuda"):
        return {}
    options: dict[str, Any] = {
        "fp8": precision.fp8_format,
        "fp8_recipe": precision.fp8,
        "fp8_param": precision.fp8_param_gather,
        "first_last_layers_bf16": precision.first_last_layers_bf16,
    }
    if precision.first_last_layers_bf16:
        options |= {
            "num_layers_at_start_in_bf16": precision.num_layers_at_start_in_bf16,
            "num_layers_at_end_in_bf16": precision.num_layers_at_end_in_bf16,
        }
    if precision.fp8 == "delayed":
        options |= {
            "fp8_margin": precision.fp8_margin,
            "fp8_amax_history_len": precision.fp8_amax_history_len,
            "fp8_amax_compute_algo": precision.fp8_amax_compute_algo,
        }
    return options


def emulating_spec() -> Any:
    """Emulated FP8 linear layers between Transformer Engine's norms and attention. Not run on a GPU yet.

    Norms are modules of their own here, as on a CPU: parameters bear the local names (``input_layernorm``).
    """
    from megatron.core.extensions.transformer_engine import TEDotProductAttention, TENorm
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_syne.fp8.linear import emulate_linears

    spec = get_gpt_layer_local_spec()
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = TENorm
    spec.submodules.self_attention.submodules.core_attention = TEDotProductAttention
    emulate_linears(spec)
    return spec


def start_tp_comm_overlap(config: RunConfig, hidden_size: int) -> None:
    """Make Transformer Engine's buffers for ``parallel.tp_comm_overlap``; all ranks must call, before a forward pass.

    megatron-core leaves this to the program. The shape is of the activations of a micro-batch before SP cuts
    them, [seq x micro batch / CP, hidden]; ``preflight`` sees to it that there is only one. Not run on a GPU yet.
    """
    base = importlib.import_module("transformer_engine.pytorch.module.base")
    precision, modes = config.precision, base.UserBufferQuantizationMode
    wanted = [modes.FP8 if precision.fp8 else modes.NONE]
    if precision.fp8 and precision.first_last_layers_bf16:
        wanted.append(modes.NONE)
    tokens = config.data.seq_length * config.train.micro_batch_size // config.parallel.context_parallel_size
    base.initialize_ub(
        shape=[tokens, hidden_size],
        tp_size=config.parallel.tensor_model_parallel_size,
        quantization_modes=wanted,
        bootstrap_backend="nccl",
    )


def update_in_slices() -> None:
    """Have megatron-core build Transformer Engine's FusedAdam with its step in slices (``adam_slices``)."""
    from megatron.core import optimizer as engine_optimizer

    adam: Any = engine_optimizer.Adam
    if not issubclass(adam, StepsInSlices):
        engine_optimizer.Adam = in_slices(adam)


class CudaPlatform(Platform):
    """One GPU per rank."""

    name = "cuda"
    backend = "nccl"
    pins_memory = True

    def __init__(self) -> None:
        self._device = torch.device("cuda", 0)
        self._fp8 = ""

    @property
    def device(self) -> torch.device:
        return self._device

    def start(self, local_rank: int, precision: PrecisionConfig, deterministic: bool = False) -> None:
        be_deterministic(deterministic)
        if not torch.cuda.is_available():
            raise ConfigError(
                "platform: cuda, but torch finds no usable GPU; check the driver or set platform=cpu"
            )
        run_uncompiled_without_triton()
        require_transformer_engine(precision)
        spare_cross_entropy_its_wait()
        # Under a scheduler that gives each task its own GPU only one is visible, whatever the local rank.
        index = local_rank if local_rank < torch.cuda.device_count() else 0
        if local_rank >= torch.cuda.device_count() > 1:
            raise ConfigError(
                f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} are visible; "
                "start one process per GPU"
            )
        torch.cuda.set_device(index)
        update_in_slices()
        self._fp8 = describe_fp8(precision, self.name)
        self._device = torch.device("cuda", index)

    def layer_spec(self, config: RunConfig) -> tuple[Any, Any]:
        if emulates_fp8(config.precision, self.name):
            return emulating_spec(), None
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        # Kind of the norms, zero-centred weights and biases: these layers take them from the configuration.
        return get_gpt_layer_with_transformer_engine_spec(), None

    def engine_options(self, config: RunConfig) -> dict[str, Any]:
        # The output layer is megatron-core's own and needs apex's kernel for the fused weight gradient; Transformer
        # Engine's layers have theirs, which training.optimizer.wrap_ddp turns on.
        fused_wgrad = import_failure("fused_weight_gradient_mlp_cuda") is None
        return {
            "use_cpu_initialization": False,
            "gradient_accumulation_fusion": fused_wgrad,
            "persist_layer_norm": False,
            "masked_softmax_fusion": True,
            "bias_activation_fusion": True,
            "bias_dropout_fusion": True,
            "apply_rope_fusion": True,
            "deterministic_mode": config.train.deterministic_mode,
            **cross_entropy_options(config),
            **fp8_options(config.precision),
        }

    def document_attention(self, document_ids: torch.Tensor) -> tuple[torch.Tensor | None, Any]:
        """Transformer Engine's packed (THD) format: where each document begins, and the longest. Micro batch 1.

        Not run on a GPU yet. ``document_ids`` are on the host (``to_device``), so nothing waits for the GPU.
        """
        from megatron.core.packed_seq_params import PackedSeqParams

        if document_ids.shape[0] != 1:
            raise ConfigError(
                f"data.reset_attention_mask on CUDA needs train.micro_batch_size 1, found {document_ids.shape[0]}"
            )
        ids = document_ids[0].cpu()  # already there, unless DALI made them
        lengths = torch.unique_consecutive(ids, return_counts=True)[1]
        ends = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).to(torch.int32)])
        begins, longest = ends.to(self._device, non_blocking=True), int(lengths.max())
        return None, PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=begins,
            cu_seqlens_kv=begins,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )

    def to_device(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """All but ``document_ids``, of which only the lengths are used, on the host."""
        stay = {key: value for key, value in batch.items() if key == "document_ids"}
        return {**super().to_device({key: batch[key] for key in batch if key not in stay}), **stay}

    @property
    def device_name(self) -> str | None:
        return torch.cuda.get_device_name(self._device)

    def mark(self) -> Any:
        """An event in the current stream: the host runs ahead of the GPU, so its own clock would tell nothing."""
        cuda: Any = torch.cuda
        event = cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds_between(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) / 1000.0

    def fetch(self, values: torch.Tensor) -> Callable[[], list[float]]:
        """Through pinned memory, so that the host reads them while the GPU does what was queued behind."""
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        cuda: Any = torch.cuda
        copied = cuda.Event()
        copied.record()

        def wait() -> list[float]:
            copied.synchronize()
            return [float(value) for value in host.tolist()]

        return wait

    def peak_memory(self) -> int:
        return torch.cuda.max_memory_allocated()

    def describe(self) -> str:
        import transformer_engine

        apex, triton = import_failure("apex.optimizers"), triton_failure()
        return (
            f"cuda: {torch.cuda.get_device_name(self._device)}, torch {torch.__version__}, "
            f"Transformer Engine {getattr(transformer_engine, '__version__', '?')}, "
            f"{describe_attention()}, apex {'found' if apex is None else 'not found (not needed)'}, "
            f"Triton {'found' if triton is None else f'not usable: {triton}'}{self._fp8}"
        )
