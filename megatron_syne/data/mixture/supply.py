"""Whether the sources last: epochs that a plan reads of each one, against what is allowed. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping

from megatron_syne.config.loader import config_origin
from megatron_syne.config.schema import RunConfig, SourceConfig
from megatron_syne.data.mixture.plan import MixturePlan
from megatron_syne.errors import ConfigError


def usable_tokens(source: SourceConfig, tokens: int) -> int:
    """Tokens of a source's subset when its files hold ``tokens``, to within one document."""
    if source.first_tokens is not None:
        tokens = min(tokens, source.first_tokens)
    if source.top_fraction is not None:
        tokens = math.ceil(tokens * source.top_fraction)
    return tokens


def epochs_read(
    plan: MixturePlan, token_counts: Mapping[str, int], sample: int | None = None
) -> dict[str, float]:
    """Epochs of each source in the first ``sample`` samples (None = the run); of those with a known count.

    With ``best_fit`` the passes of several sequence lengths add up.
    """
    tokens = dict.fromkeys(plan.sources, 0)
    for (name, _), count in plan.passes(sample).items():
        tokens[name] += count
    return {
        name: tokens[name] / count if count > 0 else math.inf if tokens[name] else 0.0
        for name, count in token_counts.items()
        if name in tokens
    }


def check_supply(plan: MixturePlan, token_counts: Mapping[str, int], config: RunConfig) -> None:
    """Raise one ConfigError naming every source that the plan reads more often than ``max_epochs`` allows.

    ``token_counts``: tokens of one epoch of each source, its subset applied (with ``best_fit``: bins x
    sequence length); a source that is left out is not checked.
    """
    problems = shortages(plan, token_counts, config)
    if problems:
        text = "\n".join(f"  {problem}" for problem in problems)
        raise ConfigError(
            f"the mixture reads {len(problems)} source{'s' * (len(problems) > 1)} more often than allowed:\n{text}"
        )


def shortages(plan: MixturePlan, token_counts: Mapping[str, int], config: RunConfig) -> list[str]:
    """What :func:`check_supply` would say, one text per source."""
    problems = []
    for name, epochs in epochs_read(plan, token_counts).items():
        source = config.data.sources.get(name)
        if source is None or epochs <= source.max_epochs:
            continue
        there = token_counts[name]
        needed = plan.consumed(plan.num_samples)[name]
        allowed = math.floor(source.max_epochs * there)
        budget = f"{allowed / needed * plan.num_tokens:,.0f}" if allowed else "none"
        remedy = f"set data.sources.{name}.max_epochs to {math.ceil(epochs)} or .inf" if there else "add text"
        place = config_origin(config, f"data.sources.{name}")
        problems.append(
            f"data.sources.{name} ({place}): needs {needed:,} tokens and has {there:,} an epoch: {epochs:.2f} "
            f"epochs, max_epochs is {source.max_epochs:g}; largest budget of the run that fits: {budget} of "
            f"{plan.num_tokens:,} tokens; {remedy}, or give it at most "
            f"{math.floor(allowed / needed * 10000) / 10000:g} of its share"
        )
    return problems
