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

import os
import sys

from megatron_syne.command_line import run_subcommand
from megatron_syne.errors import run_cli

COMMANDS = {
    "documents": ("documents", "what a prepared prefix holds, and its documents as text"),
    "samples": ("samples", "what a sample of a run is: source, documents, text, what is predicted"),
    "histogram": ("lengths", "lengths of documents and tokens of each prefix; a picture"),
    "plan": ("mixture", "tokens, samples and epochs of each source in each stage; a picture"),
    "consumed": ("consumed", "what a run has read so far, by its newest checkpoint; a picture"),
}


def main(argv: list[str] | None = None) -> int:
    try:
        return run_subcommand(__doc__, "inspection", COMMANDS, argv)
    except BrokenPipeError:  # the reader has seen enough (head, less)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
