"""One checkpoint on its way to disk: copied or held, written by threads of every rank, sealed by one of rank 0.

The engine plans (which rank writes which tensor into which file) and, once all files are there, writes its
``.metadata``; both are collective and are done between steps. The writing in between needs no other rank.
"""

from __future__ import annotations

import queue
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import _StorageWriterTransforms

from megatron_syne.checkpoint.background import Beside, HostCopies, write_bucket
from megatron_syne.checkpoint.capture import address
from megatron_syne.checkpoint.optimizer_state import leaves


class PendingSave:
    """Begun by its constructor, which all ranks must call, as :meth:`advance`."""

    def __init__(
        self,
        sharded: dict[str, Any],
        temporary: Path,
        copies: HostCopies | None,
        private: set[int],
        seal: Callable[[], None],
    ) -> None:
        """Plan and start to write ``sharded`` into the folder ``temporary``.

        ``copies``: where values are copied to before anything is written, so that training may go on at once; None =
        it waits. ``private``: storages (their addresses) that need no copy. ``seal``: what rank 0 does when all is
        written. Raises what torch's CheckpointException tells of the planning.
        """
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        self._seal, self._written = seal, False
        self._sealing: Beside | None = None
        self._stop = threading.Event()
        live = _storages(sharded) - private
        # In place of a process that holds the queue for the engine's forked writers (started by the first save).
        self._results: Any = queue.SimpleQueue()
        filesystem_async._results_queue = self._results
        if copies is not None:
            copies.wait()  # what was copied already is read by the engine's planning
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            request = dist_checkpointing.save(sharded, str(temporary), async_sharded_save=True)
        self._finalize = list(request.finalize_fns)
        buckets = request.async_fn_args[1] if request.async_fn_args else []
        if copies is not None:
            buckets = [_copied(bucket, copies, live) for bucket in buckets]
            copies.wait()
            self._forget_originals(request)
        transforms = _StorageWriterTransforms()
        self._writers = [Beside(partial(write_bucket, bucket, transforms, self._stop)) for bucket in buckets]

    @property
    def ended(self) -> bool:
        """Whether this rank's part of what is being done has ended, well or not."""
        return all(each.done for each in ([self._sealing] if self._sealing else self._writers))

    def advance(self) -> bool:
        """Wait for all ranks' parts of what is being done and begin what is next; True = the checkpoint is complete.

        Raises CheckpointException or OSError on all ranks alike: the one where a rank could not write its tensors, the
        other where rank 0 could not finish. Not alike where rank 0 cannot write the engine's own small files
        (``common.pt``, ``.metadata``): the other ranks then wait in a collective, which ends with rank 0's process.
        """
        if not self._written:
            self._hand_in()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for function in self._finalize:
                    function()
            self._written = True
            self._finalize = []
            self._sealing = Beside(self._seal) if dist.get_rank() == 0 else None
            self._writers = []
            return False
        failure: list[OSError | None] = [None]
        if self._sealing is not None:
            try:
                self._sealing.result()
            except OSError as error:
                failure[0] = error
        dist.broadcast_object_list(failure, src=0)
        if failure[0] is not None:
            raise failure[0]
        return True

    def abandon(self) -> None:
        """Stop writing, without a word to the other ranks. What is only to be sealed is sealed: that needs no rank."""
        self._stop.set()
        for each in (*self._writers, *([self._sealing] if self._sealing else [])):
            with suppress(BaseException):  # of no use any more
                each.result()

    def _hand_in(self) -> None:
        """Give the engine what was written, or the error, where it looks for it."""
        results: dict[int, list[Any]] | Exception = {}
        for place, writer in enumerate(self._writers):
            try:
                found = writer.result()
            except Exception as error:
                results = error
            if isinstance(results, dict):
                results[place] = found
        if self._writers:
            self._results.put(results)

    def _forget_originals(self, request: Any) -> None:
        """Let go of the tensors that the engine's writer still holds, of which only the number of files is used."""
        held = request.async_fn_args[1] if request.async_fn_args else []
        held[:] = [(path, name, ([], [])) for path, name, _ in held]


def _copied(bucket: Any, copies: HostCopies, live: set[int]) -> Any:
    """The bucket with copies in place of all tensors that are on a device, or that training goes on to change."""
    path, name, (blobs, tensors) = bucket
    own = [
        (item, copies.copy(tensor) if not tensor.is_cpu or address(tensor) in live else tensor)
        for item, tensor in tensors
    ]
    return path, name, (blobs, own)


def _storages(sharded: dict[str, Any]) -> set[int]:
    """Addresses of all that a sharded state dict points at."""
    return {address(leaf.data) for leaf in leaves(sharded) if leaf.data is not None}
