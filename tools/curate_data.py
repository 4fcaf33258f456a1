"""Label, score, order and write documents, before they are tokenised.

    python tools/curate_data.py label-topics train --help      a classifier from labelled documents
    python tools/curate_data.py label-topics apply --help      topics onto documents
    python tools/curate_data.py score-perplexity --help        perplexity of each document under a base model
    python tools/curate_data.py order --help                   low to high perplexity, in buckets
    python tools/curate_data.py synthesize --help              question/answer pairs to documents

Exit codes: 64 wrong option, 65 bad input (named by file:line:byte), 66 no such input, 73 output exists,
74 disk full or failing. On any of them no output has appeared or changed.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from megatron_syne.errors import EXIT_CONFIG, run_cli

COMMANDS = {
    "label-topics": ("topics", "train a topic classifier, or label documents with one"),
    "score-perplexity": ("perplexity", "perplexity of each document under a base model"),
    "order": ("ordering", "documents by a number in them, low to high"),
    "synthesize": ("synthesis", "documents from question/answer pairs; prompts for a generator"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):  # argparse would exit with 2
        self.print_usage(sys.stderr)
        self.exit(EXIT_CONFIG, f"error: {message}\n")


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if given[:1] == [name]:  # only what is asked for is imported
            chosen = importlib.import_module(f"megatron_syne.curation.{module}")
            chosen.add_arguments(command)
            command.set_defaults(run=chosen.run)
    options = parser.parse_args(given)
    return int(options.run(options))


if __name__ == "__main__":
    sys.exit(run_cli(main))
