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

import sys

from megatron_syne.command_line import run_subcommand
from megatron_syne.errors import run_cli

COMMANDS = {
    "label-topics": ("topics", "train a topic classifier, or label documents with one"),
    "score-perplexity": ("perplexity", "perplexity of each document under a base model"),
    "order": ("ordering", "documents by a number in them, low to high"),
    "synthesize": ("synthesis", "documents from question/answer pairs; prompts for a generator"),
}


def main(argv: list[str] | None = None) -> int:
    return run_subcommand(__doc__, "curation", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(run_cli(main))
