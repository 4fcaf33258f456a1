"""``score-perplexity``: the perplexity of each document under a Hugging Face model.

Under our own parallel model, in any layout: ``python -m megatron_syne.score``; both give the same numbers.
"""

from __future__ import annotations

import argparse

from megatron_syne.command_line import ProgressLine
from megatron_syne.curation.perplexity_options import (
    add_scoring_arguments,
    task_of,
    weights_identity,
)
from megatron_syne.curation.perplexity_scoring import score_files
from megatron_syne.data.tokenizer import load_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--model", required=True, metavar="FOLDER", help="Hugging Face folder of the model")
    parser.add_argument(
        "--dtype",
        choices=["auto", "fp32", "bf16"],
        default="auto",
        help="format computed in (the weights' own)",
    )
    parser.add_argument(
        "--platform", choices=["auto", "cpu", "cuda"], default="auto", help="where (a GPU where there is one)"
    )
    add_scoring_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Score the inputs; returns the exit code."""
    from megatron_syne.curation.perplexity_hf import HuggingFaceScorer

    tokenizer = load_tokenizer(options.tokenizer or options.model)
    scorer = HuggingFaceScorer(options.model, options.dtype, options.platform, options.batch_tokens)
    task = task_of(options, scorer.context)
    identity = {"kind": "transformers", "dtype": scorer.dtype, "files": weights_identity(options.model)}
    line = ProgressLine(at_once=True)
    try:
        counts = score_files(task, tokenizer, scorer, scorer.vocab_size, identity, show=line.show)
    finally:
        line.end()
    print(f"{options.output}: {counts.describe()}", flush=True)
    return 0
