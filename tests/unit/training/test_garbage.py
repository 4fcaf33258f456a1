"""Collections of garbage during training pass over what was there before it; a trainer let go of is collected."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

from megatron_syne.assembly import release
from megatron_syne.training.trainer import settle_garbage


class Ring:
    """Points at itself: only a collection frees it."""

    def __init__(self) -> None:
        self.itself = self


def test_what_was_set_aside_is_collected_once_the_trainer_is_let_go_of() -> None:
    ring = Ring()
    gone = weakref.ref(ring)
    settle_garbage()
    try:
        trainer: Any = SimpleNamespace(
            train_data=SimpleNamespace(close=lambda: None), optimizer=None, chunks=[ring], callbacks=()
        )
        del ring
        gc.collect()
        assert gc.get_freeze_count() > 0 and gone() is not None
        trainer.chunks.clear()
        gc.collect()
        assert gone() is not None, "it was not set aside"
        release(trainer)
        assert gone() is None and gc.get_freeze_count() == 0
    finally:
        gc.unfreeze()
