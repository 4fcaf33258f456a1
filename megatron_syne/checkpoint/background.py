"""What is written beside the training: the copy that is taken, and the threads that write it.

Threads, not processes. torch lets go of Python's lock while it writes a tensor (256 MiB tensors written by one thread
keep another waiting 4 ms at most, measured on a CPU), and what is written in the background is nothing but tensors:
all planning has been done. megatron-core's writers are processes forked off the training one, each time: a child that
inherits CUDA, its threads' locks and its page tables, and a manager started to hand back their results. A thread dies
with its process and tells its errors as they are.
"""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item

from megatron_syne.platform.host_memory import page_lock, unlock, wait_for_device

Bucket = tuple[str, str, tuple[list[Any], list[Any]]]
"""megatron-core's (path, file name, (items that are bytes, items that are tensors)): what one file holds."""


class Abandoned(Exception):
    """Writing was given up, since training has failed."""


class HostCopies:
    """Host memory that a checkpoint's tensors are copied into, kept from one checkpoint to the next.

    Tensors come in the same order each time, so each finds its memory again. Bytes: those of this rank's part of a
    checkpoint. ``pin``: page-locked, so that the GPU writes into it by itself.
    """

    def __init__(self, pin: bool) -> None:
        self.pin = pin
        self._tensors: list[torch.Tensor] = []
        self._locked: list[torch.Tensor] = []
        self._next = 0

    def begin(self) -> None:
        """The first tensor of a checkpoint comes next."""
        self._next = 0

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in host memory; on a GPU it is there after :meth:`wait`, and the tensor must live until then."""
        kept = self._tensors[self._next] if self._next < len(self._tensors) else None
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            if kept is not None:
                self._release(self._next)
            kept = self._new(tensor)
        self._next += 1
        return kept.copy_(tensor.detach(), non_blocking=True)

    def wait(self) -> None:
        """Until all copies are there."""
        wait_for_device()

    def close(self) -> None:
        """Give the memory back."""
        self._release(0)

    def _new(self, tensor: torch.Tensor) -> torch.Tensor:
        made = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        if self.pin and made.numel():
            failed = page_lock(made)
            if failed:  # the copy is then a slow one, and right
                self.pin = False
                words = f"memory cannot be page-locked (CUDA error {failed}); copies take longer"
                print(f"checkpoint.async_save: {words}", file=sys.stderr)
            else:
                self._locked.append(made)
        self._tensors.append(made)
        return made

    def _release(self, first: int) -> None:
        gone = {id(each) for each in self._tensors[first:]}
        for tensor in self._locked:
            if id(tensor) in gone:
                unlock(tensor)
        self._locked = [each for each in self._locked if id(each) not in gone]
        del self._tensors[first:]


class Beside:
    """Work done in a thread of its own; its error is kept for whoever asks for the result."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="checkpoint")
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return not self._thread.is_alive()

    def result(self) -> Any:
        """Wait for the end; what the work returned, or its error raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result

    def _run(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:
            self._error = error
        finally:
            del self._work  # and what it holds


class _File(io.BufferedWriter):
    """A file whose writing ends with Abandoned once ``stop`` is set."""

    stop: threading.Event

    def write(self, data: Any) -> int:
        if self.stop.is_set():
            raise Abandoned
        return super().write(data)


def write_bucket(bucket: Bucket, transforms: Any, stop: threading.Event) -> list[Any]:
    """Write one file and sync it to disk; torch's ``WriteResult`` of each item. Raises what the disk raises.

    The format is that of megatron-core's ``filesystem_async.write_preloaded_data``: torch's own of each item.
    """
    path, name, (blobs, tensors) = bucket
    with _File(io.FileIO(path, "w")) as stream:
        stream.stop = stop
        results = []
        for item, data in (*blobs, *tensors):
            if isinstance(data, torch.Tensor):
                data = data.cpu()
            results.append(_write_item(transforms, stream, data, item, name, SerializationFormat.TORCH_SAVE))
        stream.flush()
        os.fsync(stream.fileno())
    return results
