"""The command line of ``tools/plan.py``: a configuration or a model and a machine in, the plan out. No torch."""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_syne.command_line import Parser
from megatron_syne.config.loader import config_origin
from megatron_syne.config.schema import ModelConfig, RunConfig
from megatron_syne.errors import ConfigError
from megatron_syne.parallel.topology import world_size_of
from megatron_syne.planner.asked import OPTIONS, PRECISIONS, configuration, resolved
from megatron_syne.planner.found import Found, remedies
from megatron_syne.planner.hardware import GPUS, Gpu, check_fp8, gpu_named
from megatron_syne.planner.plan_facts import Facts, Plan, accuracy_facts, facts_of, run_facts, speed_facts
from megatron_syne.planner.report import accuracy_text, counts_text, text_of
from megatron_syne.planner.search import PLATFORM, Candidate, evaluate, search
from megatron_syne.planner.shapes import shapes
from megatron_syne.preflight.facts import PlatformName
from megatron_syne.preflight.rules import check

EXIT_DOES_NOT_FIT = 1
MOST_GPUS = 1_000_000

PLATFORMS: dict[str, tuple[PlatformName, bool]] = {
    "auto": ("cuda", True),
    "cuda": ("cuda", True),
    "cpu": ("cpu", False),
}
"""``platform`` of a configuration -> where it is planned for, and whether that has GPUs: a plan is made on a login
node, whose own GPU (``auto``) says nothing."""


SEARCH_HELP = (
    "rank layouts by predicted speed, and plan the first: TP within a node, micro-batches of at most 8, at least 1,024 "
    "tokens of a sequence on a CP rank, recompute none, mlp, half of the layers or all; those that cannot be within "
    "25%% of the fastest are left out"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the tool."""
    what = parser.add_argument_group("what is trained: one of the two")
    what.add_argument("--config", metavar="YAML", help="a run's configuration")
    what.add_argument("--model", help="a Hugging Face config.json, a folder that has one, or a preset's name")
    parser.add_argument("overrides", nargs="*", metavar="section.option=value", help="over the configuration")
    where = parser.add_argument_group("where")
    where.add_argument("--gpu", default="h100", help=f"one of {', '.join(GPUS)} (default h100)")
    where.add_argument(
        "--gpus",
        nargs="+",
        action="extend",  # a second --gpus drops neither a number nor an override that the first took
        default=[],
        metavar="N",
        help="how many; several give a table. With --config: not given = what its layout and launch ask for",
    )
    run = parser.add_argument_group("with --model (megatron-core's names; any other as section.option=value)")
    for name, (_, metavar, text) in OPTIONS.items():
        run.add_argument(f"--{name}", metavar=metavar, help=text)
    run.add_argument("--recompute-modules", nargs="+", metavar="MODULE", help="with selective")
    run.add_argument(
        "--precision", help=f"one of {', '.join(PRECISIONS)} (the last three: FP8; default bf16)"
    )
    run.add_argument("--tokens", metavar="COUNT", help="budget: 100B, 7.5B, 300M (default 1B)")
    out = parser.add_argument_group("what is told")
    out.add_argument("--search", action="store_true", help=SEARCH_HELP)
    out.add_argument(
        "--top", type=int, default=10, metavar="N", help="how many of them are shown (default 10)"
    )
    out.add_argument("--json", action="store_true", help="for machines: bytes, seconds, FLOP/s")
    out.add_argument(
        "--plot", metavar="FOLDER", help="also draw: memory, pipeline, ranks, frontier, schedule"
    )


def run(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """Parse, plan, print; returns 0, or 1 where the run does not fit."""
    options = parser.parse_intermixed_args(list(argv))
    if (options.config is None) == (options.model is None):
        parser.error("give --config or --model, one of them")
    if options.top < 1:
        parser.error("--top: at least 1")
    overrides = [*options.overrides, *(text for text in options.gpus if "=" in text)]
    counts = [_gpu_count(text) for text in options.gpus if "=" not in text]
    gpu = gpu_named(options.gpu)
    config = configuration(options, overrides)
    model = resolved(config)
    platform, has_gpu = PLATFORMS[config.platform]
    worlds = counts or [_world_size(options, config)]
    several = len(worlds) > 1
    if not has_gpu and (options.search or options.plot or several):
        parser.error(
            f"platform: {config.platform} has no speed to rank, draw or compare; give platform=cuda to plan for GPUs"
        )
    if has_gpu and not config.precision.fp8_emulation:
        check_fp8(gpu, config.precision.fp8)
    if several and options.plot:
        parser.error("--plot: draws the plan of one number of GPUs; give --gpus one number")
    if several:
        return _several(options, config, model, worlds, gpu, platform)
    plan = _planned(options, config, model, worlds[0], gpu if has_gpu else None, platform)
    facts = facts_of(plan, options.top)
    paths = []
    if options.plot:
        from megatron_syne.planner.drawings import draw_plan

        candidates = None if plan.found is None else plan.found.candidates
        paths = draw_plan(Path(options.plot), plan.config, model, worlds[0], gpu, candidates)
    if options.json:
        print(json.dumps(facts | ({"pictures": [str(path) for path in paths]} if paths else {}), indent=1))
    else:
        print(text_of(facts))
        for path in paths:
            print(f"picture: {path}")
    return 0 if facts.get("fits", True) else EXIT_DOES_NOT_FIT


def _planned(
    options: argparse.Namespace,
    config: RunConfig,
    model: ModelConfig,
    world_size: int,
    gpu: Gpu | None,
    platform: PlatformName,
) -> Plan:
    """The plan of the configuration as it stands, or of the first that a search finds."""
    if not options.search or gpu is None:
        check(config, model, world_size, platform)
        return Plan(config, model, shapes(config, model), world_size, platform, gpu)
    found = _found(config, model, world_size, gpu, is_file=options.config is not None)
    first = found.candidates[0].config
    return Plan(first, model, shapes(first, model), world_size, platform, gpu, found)


def _found(config: RunConfig, model: ModelConfig, world_size: int, gpu: Gpu, is_file: bool) -> Found:
    candidates = search(config, model, world_size, gpu)
    own, refused = None, ""
    if is_file:
        own_config = _for_world(config)
        try:
            check(own_config, model, world_size, PLATFORM)
            own = evaluate(own_config, shapes(own_config, model), world_size, gpu)
        except ConfigError as error:
            refused = str(error)
    helps = [] if candidates[0].fits(gpu) else list(remedies(config, model, world_size, gpu))
    return Found(gpu, candidates, config if is_file else None, own, refused, helps)


def _several(
    options: argparse.Namespace,
    config: RunConfig,
    model: ModelConfig,
    worlds: Sequence[int],
    gpu: Gpu,
    platform: PlatformName,
) -> int:
    """A line for each number of GPUs: the best layout with ``--search``, else the configuration's with another DP.

    Raises ConfigError, all refusals in one, where each is refused.
    """
    rows: list[Facts] = []
    for world_size in worlds:
        try:
            if options.search:
                chosen = search(config, model, world_size, gpu)[0]
            else:
                own = _for_world(config)
                check(own, model, world_size, platform)
                chosen = evaluate(own, shapes(own, model), world_size, gpu)
        except ConfigError as error:
            rows.append({"gpus": world_size, "refused": str(error)})
            continue
        rows.append(_row(chosen, model, world_size, gpu, platform))
    if all("refused" in row for row in rows):
        raise ConfigError("\n".join(f"{row['gpus']:,} GPUs: {row['refused']}" for row in rows))
    told = accuracy_facts(model, shapes(config, model), gpu)
    if options.json:
        print(json.dumps({"gpu": gpu.name, "counts": rows, "accuracy": told}, indent=1))
    else:
        print(counts_text(rows))
        print(f"\n{accuracy_text(told)}")
    return 0 if any(row.get("fits") for row in rows) else EXIT_DOES_NOT_FIT


def _row(
    candidate: Candidate, model: ModelConfig, world_size: int, gpu: Gpu, platform: PlatformName
) -> Facts:
    config = candidate.config
    _, whole = run_facts(Plan(config, model, shapes(config, model), world_size, platform, gpu), gpu)
    return {
        "gpus": world_size,
        "layout": candidate.layout,
        "overrides": candidate.overrides,
        "fits": candidate.fits(gpu),
        "peak_bytes": candidate.peak_bytes,
        **speed_facts(candidate.time),
        **{name: whole[name] for name in ("checkpoint_hours", "hours", "gpu_hours")},
    }


def _gpu_count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or not 1 <= int(text) <= MOST_GPUS:
        raise ConfigError(f"--gpus: {text!r} is no number of GPUs from 1 to {MOST_GPUS:,}")
    return int(text)


def _world_size(options: argparse.Namespace, config: RunConfig) -> int:
    """What the configuration asks for: by its DP, else by ``launch``, else (as a dry run) one replica."""
    if options.model is not None:
        raise ConfigError("--gpus: not given; --model does not say how many")
    asked = any(config_origin(config, f"launch.{name}") != "default" for name in ("nodes", "ntasks_per_node"))
    if config.parallel.data_parallel_size is None and asked:
        return config.launch.nodes * config.launch.ntasks_per_node
    return world_size_of(config.parallel)


def _for_world(config: RunConfig) -> RunConfig:
    """The configuration with DP as the number of GPUs gives it."""
    result = copy.copy(config)
    result.parallel = replace(config.parallel, data_parallel_size=None)
    return result


def main(argv: list[str] | None = None, description: str | None = None) -> int:
    """The tool."""
    parser = Parser(description=description)
    add_arguments(parser)
    return run(parser, sys.argv[1:] if argv is None else argv)
