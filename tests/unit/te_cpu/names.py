"""Enumerations of ``transformer_engine_torch`` 2.11, with the values of its C++ (``pybind_helper.h``, ``common.h``)."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import torch


class DType(IntEnum):
    kByte = 0
    kInt16 = 1
    kInt32 = 2
    kInt64 = 3
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat8E8M0 = 9
    kFloat4E2M1 = 10


TORCH = {
    DType.kByte: torch.uint8,
    DType.kInt32: torch.int32,
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
    DType.kFloat8E4M3: torch.float8_e4m3fn,
    DType.kFloat8E5M2: torch.float8_e5m2,
}

FP8FwdTensors = IntEnum(
    "FP8FwdTensors",
    [f"GEMM{n}_{kind}" for n in (1, 2, 3) for kind in ("INPUT", "WEIGHT", "OUTPUT")],
    start=0,
)
FP8BwdTensors = IntEnum(
    "FP8BwdTensors", [f"GRAD_{kind}{n}" for n in (1, 2, 3) for kind in ("OUTPUT", "INPUT")], start=0
)


class Float8BlockScaleTensorFormat(IntEnum):
    GEMM_READY = 0
    COMPACT = 1


class NVTE_Fused_Attn_Backend(IntEnum):
    NVTE_No_Backend = -1
    NVTE_F16_max512_seqlen = 0
    NVTE_F16_arbitrary_seqlen = 1
    NVTE_FP8 = 2


class FromName(type):
    """``NVTE_QKV_Layout.NVTE_SBHD_SBHD_SBHD`` is its own name: the stand-in only tells them apart."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class NVTE_QKV_Layout(metaclass=FromName):
    pass


class NVTE_QKV_Format(metaclass=FromName):
    pass


class NVTE_Bias_Type(metaclass=FromName):
    pass


class NVTE_Mask_Type(metaclass=FromName):
    pass


class NVTE_Softmax_Type(metaclass=FromName):
    pass


class FP8TensorMeta:
    """A bag of ``scale``, ``scale_inv`` and ``amax_history``."""

    scale: torch.Tensor
    scale_inv: torch.Tensor
    amax_history: torch.Tensor


class AbsentType(type):
    """A name that may be mentioned, but whose every use ends the test."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return AbsentType(f"{cls.__name__}.{name}", (), {})

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"transformer_engine_torch.{cls.__name__} has no stand-in")


def absent(name: str) -> Any:
    """What stands for a function or class that the stand-in does not have."""
    return AbsentType(name, (), {})
