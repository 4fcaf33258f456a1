"""The rules of what is recomputed, offloaded, overlapped; the optimizer's formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_syne.preflight.facts import Facts

Problems = Iterator[str]
MEMORY_RULES: tuple[Callable[[Facts], Problems], ...] = ()
