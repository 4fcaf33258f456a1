"""A stand-in for ``transformer_engine_torch`` 2.11: its products, norms and multi-tensor functions in plain torch.

Signatures are those of ``csrc/extensions/pybind.cpp``. What is not here raises NotImplementedError when it is used.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from te_cpu import quantized
from te_cpu.attention import (  # noqa: F401
    fused_attn_bwd,
    fused_attn_fwd,
    fused_rope_backward,
    fused_rope_forward,
    get_fused_attn_backend,
)
from te_cpu.names import (  # noqa: F401
    TORCH,
    DType,
    Float8BlockScaleTensorFormat,
    FP8BwdTensors,
    FP8FwdTensors,
    FP8TensorMeta,
    NVTE_Bias_Type,
    NVTE_Fused_Attn_Backend,
    NVTE_Mask_Type,
    NVTE_QKV_Format,
    NVTE_QKV_Layout,
    NVTE_Softmax_Type,
    absent,
)
from te_cpu.quantized import (  # noqa: F401
    dequantize,
    fp8_block_scaling_compute_partial_amax,
    fp8_block_scaling_partial_cast,
    fp8_transpose,
    fused_amax_and_scale_update_after_reduction,
    values_of,
)

CALLS: dict[str, int] = {}
"""How often each function was called: a test can see that a fused path was taken."""
Lists = list[list[torch.Tensor]]


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return absent(name)


def counted(name: str) -> None:
    CALLS[name] = CALLS.get(name, 0) + 1


def quantize(tensor: torch.Tensor, quantizer: Any, output: Any = None, noop: Any = None) -> Any:
    """As ``csrc/extensions/cast.cpp``."""
    counted("quantize")
    return quantized.quantize(tensor, quantizer, output, noop)


def get_cudnn_version() -> int:
    return 91900


def get_cublasLt_version() -> int:
    return 130100


def get_num_cublas_streams() -> int:
    return 4


def device_supports_multicast(device_id: int = -1) -> bool:
    return False


def generic_gemm(
    A: Any, transA: bool, B: Any, transB: bool, D: Any, quantizer: Any, output_dtype: Any, bias: Any,
    bias_type: Any, gelu: bool, gelu_in: Any, grad: bool, workspace: torch.Tensor, workspace_size: int,
    accumulate: bool, use_split_accumulator: bool, comm_overlap: Any = None, comm_type: Any = None,
    extra_output: Any = None, bulk_overlap: bool = False, alpha: float = 1.0, beta: float | None = None,
) -> tuple[Any, Any, Any, Any]:  # fmt: skip
    """Row by row: D = op(B) op(A), A turned where ``transA``; added to D where ``accumulate``."""
    assert not gelu and comm_overlap is None and alpha == 1.0 and workspace_size == workspace.numel()
    assert bias is None and quantizer is None, "not asked for by layers without a bias"
    assert A is not None and B is not None
    # summed over the last dimension: of A where it is turned, of B where it is not
    a, b = values_of(A, turned_use=not transA), values_of(B, turned_use=transB)
    leading = b.shape[:-1]
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    product = (b.t() if transB else b) @ (a.t() if transA else a)
    shape = (product.shape[0],) if transB else tuple(leading)
    if D is None:
        kind = TORCH[output_dtype] if output_dtype is not None else A.dtype
        assert not accumulate
        D = product.to(kind).view(*shape, product.shape[1])
    else:
        assert output_dtype is None or TORCH[output_dtype] is D.dtype, (output_dtype, D.dtype)
        assert D.numel() == product.numel() and D.shape[-1] == product.shape[1], (D.shape, product.shape)
        counted("gemm_accumulate" if accumulate else "gemm_out")
        with torch.no_grad():
            product = product.view(D.shape)
            D.copy_(D.float() + product if accumulate else product)
    counted("gemm")
    return D, None, None, None


def _normed(out: torch.Tensor, ln_out: Any, quantizer: Any, otype: Any) -> Any:
    kind = TORCH[otype]
    if quantizer is not None:
        return quantize(out.to(kind), quantizer, ln_out)
    return out.to(kind) if ln_out is None else ln_out.copy_(out)


def rmsnorm_fwd(
    input: Any, weight: Any, eps: float, ln_out: Any, quantizer: Any, otype: Any, sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Any, None, torch.Tensor]:  # fmt: skip
    """(output, None, 1 / root mean square)."""
    assert input.dim() == 2 and input.is_contiguous()
    x, gain = input.detach().float(), weight.detach().float() + float(zero_centered_gamma)
    rsigma = torch.rsqrt(x.pow(2).mean(dim=-1) + eps)
    return _normed(x * rsigma[:, None] * gain, ln_out, quantizer, otype), None, rsigma


def rmsnorm_bwd(
    dz: Any, x: Any, rsigma: Any, gamma: Any, sm_margin: int, zero_centered_gamma: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of the input, of the weight)."""
    assert dz.dtype == x.dtype, (dz.dtype, x.dtype)
    gain = gamma.detach().float() + float(zero_centered_gamma)
    xhat = x.detach().float() * rsigma[:, None]
    dy = dz.float() * gain
    dx = (dy - xhat * (dy * xhat).mean(dim=-1, keepdim=True)) * rsigma[:, None]
    return dx.to(x.dtype), (dz.float() * xhat).sum(dim=0).to(gamma.dtype)


def layernorm_fwd(
    input: Any, weight: Any, bias: Any, eps: float, ln_out: Any, quantizer: Any, otype: Any, sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Any, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(output, mean, 1 / standard deviation)."""
    x, gain = input.detach().float(), weight.detach().float() + float(zero_centered_gamma)
    mean = x.mean(dim=-1)
    rsigma = torch.rsqrt(x.var(dim=-1, unbiased=False) + eps)
    out = (x - mean[:, None]) * rsigma[:, None] * gain + bias.detach().float()
    return _normed(out, ln_out, quantizer, otype), mean, rsigma


def layernorm_bwd(
    dz: Any, x: Any, mu: Any, rsigma: Any, gamma: Any, sm_margin: int, zero_centered_gamma: bool
) -> tuple[torch.Tensor, ...]:
    """(gradient of the input, of the weight, of the bias)."""
    gain = gamma.detach().float() + float(zero_centered_gamma)
    xhat = (x.detach().float() - mu[:, None]) * rsigma[:, None]
    dy = dz.float() * gain
    means = dy.mean(dim=-1, keepdim=True), (dy * xhat).mean(dim=-1, keepdim=True)
    dx = (dy - means[0] - xhat * means[1]) * rsigma[:, None]
    return dx.to(x.dtype), (dz.float() * xhat).sum(0).to(gamma.dtype), dz.float().sum(0).to(gamma.dtype)


def bgrad_quantize(input: torch.Tensor, quantizer: Any) -> tuple[torch.Tensor, Any]:
    """(gradient of the bias, quantised gradient)."""
    return input.reshape(-1, input.shape[-1]).sum(dim=0), quantize(input, quantizer)


def compute_amax(input: torch.Tensor, amax: torch.Tensor) -> None:
    amax.copy_(input.detach().abs().amax().float().view(amax.shape))


def multi_tensor_scale(chunk_size: int, noop_flag: torch.Tensor, lists: Lists, scale: float) -> None:
    """lists: inputs, outputs; the flag is set where something is not finite."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source.float() * scale)
        if not bool(torch.isfinite(source).all()):
            noop_flag.fill_(1)


def multi_tensor_l2norm(
    chunk_size: int, noop_flag: torch.Tensor, lists: Lists, per_tensor: bool | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm of all [1], norm of each)."""
    counted("l2norm")
    each = torch.stack([torch.linalg.vector_norm(x.float()) for x in lists[0]])
    return torch.linalg.vector_norm(each).view(1), each if per_tensor else torch.empty(0)


def multi_tensor_adam(
    chunk_size: int, noop_flag: torch.Tensor, lists: Lists, lr: float, beta1: float, beta2: float, eps: float,
    step: int, mode: int, bias_correction: int, weight_decay: float,
) -> None:  # fmt: skip
    """lists: gradients, parameters, first and second moments (fp32), and the master weights where there are any."""
    counted("adam")
    assert mode in (0, 1) and isinstance(step, int)
    first, second = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    with torch.no_grad():
        for g, p, m, v, *master in zip(*lists, strict=True):
            assert m.dtype is v.dtype is torch.float32 and g.numel() == p.numel() == m.numel()
            values, gradient = (master[0] if master else p).float(), g.float()
            if mode == 0:
                gradient = gradient + weight_decay * values
            m.mul_(beta1).add_(gradient, alpha=1 - beta1)
            v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            update = (m / first) / ((v / second).sqrt() + eps)
            if mode == 1:
                update = update + weight_decay * values
            values = values - lr * update
            p.copy_(values)
            if master:
                master[0].copy_(values)


def multi_tensor_compute_scale_and_scale_inv(
    chunk_size: int, noop_flag: torch.Tensor, lists: Lists, fp8_max: float, pow2: bool, epsilon: float
) -> None:
    """lists: amaxes, scales, 1 / scales."""
    for amax, scale, inverse in zip(*lists, strict=True):
        found = fp8_max / amax.clamp(min=epsilon)
        found = torch.where((amax == 0) | ~torch.isfinite(amax), torch.ones_like(found), found)
        found = torch.exp2(torch.floor(torch.log2(found))) if pow2 else found
        scale.copy_(found)
        inverse.copy_(1.0 / found)


def cross_entropy_forward(
    logits: torch.Tensor, target: torch.Tensor, smoothing: float, reduce: bool, group: Any, ignore: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The Triton kernel's: losses fp32, and the gradient in place of the logits, in their format."""
    counted("cross_entropy")
    rows, batch, columns = logits.shape
    assert target.stride(-1) == 1 or target.numel() == 1, "the kernel's step through them"
    assert smoothing == 0.0 and not reduce and logits.stride(-1) == 1
    values = logits.detach().float().view(-1, columns)
    places = target.reshape(-1)
    assert (group is None or group.size() == 1) and not math.isnan(float(values.sum()))
    losses = torch.logsumexp(values, -1) - values.gather(-1, places[:, None]).squeeze(-1)
    gradient = torch.softmax(values, -1)
    gradient[torch.arange(len(places)), places] -= 1.0
    kept = places != ignore
    with torch.no_grad():
        logits.detach().copy_((gradient * kept[:, None]).view(logits.shape))
    return (losses * kept).view(rows, batch), logits


def cross_entropy_backward(
    kept: torch.Tensor, gradient: torch.Tensor, capturable: bool = False
) -> torch.Tensor:
    with torch.no_grad():
        return kept.copy_(kept.float() * gradient.float()[..., None])
