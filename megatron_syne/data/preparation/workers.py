"""Blocks to tokens in this process or in several; the bytes are the same for any number of them.

A worker gets whole blocks of bytes and gives back flat arrays: the process that reads and writes neither parses
nor looks at a token, so that it can feed many. The workers start while that process still loads the tokenizer.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, TypeVar

from megatron_syne.data.documents.blocks import Block
from megatron_syne.data.preparation.encode import Encoded, encode_block
from megatron_syne.data.preparation.job import Job
from megatron_syne.data.tokenizer import Tokenizer
from megatron_syne.errors import IOFault

_BLOCKS_AHEAD = 3

Source = TypeVar("Source")


class Workers:
    """``count`` processes that tokenise (fewer than 2 = this process does), until it is left."""

    def __init__(self, count: int, job: Job) -> None:
        self._count, self._job = count, job
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        if self._count >= 2:
            context = multiprocessing.get_context("spawn")  # a forked copy of threads of tokenizers can hang
            self._letters: Any = context.SimpleQueue()
            self._pool = ProcessPoolExecutor(
                self._count, mp_context=context, initializer=_start_worker, initargs=(self._letters,)
            )
            for _ in range(self._count):  # each starts a process, as none is idle yet
                self._pool.submit(os.getpid)
            self._given = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            if not self._given:
                self._give(None)
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _give(self, letter: tuple[Tokenizer, Job] | None) -> None:
        """One for each worker, by a thread: a worker that died would leave this process waiting."""
        self._given = True
        letters, count = self._letters, self._count

        def put() -> None:
            for _ in range(count):
                letters.put(letter)

        threading.Thread(target=put, daemon=True).start()

    def encode(
        self, blocks: Iterable[tuple[Source, Block]], tokenizer: Tokenizer
    ) -> Iterator[tuple[Source, Block, Encoded]]:
        """Every block with what it became, in order. IOFault where a worker died."""
        if self._pool is None:
            for source, block in blocks:
                yield source, block, encode_block(block, tokenizer, self._job)
            return
        self._give((tokenizer, self._job))
        waiting: deque[tuple[Source, Block, Future[Encoded]]] = deque()
        try:
            for source, block in blocks:
                waiting.append(
                    (source, block._replace(data=b""), self._pool.submit(_encode_in_worker, block))
                )
                if len(waiting) >= _BLOCKS_AHEAD * self._count:
                    yield _first(waiting)
            while waiting:
                yield _first(waiting)
        except BrokenProcessPool:
            raise IOFault(
                "a tokenising worker died (out of memory?); start again, with fewer --workers if it repeats"
            ) from None


def _first(waiting: deque[tuple[Source, Block, Future[Encoded]]]) -> tuple[Source, Block, Encoded]:
    source, block, future = waiting.popleft()
    return source, block, future.result()


_worker: tuple[Tokenizer, Job] | None = None


def _start_worker(letters: Any) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers for ctrl-C
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _worker = letters.get()


def _leave_with_parent() -> None:
    """A parent that is killed outright cannot stop its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(block: Block) -> Encoded:
    assert _worker is not None
    return encode_block(block, *_worker)
