"""What the command lines share: the parser, a table of subcommands, a progress line. No torch."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from megatron_syne.errors import EXIT_CONFIG


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes exit with 64, as documented, and not with argparse's 2."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        """One line and the usage."""
        self.print_usage(sys.stderr)
        self.exit(EXIT_CONFIG, f"error: {message}\n")


def run_subcommand(
    description: str | None, room: str, commands: Mapping[str, tuple[str, str]], argv: Sequence[str] | None
) -> int:
    """Parse, and run the subcommand that was given: ``commands`` is name -> (module of ``room``, summary).

    A module has ``add_arguments(parser)`` and ``run(options) -> int``; only the one asked for is imported.
    """
    given = sys.argv[1:] if argv is None else argv
    parser = Parser(description=description)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in commands.items():
        command = subparsers.add_parser(name, help=summary, description=summary)
        if list(given[:1]) == [name]:
            chosen = importlib.import_module(f"megatron_syne.{room}.{module}")
            chosen.add_arguments(command)
            command.set_defaults(run=chosen.run)
    options = parser.parse_args(given)
    return int(options.run(options))


class ProgressLine:
    """One line on a terminal, redrawn; in a log file, one line every ten seconds.

    ``at_once``: a log file gets the first line when it comes, and not after ten seconds.
    """

    def __init__(self, at_once: bool = False) -> None:
        self._terminal = sys.stderr.isatty()
        self._last = float("-inf") if at_once else time.monotonic()
        self._shown = False

    def show(self, text: str) -> None:
        """The state now, in one line."""
        if self._terminal:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
            self._shown = True
        elif time.monotonic() - self._last >= 10:
            self._last = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leave the line."""
        if self._shown:
            print(file=sys.stderr, flush=True)
