"""Shares of a mixture: nested groups multiplied out, and whole numbers of samples out of shares. No torch."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from megatron_syne.errors import ConfigError

SUM_TOLERANCE = 1e-6
"""Shares of one level sum to 1 within this: people write 0.333333."""


def flatten_shares(mixture: Mapping[str, Any], sources: Collection[str], where: str) -> dict[str, float]:
    """Share of each source with nested groups multiplied out; ``where`` names the field in errors.

    A source that stands in several groups gets the sum. Raises ConfigError.
    """
    if not isinstance(mixture, Mapping) or not mixture:
        raise ConfigError(f"{where}: must name at least one source with its share")
    here: dict[str, float] = {}
    flat: dict[str, float] = {}
    for name, value in mixture.items():
        field = f"{where}.{name}"
        if isinstance(value, Mapping):
            if unknown := set(value) - {"share", "of"}:
                raise ConfigError(f"{field}: a group has the fields share and of; found {sorted(unknown)}")
            if missing := {"share", "of"} - set(value):
                raise ConfigError(f"{field}: a group needs {' and '.join(sorted(missing))}")
            here[name] = _share(value["share"], f"{field}.share")
            inner = flatten_shares(value["of"], sources, f"{field}.of")
        else:
            here[name] = _share(value, field)
            if name not in sources:
                near = difflib.get_close_matches(str(name), list(sources), n=1)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sources) or 'none'}"
                raise ConfigError(f"{field}: no source of this name in data.sources; {hint}")
            inner = {name: 1.0}
        for source, share in inner.items():
            flat[source] = flat.get(source, 0.0) + here[name] * share
    total = math.fsum(here.values())
    if abs(total - 1) > SUM_TOLERANCE:
        terms = " + ".join(f"{name} {share:g}" for name, share in here.items())
        raise ConfigError(f"{where}: shares must sum to 1, found {terms} = {total:.9g}")
    return flat


def _share(value: Any, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{field}: a share is a number, found {value!r}")
    if not 0 < value <= 1 + SUM_TOLERANCE:  # also refuses NaN
        raise ConfigError(f"{field}: a share must be above 0 and at most 1, found {value}")
    return float(value)


def places_of(mixture: Mapping[str, Any], source: str) -> int:
    """How many times a source is named in a mixture, at any depth."""
    count = 0
    for name, value in mixture.items():
        if isinstance(value, Mapping):
            inner = value.get("of")
            count += places_of(inner, source) if isinstance(inner, Mapping) else 0
        else:
            count += name == source
    return count


def apportion(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers that sum to ``total``, each within 1 of its share of it (largest remainder)."""
    norm = math.fsum(shares)
    exact = [share / norm * total for share in shares]
    counts = [math.floor(value) for value in exact]
    # the earlier source wins a tie; one that was given no share is never handed a sample
    order = sorted(
        (index for index, share in enumerate(shares) if share > 0),
        key=lambda index: (counts[index] - exact[index], index),
    )
    for index in order[: total - sum(counts)]:
        counts[index] += 1
    return counts
