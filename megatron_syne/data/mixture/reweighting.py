"""New shares of a group's sources from how their validation perplexity changed (Llama-3-SynE's topics).

``r_i(t) = r_i(t-1) f_i / sum_j r_j(t-1) f_j`` with ``f_i = 1 + alpha * delta_i * w_i`` (Llama-3-SynE, arXiv
2407.18743, section 3.1): where the perplexity rises, the share rises. The paper normalises the change
``p_i(t) - p_i(t-1)`` in a way that is not known here; this divides by the largest change, so that
``-1 <= delta_i <= 1``. A function of numbers alone: every rank and every resumed run comes to the same shares.
No torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_syne.errors import ConfigError


def normalised_changes(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    """``delta_i``: change of each perplexity over the largest one, 0 where none changed."""
    changes = {name: now[name] - before[name] for name in now}
    largest = max((abs(change) for change in changes.values()), default=0.0)
    return {name: change / largest if largest > 0 else 0.0 for name, change in changes.items()}


def reweighted(
    shares: Mapping[str, float],
    before: Mapping[str, float],
    now: Mapping[str, float],
    alpha: float,
    weights: Mapping[str, float],
) -> dict[str, float]:
    """New shares of the sources in ``shares``; their sum stays. ``before``, ``now``: perplexities.

    ConfigError where a factor is not above 0 (alpha or a weight is too large).
    """
    deltas = normalised_changes({name: before[name] for name in shares}, {name: now[name] for name in shares})
    factors = {name: 1.0 + alpha * delta * weights.get(name, 1.0) for name, delta in deltas.items()}
    for name, factor in factors.items():
        if not factor > 0 or not math.isfinite(factor):
            raise ConfigError(
                f"data.reweighting: source {name} would get the factor {factor:g} (1 + alpha {alpha:g} x delta "
                f"{deltas[name]:g} x weight {weights.get(name, 1.0):g}); alpha x weight must be below 1"
            )
    total = math.fsum(shares.values())
    norm = math.fsum(shares[name] * factors[name] for name in shares)
    return {name: total * (shares[name] * factors[name] / norm) for name in shares}


def group_members(mixture: Mapping[str, Any], group: str) -> tuple[str, ...]:
    """Sources of a group of a stage's mixture, at any depth of nesting; () where the stage has no such group."""
    for name, value in mixture.items():
        if isinstance(value, Mapping):
            inner = value.get("of", {})
            if name == group:
                return tuple(inner)
            if found := group_members(inner, group):
                return found
    return ()
