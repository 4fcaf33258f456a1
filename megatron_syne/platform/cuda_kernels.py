"""Which kernels a CUDA run has: what is found, what Transformer Engine will choose, and what is told to the engine.

Not run on a GPU yet; rehearsed with Transformer Engine's Python files over a stand-in (``tests/unit/te_cpu``).
"""

from __future__ import annotations

import functools
import importlib
import os
import shutil
import sysconfig
from typing import Any

import torch

from megatron_syne.config.schema import RunConfig
from megatron_syne.platform.base import use_deterministic_torch


def import_failure(module: str) -> str | None:
    """Why ``module`` cannot be imported, or None. Catches everything: Transformer Engine raises
    RuntimeError where a library is missing, not ImportError."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"import {module} failed: {type(error).__name__}: {error}"
    return None


@functools.cache
def triton_failure() -> str | None:
    """Why Triton cannot build a kernel here, or None: it compiles each kernel's launcher with the C compiler.

    torch.compile needs the same, and megatron-core's fused SwiGLU, dropout and cross-entropy are compiled by it.
    What is asked for is what Triton's ``runtime/build.py`` looks for: CC, gcc or clang, and Python's headers.
    """
    failure = import_failure("triton")
    if failure is not None:
        return failure
    if os.environ.get("CC") is None and shutil.which("gcc") is None and shutil.which("clang") is None:
        return "no C compiler (CC, gcc or clang)"
    header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    return None if os.path.exists(header) else f"{header} is missing (package python3-dev)"


def run_uncompiled_without_triton() -> None:
    """Where Triton cannot build, let functions decorated with torch.compile run as they stand, slower.

    Otherwise the first step would end in torch's compiler.
    """
    if triton_failure() is not None:
        importlib.import_module("torch._dynamo").config.disable = True


def cross_entropy_options(config: RunConfig) -> dict[str, Any]:
    """megatron-core's ``TransformerConfig`` fields for the loss of whole logits.

    ``te``: Transformer Engine's Triton kernels (``common/triton/cross_entropy.py``), which read the logits twice in
    their own format, compute in fp32, and leave the gradient in the logits' place: nothing of the size of the
    logits in fp32. ``native`` keeps their softmax in fp32 and rounds its gradient to bf16 whatever the format. It is
    taken for z-loss in bf16, which is a factor of about 1.002 on the gradient: what was rounded to bf16 before
    would be rounded back. What it gains on the unfused loss it has from torch.compile, so nothing without Triton.
    Megatron-LM's ``deterministic_mode`` allows no fused one.
    """
    if config.train.deterministic_mode or triton_failure() is not None:
        return {"cross_entropy_loss_fusion": False}
    scaled = config.precision.params_dtype == "bf16" and config.train.z_loss > 0
    return {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "native" if scaled else "te"}


def spare_cross_entropy_its_wait() -> None:
    """Call Transformer Engine's cross-entropy as under CUDA graphs: it does not compare its gradient with 1 then.

    The comparison copies a number to the GPU, and so makes the host wait for the whole forward pass in each
    micro-batch (``pytorch/triton/cross_entropy.py``). megatron-core asks for it only with graphs of full iterations.
    """
    from megatron.core.models.common.language_module import language_module

    module: Any = language_module
    kernel = module.te_parallel_cross_entropy
    if kernel is None or getattr(kernel, "spared", False):
        return

    @functools.wraps(kernel)
    def spared(logits: torch.Tensor, labels: torch.Tensor, group: Any, _: bool = True) -> torch.Tensor:
        losses: torch.Tensor = kernel(logits, labels, group, True)
        return losses

    spared.spared = True  # type: ignore[attr-defined]
    module.te_parallel_cross_entropy = spared


def be_deterministic(deterministic: bool) -> None:
    """Megatron-LM's ``deterministic_mode`` (``arguments.py``), or torch's own way; before CUDA is initialised.

    megatron-core asks for Transformer Engine's variable; NCCL must keep to one algorithm, cuBLAS to one workspace.
    """
    before = torch.are_deterministic_algorithms_enabled()
    use_deterministic_torch(deterministic)
    if deterministic:
        os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NCCL_ALGO", "Ring")
    elif before:  # another run of this process; cuBLAS's and NCCL's choices stay as they were first made
        os.environ.pop("NVTE_ALLOW_NONDETERMINISTIC_ALGO", None)


def describe_attention() -> str:
    """flash-attn's version, and the attention that Transformer Engine takes for bf16, causal, with heads of 128.

    Its choice on Hopper is cuDNN's wherever that can compute the case (``dot_product_attention/utils.py``).
    """
    try:
        utils = importlib.import_module("transformer_engine.pytorch.attention.dot_product_attention.utils")
        found = utils.FlashAttentionUtils
        versions = [str(found.version)] if found.is_installed else []
        versions += [str(found.fa3_version)] if found.v3_is_installed else []
        asked = utils.AttentionParams(
            qkv_layout="sbhd_sbhd_sbhd",
            num_heads=32,
            num_gqa_groups=8,
            max_seqlen_q=8192,
            max_seqlen_kv=8192,
            head_dim_qk=128,
            head_dim_v=128,
            attn_mask_type="causal",
            window_size=(-1, 0),
            core_attention_bias_requires_grad=False,  # there is none
            deterministic=os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO") == "0",
        )
        flash, _, fused, backend, unfused, _ = utils.get_attention_backend(asked)
    except Exception as error:  # only a line of the log: another version may name these otherwise
        return f"attention not known ({type(error).__name__}: {error})"
    kernel = "flash-attn" if flash else f"cuDNN's (backend {int(backend)})" if fused else "unfused" * unfused
    return f"flash-attn {' and '.join(versions) or 'not found (not needed)'}, attention {kernel or 'none'}"
