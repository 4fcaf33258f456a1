"""What share of the data sheet's rates each software reaches: the constants of the speed model. No torch.

``calibration`` says how they were fitted, and fits them again.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from megatron_syne.config.schema import RunConfig

CrossEntropy = Literal["native", "te"]


@dataclass(frozen=True)
class Stack:
    """Software on which a step runs, as far as its speed goes."""

    name: str
    bf16_share: float
    """Share of the bf16 peak at which matrix products run, moving their operands counted aside."""
    fp8_share: float
    """The same of the FP8 peak."""
    tp_exposed: float
    """Share of TP communication that shows although it overlaps with the products."""
    attention_forward_share: float = 0.60
    """Share of the bf16 peak of the fused attention kernel, causal tokens counted once."""
    attention_backward_share: float = 0.50
    """The same of its backward pass (5 products in place of 2)."""
    memory_share: float = 0.85
    """Share of the memory's bandwidth."""
    link_share: float = 0.8
    """Share of the bandwidth of NVLink and network that collectives reach."""
    overlapped_exposed: float = 0.1
    """Share that shows of other overlapped communication: over DP, CP and FSDP."""
    elementwise_passes: float = 1.0
    """Bytes that element-wise work moves over those of fused kernels."""
    chunked_passes: float = 1.0
    """Bytes that element-wise work of a loss in parts moves over those of one pass for each of its kernels."""
    main_grads: bool = True
    """Weight gradients are added up in buffers of their own in every micro-batch; else written once, in bf16."""
    fused_layer_gradients: bool = True
    """The products of layers' weight gradients add to those buffers themselves; else bf16 results are added after."""
    fused_output_gradient: bool = True
    """The same of the output layer."""
    cross_entropy: CrossEntropy = "native"
    """``native``: megatron-core's, over fp32 copies of the logits; ``te``: Transformer Engine's, in place."""
    recipe_shares: dict[str, float] = field(default_factory=dict)
    """``fp8_share`` of single recipes, where they were measured."""
    fsdp: bool = False
    """Weights are gathered for each pass and gradients reduced in each micro-batch."""
    selective_ops: bool = False
    """torchtitan's selective recompute by operator: every second matrix product and all element-wise work again."""


def cross_entropy_of(stack: Stack, config: RunConfig) -> CrossEntropy:
    """The cross entropy of a run's whole logits: Transformer Engine's neither where it has to be deterministic nor with
    z-loss in bf16 (``platform/cuda_kernels.py: cross_entropy_options``)."""
    z_loss = config.train.z_loss > 0 and config.precision.params_dtype == "bf16"
    return "native" if config.train.deterministic_mode or z_loss else stack.cross_entropy


MEGATRON = Stack("megatron-core", bf16_share=0.718, fp8_share=0.641, tp_exposed=0.275)
"""megatron-core with Transformer Engine, as NVIDIA's published rows have it (apex for the fused weight gradient)."""

CUDA_PLATFORM = replace(
    MEGATRON,
    name="megatron_syne",
    fused_output_gradient=False,
    cross_entropy="te",
)
"""What this package trains with on CUDA without apex (``platform/cuda.py: engine_options``): the output layer is
megatron-core's own, whose product adds to the buffer by apex's kernel alone. The shares are those of the published
rows: nothing of ours has been measured yet."""

MEGATRON_FSDP = replace(MEGATRON, name="megatron-core, FSDP", fsdp=True)
"""The same with megatron-core's FSDP, as some published rows used it."""

TORCHTITAN = replace(
    MEGATRON,
    name="torchtitan, compiled",
    bf16_share=0.718 * 0.733,
    fp8_share=0.641 * 0.733,
    tp_exposed=0.675,
    attention_forward_share=0.35,
    attention_backward_share=0.28,
    main_grads=False,
    fsdp=True,
    selective_ops=True,
)
"""torchtitan of 2024-12 to 2025-06 on H100 GPUs limited to 500 W."""

TORCHTITAN_EAGER = replace(TORCHTITAN, name="torchtitan, eager", elementwise_passes=3.0)
"""The same without torch.compile: SwiGLU, norms and rotary embedding of several kernels each, counted as 3 passes."""
