"""The rules of what trains: freezing, groups, z-loss, noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_syne.preflight.facts import Facts

Problems = Iterator[str]
TRAINABLE_RULES: tuple[Callable[[Facts], Problems], ...] = ()
