"""What share of the data sheet's rates each software reaches: the constants of the speed model. No torch.

``calibration`` says how they were fitted, and fits them again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


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
    main_grads: bool = True
    """Weight gradients are added up in fp32 buffers in every micro-batch; else written once, in bf16."""
    fsdp: bool = False
    """Weights are gathered for each pass and gradients reduced in each micro-batch."""
    selective_ops: bool = False
    """torchtitan's selective recompute by operator: every second matrix product and all element-wise work again."""


MEGATRON = Stack("megatron-core", bf16_share=0.716, fp8_share=0.638, tp_exposed=0.267)
"""megatron-core with Transformer Engine: what this package trains with on CUDA."""

MEGATRON_FSDP = replace(MEGATRON, name="megatron-core, FSDP", fsdp=True)
"""The same with megatron-core's FSDP, as some published rows used it."""

TORCHTITAN = replace(
    MEGATRON,
    name="torchtitan, compiled",
    bf16_share=0.716 * 0.734,
    fp8_share=0.638 * 0.734,
    tp_exposed=0.672,
    attention_forward_share=0.35,
    attention_backward_share=0.28,
    main_grads=False,
    fsdp=True,
    selective_ops=True,
)
"""torchtitan of 2024-12 to 2025-06 on H100 GPUs limited to 500 W."""

TORCHTITAN_EAGER = replace(TORCHTITAN, name="torchtitan, eager", elementwise_passes=3.0)
"""The same without torch.compile: SwiGLU, norms and rotary embedding of several kernels each, counted as 3 passes."""
