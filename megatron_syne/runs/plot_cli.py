"""``tools/plot_run.py``: read the runs, choose the panels, draw."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_syne.command_line import Parser
from megatron_syne.errors import EXIT_OK, ConfigError
from megatron_syne.runs.history import read_history
from megatron_syne.runs.text import patterns, say, tell_problems


def main(description: str | None, argv: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    options = _parser(description).parse_args(argv)
    if not options.output.endswith((".png", ".html")):
        raise ConfigError(f"--output {options.output}: the name must end in .png or .html")
    from megatron_syne.pictures.runs import draw_runs
    from megatron_syne.runs.panels import curves_of, wanted

    chosen = None if options.metrics is None else patterns(options.metrics)
    histories = [read_history(path, wanted(chosen)) for path in options.runs]
    for history in histories:
        tell_problems(history.problems)
    curves = curves_of(histories, chosen, options.x, options.smooth, options.from_step)
    draw_runs(options.output, curves)
    say(f"picture: {options.output} ({', '.join(panel.title for panel in curves.panels)})")
    return EXIT_OK


def _parser(description: str | None) -> argparse.ArgumentParser:
    parser = Parser(description=description)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folder, metrics.jsonl, tensorboard folder or golden .json"
    )
    parser.add_argument("--output", required=True, metavar="PNG|HTML", help="the picture to write")
    parser.add_argument(
        "--metrics",
        metavar="NAMES",
        help="names or shell patterns between commas, as in metrics.jsonl, with time/* (parts of a step) and "
        "mixture/* (shares of the sources); e.g. loss,validation/*,grad_norm/layer_*,harness/*",
    )
    parser.add_argument(
        "--x", choices=("step", "tokens", "hours"), default="step", help="what stands along the picture"
    )
    parser.add_argument(
        "--smooth",
        type=_count,
        metavar="N",
        help="mean of so many logged steps; 1 = none (default: a fiftieth of the steps, at most 100)",
    )
    parser.add_argument("--from-step", type=_count, default=0, metavar="STEP", help="leave out earlier steps")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1, found {text!r}")
    return value
