"""``train.deterministic_mode`` on the CPU platform, which is deterministic in any case: it changes no bit."""

from __future__ import annotations

import pytest

from .conftest import Bench
from .test_layouts import NO_SAVE

pytestmark = pytest.mark.slow


def test_the_mode_changes_nothing_on_a_cpu(bench: Bench) -> None:
    """Losses and gradient norms of four steps, and what the engine was told."""
    bf16 = "precision.params_dtype=bf16"
    jobs = {"plain": [bf16], "mode": [bf16, "train.deterministic_mode=true"], "again": [bf16]}
    results = bench.train(1, jobs, {name: {**NO_SAVE, "abandon_at": 4} for name in jobs})
    steps = {name: result["steps"] for name, result in results.items()}
    assert len(steps["plain"]) == 4 and len({row["loss"] for row in steps["plain"]}) == 4
    assert steps["mode"] == steps["plain"] == steps["again"]
