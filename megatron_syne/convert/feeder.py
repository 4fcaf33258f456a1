"""A hash that runs behind in a thread of its own: what was read once for one purpose is hashed for another."""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import Any

import numpy as np

from megatron_syne.convert.streams import Bytes

_BUFFERS = 4


class Feeder:
    """Buffers that are filled by one thread and hashed, in their order, by another.

    SHA-256 takes longer than all else that is done with a weight, and cannot be cut into parts: so it gets a
    thread that does nothing but hash, and nobody reads a file a second time for it.
    """

    def __init__(self, digest: Any) -> None:
        """``digest`` is one of hashlib's."""
        self._digest = digest
        self._free: SimpleQueue[Bytes] = SimpleQueue()
        self._full: SimpleQueue[tuple[Bytes, int] | None] = SimpleQueue()
        for _ in range(_BUFFERS):
            self._free.put(np.empty(0, np.uint8))
        self._filling: tuple[Bytes, int] | None = None
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def get(self, rows: int, row_bytes: int) -> Bytes:
        """A contiguous matrix of bytes to be filled; waits until the hash has caught up."""
        size = rows * row_bytes
        buffer = self._free.get()
        if len(buffer) < size:
            buffer = np.empty(size, np.uint8)
        self._filling = (buffer, size)
        return buffer[:size].reshape(rows, row_bytes)

    def put(self) -> None:
        """Hand over what :meth:`get` gave last; it must not be used any more."""
        self._full.put(self._filling)

    def close(self) -> str:
        """Wait for the hash; its hex digest."""
        self._full.put(None)
        self._thread.join()
        return str(self._digest.hexdigest())

    def _loop(self) -> None:
        while (item := self._full.get()) is not None:
            buffer, size = item
            self._digest.update(memoryview(buffer)[:size])  # type: ignore[arg-type]
            self._free.put(buffer)
