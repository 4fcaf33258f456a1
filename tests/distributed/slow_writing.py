"""Background writers that begin only after the next step: what they write was changed by it, if it was not copied."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PATIENCE = 60.0
"""Seconds until a writer begins in any case."""


@contextmanager
def written_after_the_next_step(trainer: Any) -> Iterator[list[int]]:
    """Hold back each file of a checkpoint that training goes on after; the steps that writers waited for."""
    from megatron_syne.checkpoint import pending

    write, waited = pending.write_bucket, []

    def late(bucket: Any, transforms: Any, stop: Any) -> Any:
        last = trainer.train_iters if trainer.leg_end is None else trainer.leg_end
        step, given_up = trainer.state.step, time.monotonic() + PATIENCE
        while trainer.state.step == step < last and trainer.stop_reason is None and not stop.is_set():
            if time.monotonic() > given_up:
                raise TimeoutError(f"step {step} was not followed by another")
            time.sleep(0.005)
        if trainer.state.step > step:
            waited.append(step)
        return write(bucket, transforms, stop)

    pending.write_bucket = late
    try:
        yield waited
    finally:
        pending.write_bucket = write
