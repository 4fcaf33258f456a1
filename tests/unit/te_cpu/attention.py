"""``fused_attn_fwd/bwd`` and ``fused_rope_forward/backward`` in plain torch (SBHD, BSHD and THD; no dropout)."""

from __future__ import annotations

from typing import Any

import torch

from te_cpu.names import TORCH, NVTE_Fused_Attn_Backend


def get_fused_attn_backend(is_training: bool, q_dtype: Any, kv_dtype: Any, *others: Any) -> Any:
    """bf16 and fp16 have a fused kernel, fp32 none: cuDNN's own rule."""
    short = TORCH[q_dtype] in (torch.bfloat16, torch.float16)
    return (
        NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen
        if short
        else NVTE_Fused_Attn_Backend.NVTE_No_Backend
    )


def seen(layout: str, mask: str, window: Any, ends: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """bool [rows, columns]: what each query attends to."""
    at = torch.arange(rows)[:, None]
    to = torch.arange(columns)[None, :]
    allowed = torch.ones(rows, columns, dtype=torch.bool)
    if "CAUSAL" in mask:
        allowed &= to <= at
    left, right = window
    if left >= 0:
        allowed &= to >= at - left
    if right >= 0:
        allowed &= to <= at + right
    if "THD" in layout:
        assert "PADDING" in mask, "THD wants a padding mask"
        document = torch.searchsorted(ends[1:].long(), torch.arange(rows), right=True)
        allowed &= document[:, None] == document[None, :]
    return allowed


def attend(q: Any, k: Any, v: Any, scale: float, layout: str, allowed: torch.Tensor) -> torch.Tensor:
    """Attention in the layout of the inputs, in their format."""
    order = {"SBHD": (1, 2, 0, 3), "BSHD": (0, 2, 1, 3), "THD": (1, 0, 2)}[layout]
    back = [order.index(axis) for axis in range(len(order))]
    found = torch.nn.functional.scaled_dot_product_attention(
        q.permute(order), k.permute(order), v.permute(order), attn_mask=allowed, scale=scale, enable_gqa=True
    )
    return found.permute(back).contiguous()


def _kind(layout: str) -> str:
    parts = layout.removeprefix("NVTE_").split("_")
    assert len(set(parts)) == 1 and parts[0] in ("SBHD", "BSHD", "THD"), layout
    return parts[0]


def fused_attn_fwd(
    max_seqlen_q: int, max_seqlen_kv: int, is_training: bool, attn_scale: float, p_dropout: float, set_zero: bool,
    qkv_layout: str, bias_type: str, attn_mask_type: str, softmax_type: str, window_size: Any,
    cu_seqlens_q: torch.Tensor, cu_seqlens_kv: torch.Tensor, q: Any, k: Any, v: Any, fake_dtype: torch.dtype,
    cu_seqlens_q_padded: Any, cu_seqlens_kv_padded: Any, page_table_k: Any, page_table_v: Any, s_quantizer: Any,
    o_quantizer: Any, bias: Any, softmax_offset: Any, rng_gen: Any, rng_elts_per_thread: int,
    return_max_logit: bool, cuda_graph: bool,
) -> list[Any]:  # fmt: skip
    """[output, softmax statistics, state of the random numbers]."""
    assert q.dtype in (torch.bfloat16, torch.float16) and p_dropout == 0.0 and bias is None
    assert cu_seqlens_q.dtype is torch.int32 and s_quantizer is None and o_quantizer is None
    kind = _kind(qkv_layout)
    length = 0 if kind != "BSHD" else 1
    if kind == "THD":
        assert int(cu_seqlens_q[-1]) == q.shape[0], (cu_seqlens_q, q.shape)
        assert max_seqlen_q >= int(cu_seqlens_q.diff().max())
    else:
        assert max_seqlen_q == q.shape[length]
    allowed = seen(qkv_layout, attn_mask_type, window_size, cu_seqlens_q, q.shape[length], k.shape[length])
    output = attend(q, k, v, attn_scale, kind, allowed)
    return [output, torch.zeros(1), torch.zeros(2, dtype=torch.int64)] if is_training else [output]


def fused_attn_bwd(
    max_seqlen_q: int, max_seqlen_kv: int, attn_scale: float, p_dropout: float, set_zero: bool, qkv_layout: str,
    bias_type: str, attn_mask_type: str, softmax_type: str, window_size: Any, deterministic: bool,
    cu_seqlens_q: torch.Tensor, cu_seqlens_kv: torch.Tensor, q: Any, k: Any, v: Any, o: Any, d_o: Any,
    fake_dtype: torch.dtype, dqkv_dtype: Any, aux: list[torch.Tensor], cu_seqlens_q_padded: Any,
    cu_seqlens_kv_padded: Any, s_quantizer: Any, dp_quantizer: Any, dqkv_quantizer: Any, cuda_graph: bool,
) -> list[Any]:  # fmt: skip
    """[dQ, dK, dV, no dBias, no dSoftmaxOffset]."""
    assert len(aux) == 2 and d_o.dtype == q.dtype
    kind = _kind(qkv_layout)
    length = 0 if kind != "BSHD" else 1
    allowed = seen(qkv_layout, attn_mask_type, window_size, cu_seqlens_q, q.shape[length], k.shape[length])
    with torch.enable_grad():
        inputs = [each.detach().requires_grad_() for each in (q, k, v)]
        output = attend(*inputs, attn_scale, kind, allowed)
    return [*torch.autograd.grad(output, inputs, d_o.view(output.shape)), torch.empty(0), torch.empty(0)]


def _turned(x: torch.Tensor, freqs: torch.Tensor, kind: str, ends: Any, sign: float) -> torch.Tensor:
    assert freqs.dtype is torch.float32 and freqs.dim() == 4 and freqs.shape[1] == freqs.shape[2] == 1
    if kind == "THD":
        assert ends is not None and x.dim() == 3
        positions = torch.cat([torch.arange(int(n)) for n in ends.diff()])
        angles = freqs[positions, 0]  # [t, 1, d]
    else:
        axis = 0 if kind == "SBHD" else 1
        assert x.shape[axis] <= freqs.shape[0]
        angles = freqs[: x.shape[axis]]
        angles = angles if kind == "SBHD" else angles.transpose(0, 1)
    width = freqs.shape[-1]
    part, rest = x[..., :width].float(), x[..., width:]
    first, second = part.chunk(2, dim=-1)
    swapped = torch.cat([-second, first], dim=-1)
    found = part * angles.cos() + sign * swapped * angles.sin()
    return torch.cat([found.to(x.dtype), rest], dim=-1)


def fused_rope_forward(
    x: torch.Tensor,
    freqs: torch.Tensor,
    start: Any,
    kind: str,
    interleaved: bool,
    ends: Any,
    cp: int,
    rank: int,
) -> torch.Tensor:
    """Rotate by the angles; under THD they begin anew with each document."""
    assert not interleaved and cp == 1 and start is None
    return _turned(x, freqs, kind.removeprefix("NVTE_"), ends, 1.0)


def fused_rope_backward(
    grad: torch.Tensor,
    freqs: torch.Tensor,
    start: Any,
    kind: str,
    interleaved: bool,
    ends: Any,
    cp: int,
    rank: int,
) -> torch.Tensor:
    """The rotation back: both halves of the angles are the same."""
    return _turned(grad, freqs, kind.removeprefix("NVTE_"), ends, -1.0)
