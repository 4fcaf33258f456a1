"""Tokenise documents for training: ``.bin``/``.idx`` as megatron-core reads them, and a manifest.

    python tools/prepare_data.py --input web/ book.jsonl.gz wiki.parquet --tokenizer MODEL_FOLDER \\
        --output-prefix data/zh --valid-prefix data/zh_valid --valid-fraction 0.02 --workers 2
    python tools/prepare_data.py --tokenizer MODEL_FOLDER --job a.jsonl data/a --job b.jsonl data/b
    zcat web.jsonl.gz | python tools/prepare_data.py --input - --tokenizer MODEL_FOLDER --output-prefix data/web
    python tools/prepare_data.py --input web/ --tokenizer MODEL_FOLDER --output-prefix data/web --shard 3/8
    python tools/prepare_data.py --merge data/web
    python tools/prepare_data.py --verify data/zh data/zh_valid

Inputs: JSONL, plain text (.txt: one document a file), parquet; gzip and zstd (told by their first bytes); folders
stand for the files below them, sorted; - is standard input. A run that was killed goes on where it was when the
same command is given again, and gives the same bytes; so does any number of workers, and --merge of all shards.

Exit codes: 64 wrong option, 65 bad input (named by file:line:byte), 66 no such input, 73 output exists,
74 disk full or failing. On any of them no output has appeared or changed.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from typing import Any

from megatron_syne.command_line import Parser, ProgressLine
from megatron_syne.data.preparation.fim import FillInMiddle
from megatron_syne.data.preparation.merge import merge
from megatron_syne.data.preparation.prepare import Job, prepare
from megatron_syne.data.tokens.reader import IndexedReader
from megatron_syne.errors import run_cli

# options that go to every job under their own name
_COMMON = (
    "tokenizer", "json_key", "min_tokens", "workers", "on_error", "overwrite", "valid_prefix", "valid_fraction",
    "seed", "max_line_bytes", "append_eod", "prepend_bos", "keep", "shard",
)  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--input", nargs="+", metavar="PATH", help="files, folders, or - for standard input")
    parser.add_argument("--tokenizer", help="folder with tokenizer.json or tokenizer.model, or one such file")
    parser.add_argument("--output-prefix", help=".bin, .idx and .json are appended")
    parser.add_argument(
        "--job", nargs=2, action="append", metavar=("PATH", "PREFIX"), default=[],
        help="instead of --input and --output-prefix: one input to one prefix; may be repeated",
    )  # fmt: skip
    parser.add_argument("--json-key", default="text", help="field that holds the text (default: text)")
    parser.add_argument(
        "--keep", nargs="+", default=[], metavar="FIELD",
        help="store these numbers with each document, in PREFIX.FIELD.npy (a source can be ordered by them)",
    )  # fmt: skip
    parser.add_argument(
        "--min-tokens", type=int, default=10, help="drop documents with fewer tokens, EOS not counted (10)"
    )
    parser.add_argument(
        "--append-eod", action=argparse.BooleanOptionalAction, default=True,
        help="end each document with EOS (default: yes)",
    )  # fmt: skip
    parser.add_argument("--prepend-bos", action="store_true", help="begin each document with BOS")
    parser.add_argument(
        "--fim-rate", type=float, default=0.0, help="share of documents turned to fill-in-the-middle (0)"
    )
    parser.add_argument(
        "--fim-spm-rate",
        type=float,
        default=0.5,
        help="share of those in the order suffix, prefix, middle (0.5)",
    )
    parser.add_argument(
        "--fim-tokens", nargs=3, metavar=("PREFIX", "MIDDLE", "SUFFIX"), help="sentinel tokens, by name"
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
    parser.add_argument(
        "--seed",
        type=int,
        default=1234,
        help="seed of the choice of held-out documents and of fill-in-the-middle",
    )
    parser.add_argument(
        "--max-line-bytes", type=int, default=Job.max_line_bytes, help="a longer line is malformed (64 MiB)"
    )
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help="only part I (from 0) of N, to PREFIX.shard-I-of-N; a finished one is left alone",
    )
    parser.add_argument("--merge", nargs="+", metavar="PREFIX", help="put the shards of each prefix together")
    parser.add_argument("--shards", type=int, metavar="N", help="with --merge: how many there must be")
    parser.add_argument(
        "--keep-shards", action="store_true", help="with --merge: do not remove them afterwards"
    )
    parser.add_argument(
        "--verify", nargs="+", metavar="PREFIX", help="only check prepared files against their checksums"
    )
    options = parser.parse_args(argv)
    _check(parser, options)
    return options


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.shard is not None:
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", options.shard)
        if match is None:
            parser.error(f"--shard: expected I/N such as 3/8, found {options.shard!r}")
        options.shard = int(match[1]), int(match[2])
    if options.fim_rate and not options.fim_tokens:
        parser.error("--fim-rate: name the sentinel tokens with --fim-tokens PREFIX MIDDLE SUFFIX")
    if options.verify or options.merge:
        return
    needed = ("tokenizer",) if options.job else ("input", "tokenizer", "output_prefix")
    missing = [name for name in needed if not getattr(options, name)]
    if missing:
        parser.error("required: " + ", ".join("--" + name.replace("_", "-") for name in missing))
    if options.job and (options.input or options.output_prefix or options.valid_prefix):
        parser.error("--job goes without --input, --output-prefix and --valid-prefix")


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.verify:
        for prefix in options.verify:
            reader = IndexedReader(prefix)
            reader.verify()
            print(f"{prefix}: whole; {reader.num_documents:,} documents, {reader.num_tokens:,} tokens")
        return 0
    if options.merge:
        for prefix in options.merge:
            manifest = merge(prefix, options.shards, options.keep_shards, options.overwrite, say)
            counts = manifest["counts"]
            print(f"{prefix}: {counts['documents']:,} documents, {counts['tokens']:,} tokens", flush=True)
        return 0
    common = {name: getattr(options, name) for name in _COMMON}
    if options.fim_rate:
        common["fim"] = FillInMiddle(options.fim_rate, options.fim_spm_rate, tuple(options.fim_tokens))
    wanted = [([source], prefix) for source, prefix in options.job] or [
        (options.input, options.output_prefix)
    ]
    for inputs, prefix in wanted:
        job = Job(inputs=inputs, output_prefix=prefix, **common)
        begin = time.monotonic()
        line = ProgressLine()
        try:
            manifests = prepare(job, line.show, say)
        finally:
            line.end()
        print(summary(job, manifests, time.monotonic() - begin), flush=True)
    return 0


def say(text: str) -> None:
    """Something the user should know once."""
    print(text, file=sys.stderr, flush=True)


def summary(job: Job, manifests: list[dict[str, Any]], seconds: float) -> str:
    """One line: what came out, and what did not."""
    counts = [manifest["counts"] for manifest in manifests]
    parts = [
        f"{prefix}: {count['documents']:,} documents, {count['tokens']:,} tokens"
        for prefix, count in zip(job.prefixes(), counts, strict=True)
    ]
    dropped = {name: sum(count["dropped"][name] for count in counts) for name in counts[0]["dropped"]}
    gone = ", ".join(f"{name.replace('_', ' ')} {number:,}" for name, number in dropped.items() if number)
    tokens = sum(count["tokens"] for count in counts)
    return (
        f"{'; '.join(parts)}; of {counts[0]['lines']:,} lines, dropped {sum(dropped.values()):,}"
        f"{f' ({gone})' if gone else ''}; {manifests[0]['dtype']}, {seconds:.1f} s, "
        f"{tokens / max(seconds, 1e-9):,.0f} tokens/s"
    )


if __name__ == "__main__":
    sys.exit(run_cli(main))
