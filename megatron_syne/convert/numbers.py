"""Formats of numbers, without torch: sizes, and conversion between bf16, fp16 and fp32 as torch has it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megatron_syne.errors import DataError

ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
"""Formats that weights may have, as safetensors names them, and their size."""
SHORT_NAMES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
"""Names used in options."""
TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""Names used in ``config.json``."""


def to_float32(raw: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[np.float32]:
    """Numbers of a matrix of bytes (rows x row bytes; rows may lie apart), rows x columns."""
    if not raw.flags.c_contiguous:
        raw = np.ascontiguousarray(raw)
    if dtype == "F32":
        return raw.view(np.float32)
    if dtype == "F16":
        return raw.view(np.float16).astype(np.float32)
    return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def from_float32(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.uint8]:
    """Bytes of fp32 numbers in a format, rounded to nearest, ties to even; rows x row bytes."""
    if dtype == "F32":
        return values.view(np.uint8)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint8)
    bits = values.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        rounded[nan] = 0x7FC0
    return rounded.view(np.uint8)


def convert(
    raw: npt.NDArray[np.uint8], source: str, target: str, shift: float, where: str
) -> npt.NDArray[np.uint8]:
    """Bytes in another format, ``shift`` added. Raises DataError for finite numbers that fp16 cannot hold."""
    values = to_float32(raw, source)
    if shift:
        values = values + np.float32(shift)
    result = from_float32(np.ascontiguousarray(values), target)
    if target == "F16" and source != "F16":
        lost = ~np.isfinite(result.view(np.float16)) & np.isfinite(values)
        if lost.any():
            raise DataError(f"{where}: has values that fp16 cannot hold; choose bf16 or fp32")
    return result
