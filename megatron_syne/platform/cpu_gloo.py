"""gloo as the CPU platform uses it: groups of one rank share a network thread, and DDP's
collectives in them are copies.

Neither changes a number. Without them a step of one process with two OpenMP threads takes 1.3 times as long.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed.distributed_c10d as c10d


class FrugalGloo(c10d.ProcessGroupGloo):  # type: ignore[misc]
    """A gloo group that, alone in it, has no device of its own.

    Each device is a thread that wakes a hundred times a second, and torch makes one for every group: megatron-core
    builds about twenty, most of them of one rank, which never connect to anybody. Groups of several ranks keep their
    own: with a shared one, a rank of eight was once seen to crash.
    """

    _device: Any = None

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        if size > 1:
            super().__init__(store, rank, size, timeout)
            return
        if FrugalGloo._device is None:
            FrugalGloo._device = self.create_default_device()
        options = self._Options()
        options._devices, options._timeout = [FrugalGloo._device], timeout
        super().__init__(store, rank, size, options)


def bridge_gloo() -> None:
    """Let torch build :class:`FrugalGloo` groups, and megatron-core's DDP copy where a group has one rank.

    Once per process, before the first group. gloo's own copy for one rank runs in a thread of its own with an OpenMP
    team of its own; with more teams than CPUs libgomp lets every thread sleep between parallel regions.
    """
    from megatron.core.distributed import param_and_grad_buffer as buffers

    c10d.ProcessGroupGloo = FrugalGloo
    buffers.dist_reduce_scatter_func = _copied_alone(buffers.dist_reduce_scatter_func)
    buffers.dist_all_gather_func = _copied_alone(buffers.dist_all_gather_func)


def _copied_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """A collective on (output, input) that is a copy in a group of one rank, done at once: no handle to wait for."""

    def collect(output: torch.Tensor, source: torch.Tensor, *args: Any, group: Any, **options: Any) -> Any:
        if group.size() > 1:
            return collective(output, source, *args, group=group, **options)
        if output.data_ptr() != source.data_ptr():
            output.copy_(source)
        return None

    return collect
