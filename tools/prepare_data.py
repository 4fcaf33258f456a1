"""Tokenise JSONL files for training: ``.bin``/``.idx`` as megatron-core reads them, and a manifest.

    python tools/prepare_data.py --input web.jsonl book.jsonl --tokenizer MODEL_FOLDER \\
        --output-prefix data/zh --valid-prefix data/zh_valid --valid-fraction 0.02 --workers 2
    python tools/prepare_data.py --tokenizer MODEL_FOLDER --job a.jsonl data/a --job b.jsonl data/b
    python tools/prepare_data.py --verify data/zh data/zh_valid

Exit codes: 64 wrong option, 65 bad input (named by file:line:byte), 66 no such input, 73 output exists,
74 disk full or failing. On any of them no output has appeared or changed.
"""

from __future__ import annotations

import argparse
import sys
import time

from megatron_syne.data.indexed import IndexedReader
from megatron_syne.data.prepare import Job, prepare
from megatron_syne.errors import EXIT_CONFIG, run_cli


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):  # argparse would exit with 2
        self.print_usage(sys.stderr)
        self.exit(EXIT_CONFIG, f"error: {message}\n")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", metavar="JSONL", help="input files, one JSON object a line")
    parser.add_argument("--tokenizer", help="folder with tokenizer.json or tokenizer.model")
    parser.add_argument("--output-prefix", help=".bin, .idx and .json are appended")
    parser.add_argument(
        "--job", nargs=2, action="append", metavar=("JSONL", "PREFIX"), default=[],
        help="instead of --input and --output-prefix: one input to one prefix; may be repeated",
    )  # fmt: skip
    parser.add_argument("--json-key", default="text", help="field that holds the text (default: text)")
    parser.add_argument(
        "--min-tokens", type=int, default=10, help="drop documents with fewer tokens, EOS not counted (10)"
    )
    parser.add_argument("--workers", type=int, default=1, help="tokenising processes (1); same bytes for any")
    parser.add_argument(
        "--on-error", choices=["fail", "skip"], default="fail",
        help="malformed line: fail (default), or skip = set it aside in PREFIX.quarantine.jsonl",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace existing outputs")
    parser.add_argument("--valid-prefix", help="write held-out documents here")
    parser.add_argument(
        "--valid-fraction", type=float, default=0.02, help="share of documents held out (0.02)"
    )
    parser.add_argument("--seed", type=int, default=1234, help="seed of the choice of held-out documents")
    parser.add_argument(
        "--max-line-bytes", type=int, default=Job.max_line_bytes, help="a longer line is malformed (64 MiB)"
    )
    parser.add_argument(
        "--verify", nargs="+", metavar="PREFIX", help="only check prepared files against their checksums"
    )
    options = parser.parse_args(argv)
    if not options.verify:
        needed = ("tokenizer",) if options.job else ("input", "tokenizer", "output_prefix")
        missing = [name for name in needed if not getattr(options, name)]
        if missing:
            parser.error("required: " + ", ".join("--" + name.replace("_", "-") for name in missing))
        if options.job and (options.input or options.output_prefix or options.valid_prefix):
            parser.error("--job goes without --input, --output-prefix and --valid-prefix")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.verify:
        for prefix in options.verify:
            reader = IndexedReader(prefix)
            reader.verify()
            print(f"{prefix}: whole; {reader.num_documents:,} documents, {reader.num_tokens:,} tokens")
        return 0
    names = "tokenizer json_key min_tokens workers on_error overwrite valid_prefix valid_fraction seed max_line_bytes"
    common = {name: getattr(options, name) for name in names.split()}
    wanted = [([source], prefix) for source, prefix in options.job] or [
        (options.input, options.output_prefix)
    ]
    for inputs, prefix in wanted:
        job = Job(inputs=inputs, output_prefix=prefix, **common)
        begin = time.monotonic()
        line = ProgressLine()
        try:
            manifests = prepare(job, line.show)
        finally:
            line.end()
        print(summary(job, manifests, time.monotonic() - begin), flush=True)
    return 0


def summary(job: Job, manifests: list[dict], seconds: float) -> str:
    """One line: what came out, and what did not."""
    counts = [manifest["counts"] for manifest in manifests]
    parts = [
        f"{prefix}: {count['documents']:,} documents, {count['tokens']:,} tokens"
        for prefix, count in zip((job.output_prefix, job.valid_prefix), counts, strict=False)
    ]
    dropped = {name: sum(count["dropped"][name] for count in counts) for name in counts[0]["dropped"]}
    gone = ", ".join(f"{name.replace('_', ' ')} {number:,}" for name, number in dropped.items() if number)
    tokens = sum(count["tokens"] for count in counts)
    return (
        f"{'; '.join(parts)}; of {counts[0]['lines']:,} lines, dropped {sum(dropped.values()):,}"
        f"{f' ({gone})' if gone else ''}; {manifests[0]['dtype']}, {seconds:.1f} s, "
        f"{tokens / max(seconds, 1e-9):,.0f} tokens/s"
    )


class ProgressLine:
    """One line on a terminal, redrawn; in a log file, one line every ten seconds."""

    def __init__(self) -> None:
        self._tty = sys.stderr.isatty()
        self._last = time.monotonic()
        self._width = 0

    def show(self, text: str) -> None:
        if self._tty:
            sys.stderr.write("\r" + text.ljust(self._width))
            self._width = len(text)
        elif time.monotonic() - self._last >= 10:
            self._last = time.monotonic()
            sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def end(self) -> None:
        if self._width:
            sys.stderr.write("\n")


if __name__ == "__main__":
    sys.exit(run_cli(main))
