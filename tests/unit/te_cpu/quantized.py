"""``quantize``, ``dequantize`` and what else deals with FP8 tensors, after ``csrc/quantizer.cpp`` of 2.11 (Hopper).

On Hopper FP8 products take both operands with the summed dimension last, so a tensor that is used the other way
round needs its transpose: where it is missing here, the real product would fail too.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from te_cpu.names import TORCH, DType, Float8BlockScaleTensorFormat

BLOCK = 128


def _classes() -> Any:
    from transformer_engine.pytorch import tensor

    return tensor


def to_fp8(values: torch.Tensor, dtype: DType) -> torch.Tensor:
    """fp32 -> FP8 as bytes, what is too large set to the largest."""
    kind = TORCH[dtype]
    limit = torch.finfo(kind).max
    return values.clamp(-limit, limit).to(kind).view(torch.uint8)


def quantize(tensor: torch.Tensor, quantizer: Any, output: Any = None, noop: Any = None) -> Any:
    """As ``tex.quantize``; a set no-op flag leaves the output alone."""
    tensors = _classes()
    made = output if output is not None else empty(quantizer, tuple(tensor.shape), tensor.dtype)
    if noop is not None and bool(noop):
        return made
    with torch.no_grad():
        values = tensor.detach().float()
        if isinstance(quantizer, tensors.Float8BlockQuantizer):
            _fill_blocks(made, quantizer, values)
        elif isinstance(quantizer, tensors.Float8CurrentScalingQuantizer):
            if not quantizer.use_existing_amax:
                quantizer.amax.copy_(values.abs().amax().view(1))
            quantizer.scale.copy_(
                scale_of(
                    quantizer.amax, quantizer.dtype, quantizer.force_pow_2_scales, quantizer.amax_epsilon
                )
            )
            _fill(made, quantizer, values)
        elif isinstance(quantizer, tensors.Float8Quantizer):
            if quantizer.amax.numel():  # casting master weights asks for none
                amax = values.abs().amax().view(quantizer.amax.shape)
                quantizer.amax.copy_(torch.maximum(quantizer.amax, amax))
            _fill(made, quantizer, values)
        else:
            raise NotImplementedError(type(quantizer).__name__)
    return made


def scale_of(amax: torch.Tensor, dtype: DType, power_of_two: bool, epsilon: float = 0.0) -> torch.Tensor:
    """Largest FP8 number / amax; 1 where there is nothing but zeros (``compute_scale_from_amax``)."""
    amax = amax.clamp(min=epsilon)
    scale = torch.finfo(TORCH[dtype]).max / amax
    scale = torch.where((amax == 0) | ~torch.isfinite(amax), torch.ones_like(scale), scale)
    return torch.exp2(torch.floor(torch.log2(scale))) if power_of_two else scale


def empty(quantizer: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """``create_tensor``: the quantised tensor, its data not filled yet."""
    tensors = _classes()
    common = {"fp8_dtype": quantizer.dtype, "quantizer": quantizer}
    if isinstance(quantizer, tensors.Float8BlockQuantizer):
        common |= {
            "rowwise_data": None,
            "rowwise_scale_inv": None,
            "columnwise_data": None,
            "columnwise_scale_inv": None,
            "is_2D_scaled": quantizer.block_scaling_dim == 2,
            "data_format": Float8BlockScaleTensorFormat.GEMM_READY,
        }
        assert not quantizer.all_gather_usage, "only made for tensor parallelism"
        if quantizer.internal:
            return tensors.Float8BlockwiseQTensorStorage(**common)
        return tensors.Float8BlockwiseQTensor(shape=shape, dtype=dtype, **common)
    common |= {"data": None, "data_transpose": None, "fp8_scale_inv": torch.empty(1)}
    if quantizer.internal:
        return tensors.Float8TensorStorage(**common)
    return tensors.Float8Tensor(shape=shape, dtype=dtype, **common)


def _fill(made: Any, quantizer: Any, values: torch.Tensor) -> None:
    data = to_fp8(values * quantizer.scale, quantizer.dtype)
    _keep(made, "_data", data if quantizer.rowwise_usage else None)
    _keep(made, "_transpose", turned(data) if quantizer.columnwise_usage else None)
    made._transpose_invalid = not quantizer.columnwise_usage
    made._fp8_dtype = quantizer.dtype
    if made._scale_inv is None:
        made._scale_inv = torch.empty(1)
    made._scale_inv.copy_(1.0 / quantizer.scale)


def _keep(made: Any, name: str, data: torch.Tensor | None) -> None:
    """In place where there is data already: a parameter's bytes lie in the engine's buffer."""
    before = getattr(made, name)
    if data is not None and before is not None:
        before.copy_(data)
    else:
        setattr(made, name, data)


def turned(data: torch.Tensor) -> torch.Tensor:
    """[..., last] -> [last, ...]."""
    return data.permute(-1, *range(data.dim() - 1)).contiguous()


def fp8_transpose(data: torch.Tensor, dtype: DType, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """As ``tex.fp8_transpose``."""
    found = turned(data)
    return found if out is None else out.copy_(found)


def _fill_blocks(made: Any, quantizer: Any, values: torch.Tensor) -> None:
    flat = values.reshape(-1, values.shape[-1])
    if quantizer.rowwise_usage:
        data, scale_inv = blocks(flat, quantizer)
        _keep(made, "_rowwise_data", data.view(values.shape))
        _keep(made, "_rowwise_scale_inv", scale_inv)
    else:
        made._rowwise_data = made._rowwise_scale_inv = None
    if quantizer.columnwise_usage:
        data, scale_inv = blocks(flat.t().contiguous(), quantizer)
        _keep(made, "_columnwise_data", data.view(values.shape[-1], *values.shape[:-1]))
        _keep(made, "_columnwise_scale_inv", scale_inv)
    else:
        made._columnwise_data = made._columnwise_scale_inv = None


def blocks(flat: torch.Tensor, quantizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, columns] -> bytes, and scales as products want them: of 1x128 tiles [tiles, rows], of 128x128 ones
    [tiles, tiles]; their last dimension is padded to a multiple of 4."""
    rows, columns = flat.shape
    height = BLOCK if quantizer.block_scaling_dim == 2 else 1
    down, across = math.ceil(rows / height), math.ceil(columns / BLOCK)
    padded = torch.zeros(down * height, across * BLOCK)
    padded[:rows, :columns] = flat
    tiles = padded.view(down, height, across, BLOCK)
    amax = tiles.abs().amax(dim=(1, 3))
    scale = scale_of(amax, quantizer.dtype, quantizer.force_pow_2_scales, quantizer.amax_epsilon)
    data = to_fp8(tiles * scale[:, None, :, None], quantizer.dtype).view(padded.shape)
    inverse = 1.0 / scale
    if height == 1:
        inverse = inverse.t()
    inverse = torch.nn.functional.pad(inverse, (0, -inverse.shape[1] % 4), value=1.0)
    return data[:rows, :columns].contiguous(), inverse.contiguous()


def values_of(tensor: Any, turned_use: bool) -> torch.Tensor:
    """fp32 values of a product's operand; ``turned_use``: summed over its first dimension."""
    tensors = _classes()
    if isinstance(tensor, tensors.Float8TensorStorage):
        if turned_use:
            assert tensor._transpose is not None and not tensor._transpose_invalid, "the transpose is missing"
            data = tensor._transpose.permute(*range(1, tensor._transpose.dim()), 0)
        else:
            assert tensor._data is not None, "the data is missing"
            data = tensor._data
        return data.contiguous().view(TORCH[tensor._fp8_dtype]).float() * tensor._scale_inv
    if isinstance(tensor, tensors.Float8BlockwiseQTensorStorage):
        kept = tensor.get_metadata()
        kept["data_format"] = tensor._data_format
        gone = "rowwise" if turned_use else "columnwise"
        kept |= {f"{gone}_data": None, f"{gone}_scale_inv": None}
        wanted = "columnwise" if turned_use else "rowwise"
        assert kept[f"{wanted}_data"] is not None, f"the {wanted} data is missing"
        return tensors.Float8BlockwiseQTensorStorage(**kept).dequantize(dtype=torch.float32)
    return tensor.detach().float()


def dequantize(input: Any, otype: DType) -> torch.Tensor:
    """As ``tex.dequantize``."""
    return values_of(input, turned_use=False).to(TORCH[otype])


def fused_amax_and_scale_update_after_reduction(
    buffer: torch.Tensor,
    histories: list[torch.Tensor],
    scales: list[torch.Tensor],
    algo: str,
    fp8_dtype: DType,
    margin: float,
) -> None:
    """As ``recipe/delayed_scaling.cu``: newest amaxes into the histories, those turned by one, scales from them."""
    begin = 0
    for history, scale in zip(histories, scales, strict=True):
        count = scale.numel()
        reduced = buffer[begin : begin + count]
        begin += count
        last = torch.where(reduced != 0, reduced, history[0])
        amax = last if algo == "most_recent" else torch.maximum(history.amax(dim=0), last)
        if len(history) > 1:
            rolled = torch.cat([torch.zeros_like(history[:1]), history[2:], last[None]])
            if algo != "most_recent":
                amax = torch.maximum(history[1:].amax(dim=0), last)
            history.copy_(rolled)
        else:
            history.zero_()
        new = torch.finfo(TORCH[fp8_dtype]).max / amax / 2.0**margin
        usable = torch.isfinite(amax) & (amax > 0)
        scale.copy_(torch.where(usable, new.clamp(max=torch.finfo(torch.float32).max), scale))
    assert begin == buffer.numel()


def _tiles_of(flat: torch.Tensor, height: int, width: int, begin: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(row, column) of the 128x128 tile of each value of a part of a matrix, as the part lies in it."""
    at = torch.arange(begin, begin + flat.numel())
    assert begin + flat.numel() <= height * width
    return at // width // BLOCK, at % width // BLOCK


def fp8_block_scaling_compute_partial_amax(
    tensor: torch.Tensor, amax: torch.Tensor, h: int, w: int, start_offset: int, block_len: int
) -> None:
    """Amax of each tile from the part of a matrix that this rank holds, in place."""
    assert block_len == BLOCK and amax.dim() == 2 and amax.dtype is torch.float32
    values = tensor.detach().float().reshape(-1)
    rows, columns = _tiles_of(values, h, w, start_offset)
    found = torch.zeros(amax.shape)
    found.view(-1).scatter_reduce_(0, rows * amax.shape[1] + columns, values.abs(), "amax")
    amax.copy_(torch.maximum(amax, found))


def fp8_block_scaling_partial_cast(
    inp: torch.Tensor, out: torch.Tensor, scale: torch.Tensor, h: int, w: int, start_offset: int, block_len: int,
    out_dtype: DType,
) -> None:  # fmt: skip
    """Cast a part of a matrix by the scales of its tiles, in place."""
    assert block_len == BLOCK and out.dtype is torch.uint8 and out.numel() == inp.numel()
    values = inp.detach().float().reshape(-1)
    out.view(-1).copy_(to_fp8(values * scale[_tiles_of(values, h, w, start_offset)], out_dtype))
