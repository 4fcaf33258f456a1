"""A few threads that work through queues of tasks; hashing, reading and writing all let go of the GIL."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence

from megatron_syne.convert.outfile import Stages, Writer
from megatron_syne.convert.tiles import Buffers, Count

MAX_JOBS = 16
_WRITERS = 4
"""Direct writes under way at once: what one fast disk needs to be busy."""
_LATER = 5
"""Niceness of threads that begin with another queue than the first."""
Task = Callable[[Buffers, Count], None]


class _Stopped(Exception):
    """Another task failed, or the program was asked to stop."""


def job_count(jobs: int) -> int:
    """``jobs``, or with 0 two for each processor that this process may use (one works while the other waits for
    the disk), at most ``MAX_JOBS``."""
    return jobs if jobs > 0 else min(MAX_JOBS, 2 * len(os.sched_getaffinity(0)))


def work(queues: Sequence[Sequence[Task]], jobs: int, tick: Callable[[int], None]) -> None:
    """Do all tasks. Thread i takes from queue i (modulo their number) and from the others when that is empty.

    ``tick`` is called in this thread about ten times a second with the sum of what the tasks have counted.
    The first error of a task stops all, and is raised; so does anything raised in this thread (Ctrl-C).
    """
    waiting = [deque(queue) for queue in queues if queue]
    lock, stop = threading.Lock(), threading.Event()
    writer = Writer(_WRITERS)
    errors: list[BaseException] = []
    done = 0

    def count(size: int) -> None:
        nonlocal done
        if stop.is_set():
            raise _Stopped
        with lock:
            done += size

    def loop(index: int) -> None:
        buffers = Buffers(stages=Stages(writer))
        try:
            try:
                while (task := take(index)) is not None:
                    count(0)
                    task(buffers, count)
            finally:
                buffers.stages.drain()
        except _Stopped:
            pass
        except BaseException as error:
            errors.append(error)
            stop.set()

    def take(index: int) -> Task | None:
        with lock:
            queue = next((q for q in (*waiting[index:], *waiting[:index]) if q), None)
            return queue.popleft() if queue else None

    number = min(jobs, sum(map(len, waiting)))
    threads = [threading.Thread(target=loop, args=(i % len(waiting),), daemon=True) for i in range(number)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.1)
                tick(done)
    finally:
        stop.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        writer.close()
    if errors:
        raise errors[0]
