"""The CPU platform's norms against the formulas in fp64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_syne.platform.cpu_norm import LocalNorm


def test_it_takes_any_strides() -> None:
    config = SimpleNamespace(
        normalization="RMSNorm",
        layernorm_zero_centered_gamma=False,
        params_dtype=torch.float32,
        sequence_parallel=False,
    )
    torch.manual_seed(0)
    norm = LocalNorm(config, 16)
    x = torch.randn(3, 5, 16).transpose(0, 1).requires_grad_()
    direction = torch.randn(3, 16, 5).permute(2, 0, 1)
    (norm(x) * direction).sum().backward()  # a gradient and an input that are not contiguous
    found, x.grad = x.grad, None
    (torch.nn.functional.rms_norm(x, (16,), norm.weight, norm.eps) * direction).sum().backward()
    torch.testing.assert_close(found, x.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("zero_centered", [False, True], ids=["plain", "zero-centred"])
@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_value(normalization: str, zero_centered: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = SimpleNamespace(
        normalization=normalization,
        layernorm_zero_centered_gamma=zero_centered,
        params_dtype=dtype,
        sequence_parallel=True,
    )
    norm, eps = LocalNorm(config, 64, eps=1e-3), 1e-3
    x = (3 * torch.randn(5, 2, 64) + 1).to(dtype)
    rows = x.double()
    if normalization == "LayerNorm":
        rows = rows - rows.mean(-1, keepdim=True)
    normed = rows / (rows.square().mean(-1, keepdim=True) + eps).sqrt()
    largest = normed.abs().max().item()
    rounding = 2.0**-18 if dtype is torch.float32 else 2.0**-8
    assert (norm(x) - normed).abs().max().item() < rounding * largest  # as it starts: a weight of one
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(0.01 * torch.randn(64))  # 1 + this would be lost in bf16
    weight = norm.weight.double() + zero_centered
    expected = normed * weight + (norm.bias.double() if norm.bias is not None else 0)
    assert norm(x).dtype is dtype
    error = (norm(x) - expected).abs().max().item()
    assert error < rounding * expected.abs().max().item()


def test_parameters_are_marked_for_the_sum_over_tp() -> None:
    for sequence_parallel in (False, True):
        config = SimpleNamespace(
            normalization="LayerNorm",
            layernorm_zero_centered_gamma=True,
            params_dtype=torch.bfloat16,
            sequence_parallel=sequence_parallel,
        )
        norm = LocalNorm(config, 8)
        assert {name: p.sequence_parallel for name, p in norm.named_parameters()} == dict.fromkeys(
            ("weight", "bias"), sequence_parallel
        )
