"""Look at data: prepared documents, the samples of a run, its mixture, what it has consumed.

    python tools/inspect_data.py documents data/zh --tokenizer MODEL_FOLDER --count 5
    python tools/inspect_data.py histogram data/zh data/en --output lengths.png
    python tools/inspect_data.py plan --config run.yaml --output mixture.png
    python tools/inspect_data.py samples --config run.yaml --index 0 1000
    python tools/inspect_data.py samples --run runs/zh --step 20
    python tools/inspect_data.py consumed runs/zh --output consumed.png

Files are checked against their checksums by ``prepare_data.py --verify``. Exit codes: 64 wrong option or
configuration, 65 damaged input, 66 no such input, 73 the picture cannot be created.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import NoReturn

from megatron_syne.errors import EXIT_CONFIG, run_cli

COMMANDS = {
    "documents": ("documents", "what a prepared prefix holds, and its documents as text"),
    "samples": ("samples", "what a sample of a run is: source, documents, text, what is predicted"),
    "histogram": ("lengths", "lengths of documents and tokens of each prefix; a picture"),
    "plan": ("mixture", "tokens, samples and epochs of each source in each stage; a picture"),
    "consumed": ("consumed", "what a run has read so far, by its newest checkpoint; a picture"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # argparse would exit with 2
        self.print_usage(sys.stderr)
        self.exit(EXIT_CONFIG, f"error: {message}\n")


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if given[:1] == [name]:  # only what is asked for is imported
            chosen = importlib.import_module(f"megatron_syne.inspection.{module}")
            chosen.add_arguments(command)
            command.set_defaults(run=chosen.run)
    options = parser.parse_args(given)
    try:
        return int(options.run(options))
    except BrokenPipeError:  # the reader has seen enough (head, less)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
