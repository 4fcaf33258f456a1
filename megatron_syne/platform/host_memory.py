"""Page-locked host memory of exact size, which a GPU copies into by itself. Not run on a GPU yet.

torch's own pinned memory rounds each allocation up to a power of two (c10/core/CachingHostAllocator.h), which of a
whole checkpoint are tens of gigabytes; memory that is there already can be registered as it is, as torch's own
asynchronous checkpoints do (torch/distributed/_state_dict_utils.py).
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

PORTABLE = 1
"""``cudaHostRegisterPortable``: locked for every context of the process."""


def page_lock(tensor: torch.Tensor) -> int:
    """Lock a host tensor's memory; CUDA's error, 0 = it is locked. To be unlocked before it is freed."""
    return _told_once(
        _runtime().cudaHostRegister(tensor.data_ptr(), tensor.numel() * tensor.element_size(), PORTABLE)
    )


def unlock(tensor: torch.Tensor) -> None:
    """Undo :func:`page_lock`."""
    _told_once(_runtime().cudaHostUnregister(tensor.data_ptr()))


def _told_once(result: Any) -> int:
    """CUDA's error as a number, and taken out of CUDA's memory: the next kernel of all would be blamed for it.

    torch asks for the last error, which forgets it, after each kernel that it launches (c10/cuda/CUDAException.h).
    """
    code = int(result)
    if code:
        with suppress(RuntimeError):
            torch.ones(1, device="cuda").add_(1)
    return code


def wait_for_device() -> None:
    """Until all that was given to this rank's GPU is done; nothing on a CPU."""
    torch.cuda.synchronize()


def _runtime() -> Any:
    cuda: Any = torch.cuda
    return cuda.cudart()
