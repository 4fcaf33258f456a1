"""``plan``: what a configuration will read, as a table and as a picture or page of the mixture over tokens."""

from __future__ import annotations

import argparse

import numpy as np

from megatron_syne.config.loader import load_config
from megatron_syne.data.mixture.plan import MixturePlan
from megatron_syne.data.mixture.planning import plan_mixture
from megatron_syne.data.mixture.report import mixture_over_tokens, plan_table
from megatron_syne.data.mixture.supply import epochs_read, shortages
from megatron_syne.inspection.text import say
from megatron_syne.preflight.manifests import source_token_counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", help="section.option=value")
    parser.add_argument("--output", metavar="FILE", help="also draw it: .png, or .html to look into")


def run(options: argparse.Namespace) -> int:
    """Print, and draw where asked; returns the exit code."""
    config = load_config(options.config, options.overrides)
    plan = plan_mixture(config)
    counts, remarks = source_token_counts(config)
    say(plan_table(plan, counts))
    for remark in [*remarks, *shortages(plan, counts, config)]:
        say(f"note: {remark}")
    if options.output:
        draw(options.output, plan, epochs_read(plan, counts))
        say(f"picture: {options.output}")
    return 0


def draw(path: str, plan: MixturePlan, epochs: dict[str, float], reached: int | None = None) -> None:
    """The picture of a plan, or with ``.html`` its page; ``reached``: tokens consumed so far."""
    from megatron_syne.pictures.mixture import draw_mixture, mixture_figure
    from megatron_syne.pictures.page import page

    positions, shares = mixture_over_tokens(plan)
    ends = np.cumsum([stage.tokens for stage in plan.stages]).tolist()
    stages = [(stage.name, end) for stage, end in zip(plan.stages, ends, strict=True)]
    if path.endswith(".html"):
        page(path, "Mixture", [mixture_figure(positions, shares, stages, epochs, reached)])
    else:
        draw_mixture(path, positions, shares, stages, epochs, reached)
