"""GPUs that the planner knows: dense peak rates, memory and links, each with its source."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_syne.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One type of GPU as its maker states it; rates without structured sparsity."""

    name: str
    memory_bytes: int
    """What torch reports as its total: less than the name says, where error correction takes its part."""
    bf16_flops: float
    """FLOP/s of dense bf16 matrix products."""
    fp8_flops: float
    """FLOP/s of dense FP8 products; 0 = has none."""
    memory_bandwidth: float
    """Bytes/s of its own memory."""
    nvlink_bandwidth: float
    """Bytes/s to the other GPUs of its node, one direction."""
    network_bandwidth: float
    """Bytes/s to other nodes, one direction, of the usual node (one network card per GPU)."""
    gpus_per_node: int = 8
    fp8_transposed: bool = True
    """Whether its FP8 products need a transposed copy of the weights for the backward pass (Hopper and Ada multiply
    FP8 in one layout alone: Transformer Engine issue 1261; Blackwell in all)."""
    fp8_recipes: tuple[str, ...] = ("delayed", "tensorwise", "blockwise")
    """The recipes that Transformer Engine has on it: FP8 from compute capability 8.9 on, blockwise from 9.0 on
    (``check_fp8_support`` and ``check_fp8_block_scaling_support`` in its ``pytorch/quantization.py``)."""

    def peak_flops(self, in_fp8: bool) -> float:
        """FLOP/s that MFU is of: FP8's where a run computes in it (not emulated) and the GPU has it, else bf16's."""
        return self.fp8_flops if in_fp8 and self.fp8_flops else self.bf16_flops


def _gib(amount: float) -> int:
    return int(amount * GIB)


# Rates and bandwidths: NVIDIA's data sheets, halved where they count structured sparsity; links are given there for
# both directions together. Memory: "total capacity" in torch's out-of-memory messages, in GiB.
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        # H100 data sheet, SXM; 400 Gb/s per GPU (DGX H100 data sheet); 79.11 GiB (vLLM issue 27508)
        Gpu("h100", _gib(79.11), 989.4e12, 1978.9e12, 3.35e12, 450e9, 50e9),
        # H100 data sheet, PCIe, without bridges: PCIe 5 x16; memory taken as of the SXM card; 200 Gb/s assumed
        Gpu("h100-pcie", _gib(79.11), 756e12, 1513e12, 2.0e12, 64e9, 25e9),
        # H100 data sheet, NVL (835.5 and 1,671); bridges join pairs, the rest is PCIe 5 x16; 93.0 GiB (VACE issue 56)
        Gpu("h100-nvl", _gib(93.0), 835.5e12, 1671e12, 3.9e12, 64e9, 25e9),
        # H200 data sheet, SXM; DGX H200: 400 Gb/s per GPU; 139.8 GiB (unverified)
        Gpu("h200", _gib(139.8), 989.4e12, 1978.9e12, 4.8e12, 450e9, 50e9),
        # A100 data sheet, SXM 40 GB; DGX A100: 200 Gb/s per GPU; 39.39 GiB (unverified)
        Gpu("a100-40gb", _gib(39.39), 312e12, 0.0, 1.555e12, 300e9, 25e9, fp8_recipes=()),
        # A100 data sheet, SXM 80 GB; 79.25 GiB (OOTDiffusion issue 235)
        Gpu("a100-80gb", _gib(79.25), 312e12, 0.0, 2.039e12, 300e9, 25e9, fp8_recipes=()),
        # DGX B200 data sheet by 8: 72 PFLOP/s of sparse FP8, 64 TB/s, 14.4 TB/s of NVLink, 400 Gb/s; 178.4 GiB
        # (unverified)
        Gpu("b200", _gib(178.4), 2.25e15, 4.5e15, 8.0e12, 900e9, 50e9, fp8_transposed=False),
        # L40S data sheet; PCIe 4 x16, no NVLink; 44.4 GiB (of the L40, of the same size: Qwen3-VL issue 2097);
        # 200 Gb/s for each GPU assumed
        Gpu(
            "l40s",
            _gib(44.4),
            362.05e12,
            733e12,
            0.864e12,
            32e9,
            25e9,
            fp8_recipes=("delayed", "tensorwise"),
        ),
    )
}
"""By the name that ``--gpu`` takes."""

_DEVICES = {
    "H100 80GB HBM3": "h100",
    "H100 PCIe": "h100-pcie",
    "H100 NVL": "h100-nvl",
    "H200": "h200",
    "A100-SXM4-40GB": "a100-40gb",
    "A100-SXM4-80GB": "a100-80gb",
    "B200": "b200",
    "L40S": "l40s",
}
"""torch's name without ``NVIDIA`` -> name here. In full: an H200 NVL or H20 is not an H200."""


def gpu_named(name: str) -> Gpu:
    """The GPU of that name; raises ConfigError that lists the known ones."""
    if name not in GPUS:
        raise ConfigError(f"--gpu: {name!r} is unknown; known: {', '.join(GPUS)}")
    return GPUS[name]


def check_fp8(gpu: Gpu, recipe: str | None) -> None:
    """ConfigError that names the GPUs that have an FP8 recipe, where this one has it not."""
    if recipe is not None and recipe not in gpu.fp8_recipes:
        have = [name for name, other in GPUS.items() if recipe in other.fp8_recipes]
        raise ConfigError(
            f"precision.fp8 = {recipe}: --gpu {gpu.name} has no such FP8; these have: {', '.join(have)}"
        )


def gpu_of_device(device_name: str) -> Gpu | None:
    """The GPU that torch calls ``device_name`` (``NVIDIA H100 80GB HBM3``), None where it is not known."""
    name = _DEVICES.get(device_name.removeprefix("NVIDIA ").strip())
    return None if name is None else GPUS[name]
