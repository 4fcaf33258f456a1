"""The rules of evaluation by lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_syne.preflight.facts import Facts

Problems = Iterator[str]
HARNESS_RULES: tuple[Callable[[Facts], Problems], ...] = ()
