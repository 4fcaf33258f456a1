"""The rules of what is watched while training.

Whether the ``wandb`` package is installed is asked where the run starts (``monitor.wandb.require_wandb``): a login
node need not have it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_syne.preflight.facts import Facts

Problems = Iterator[str]


def norms_interval_counts(facts: Facts) -> Problems:
    """Norms are looked at every so many iterations, or never."""
    interval = facts.config.monitor.norms_interval
    if interval is not None and interval < 1:
        yield f"{facts.at('monitor.norms_interval')} must be at least 1, or null for never"


def peak_is_a_rate(facts: Facts) -> Problems:
    """MFU is of a rate in FLOP/s: below 1e9 it was given in TFLOP/s."""
    peak = facts.config.monitor.peak_flops
    if peak is not None and not 1e9 <= peak < float("inf"):
        yield f"{facts.at('monitor.peak_flops')} must be in FLOP/s (an H100 has 989.4e12 in bf16)"


def wandb_is_named(facts: Facts) -> Problems:
    """A Weights & Biases project has a name, and a run is named only where there is a project."""
    monitor = facts.config.monitor
    if monitor.wandb_project is not None and not monitor.wandb_project.strip():
        yield f"{facts.at('monitor.wandb_project')} is empty; give the project's name, or null"
    if monitor.wandb_name is not None and monitor.wandb_project is None:
        yield f"{facts.at('monitor.wandb_name')} needs monitor.wandb_project, which is not given"


MONITOR_RULES: tuple[Callable[[Facts], Problems], ...] = (
    norms_interval_counts,
    peak_is_a_rate,
    wandb_is_named,
)
