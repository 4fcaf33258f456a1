"""``tools/compare_runs.py``: read both, compare, say so by table, picture, JSON and exit code."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from megatron_syne.command_line import Parser
from megatron_syne.errors import EXIT_DATA, EXIT_OK, ConfigError, DataError
from megatron_syne.runs.compare import DEFAULT_METRICS, compare
from megatron_syne.runs.history import History, read_history
from megatron_syne.runs.text import patterns, say, tell_problems

EXIT_DIFFERENT = 1


def main(description: str | None, argv: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    options = _parser(description).parse_args(argv)
    chosen = DEFAULT_METRICS if options.metrics is None else patterns(options.metrics)
    if options.write_golden:
        return _write_golden(options, chosen)
    if len(options.runs) != 2:
        raise ConfigError("give two runs to compare, or one with --write-golden FILE")
    if options.output and not options.output.endswith((".png", ".html")):
        raise ConfigError(f"--output {options.output}: the name must end in .png or .html")
    a, b = (read_history(path, chosen) for path in options.runs)
    for each in (a, b):
        tell_problems(each.problems)
    if a.single_precision != b.single_precision:
        tell_problems(["one of the two is tensorboard's, in float32: both are compared as float32"])
    result = compare(a, b, chosen, options.tolerance, options.relative)
    if options.json:
        import orjson

        found = (a, b, result, options.tolerance, options.relative)
        from megatron_syne.runs.compare_report import as_object

        say(orjson.dumps(as_object(*found), option=orjson.OPT_INDENT_2).decode())
    else:
        from megatron_syne.runs.compare_report import report

        say(report(a, b, result, options.tolerance, options.relative))
    if options.output:
        from megatron_syne.runs.drawing import draw_comparison

        draw_comparison(options.output, a, b, result)
        if not options.json:
            say(f"picture: {options.output}")
    if not result.equal or (options.all_steps and not result.same_steps):
        return EXIT_DIFFERENT
    # what lies behind the damage was not compared: that is not "equal"
    return EXIT_DATA if a.broken or b.broken else EXIT_OK


def _parser(description: str | None) -> argparse.ArgumentParser:
    parser = Parser(description=description)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folder, metrics.jsonl, tensorboard folder or golden .json"
    )
    parser.add_argument(
        "--metrics",
        metavar="NAMES",
        help="names or shell patterns between commas, as in metrics.jsonl (default: loss,validation/*)",
    )
    parser.add_argument(
        "--tolerance",
        type=_tolerance,
        default=0.0,
        help="how far two values may lie apart and be equal (default 0: to the bit)",
    )
    parser.add_argument(
        "--relative", action="store_true", help="the tolerance is a part of the larger of the two values"
    )
    parser.add_argument(
        "--all-steps",
        action="store_true",
        help="a step or metric that only one of them has is a difference too",
    )
    parser.add_argument("--output", metavar="PNG|HTML", help="also draw both curves and their difference")
    parser.add_argument("--json", action="store_true", help="print the result as a JSON object")
    parser.add_argument(
        "--write-golden", metavar="FILE", help="of one run: write its metrics as a golden .json file"
    )
    return parser


def _tolerance(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"expected a number from 0, found {text!r}")
    return value


def _write_golden(options: argparse.Namespace, chosen: Sequence[str]) -> int:
    from megatron_syne.runs.golden import write_golden

    if len(options.runs) != 1:
        raise ConfigError("--write-golden: give the one run that the golden file is made of")
    run = read_history(options.runs[0], chosen)
    tell_problems(run.problems)
    _refuse_broken(run)
    if not run.series:
        raise DataError(f"{run.path}: has none of {', '.join(chosen)}; it has {', '.join(run.names)}")
    write_golden(options.write_golden, run.name, run.series)
    steps = ", ".join(f"{name} ({len(each.steps):,} steps)" for name, each in run.series.items())
    say(f"{options.write_golden}: {steps}")
    return EXIT_OK


def _refuse_broken(run: History) -> None:
    if run.broken:
        raise DataError(f"{run.path}: is damaged, and no golden run")
