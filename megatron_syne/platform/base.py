"""What the rest of the stack may ask of the machine, and the choice between CUDA and CPU."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from megatron_syne.config.schema import PrecisionConfig, RunConfig


class Platform(ABC):
    """One kind of machine. Create it with :func:`select`, before megatron-core is imported."""

    name: str
    """``cpu`` or ``cuda``."""
    backend: str
    """torch.distributed backend: ``gloo`` or ``nccl``."""

    pins_memory = False
    """Whether copies to the device are faster out of pinned memory."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of this rank's tensors."""

    @abstractmethod
    def start(self, local_rank: int, precision: PrecisionConfig, deterministic: bool = False) -> None:
        """Make the machine ready; raises ConfigError where it cannot run this precision.

        ``deterministic``: only algorithms that give the same bits each time, where there are any.
        """

    @abstractmethod
    def layer_spec(self, config: RunConfig) -> tuple[Any, Any]:
        """megatron-core's layer ``ModuleSpec`` and the class of the final norm (None = the engine's own)."""

    @abstractmethod
    def engine_options(self, config: RunConfig) -> dict[str, Any]:
        """Fields of megatron-core's ``TransformerConfig`` that depend on the machine."""

    @abstractmethod
    def peak_memory(self) -> int:
        """Peak memory of this rank in bytes: allocated device memory on CUDA, resident set on CPU."""

    @abstractmethod
    def describe(self) -> str:
        """One line for the log: device, versions, which optional packages are used and why."""

    @abstractmethod
    def document_attention(self, document_ids: torch.Tensor) -> tuple[torch.Tensor | None, Any]:
        """What keeps attention within documents: (attention mask, megatron-core's ``PackedSeqParams``), one None.

        ``document_ids`` [micro batch, seq], rising from document to document; both are causal.
        """

    @property
    def device_name(self) -> str | None:
        """What torch calls this rank's GPU, as ``NVIDIA H100 80GB HBM3``; None on a CPU."""
        return None

    def mark(self) -> Any:
        """A point in this rank's work, for :meth:`seconds_between`; nothing waits for it."""
        return time.perf_counter()

    def seconds_between(self, begin: Any, end: Any) -> float:
        """Seconds that the device spent between two marks; both must lie before what was last waited for."""
        return float(end - begin)

    def fetch(self, values: torch.Tensor) -> Callable[[], list[float]]:
        """Begin to copy ``values`` [n] to the host; what is returned waits for them, and for nothing begun after."""
        return values.tolist

    def to_device(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copy a batch to this rank's device (no copy where it is there already)."""
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}


def use_deterministic_torch(deterministic: bool) -> None:
    """torch's deterministic algorithms, a warning where there is none; fresh memory is not filled for it."""
    import torch

    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    if deterministic:
        options: Any = torch.utils.deterministic
        options.fill_uninitialized_memory = False


def has_gpu() -> bool:
    """Whether an NVIDIA GPU is visible, asked without torch: ``auto`` must be known before its import."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return os.path.exists("/proc/driver/nvidia/version") or os.path.exists("/dev/nvidiactl")


def resolve_name(wanted: str) -> str:
    """``auto`` -> ``cuda`` where a GPU is visible, else ``cpu``."""
    return ("cuda" if has_gpu() else "cpu") if wanted == "auto" else wanted


def select(wanted: str) -> Platform:
    """The platform for ``auto``, ``cpu`` or ``cuda``; must be called before megatron-core is imported.

    ``cpu`` hides the GPUs of the machine, so that engine and torch agree that there is none.
    """
    if resolve_name(wanted) == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        from megatron_syne.platform.cpu import CpuPlatform

        return CpuPlatform()
    from megatron_syne.platform.cuda import CudaPlatform

    return CudaPlatform()
