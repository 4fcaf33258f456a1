"""What every way of scoring takes on its command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_syne.curation.perplexity_windows import MOST_CONTEXT
from megatron_syne.curation.records import add_reading_arguments
from megatron_syne.data.documents.jsonl import MAX_LINE_BYTES
from megatron_syne.errors import ConfigError


@dataclass
class Task:
    """What is scored, and how it is written."""

    inputs: list[str]
    output: str
    context: int
    text_key: str = "text"
    first_tokens: int | None = None
    """Score only so many tokens from each document's begin; None = all."""
    field: str = "perplexity"
    tokens_field: str = "tokens"
    on_error: str = "fail"
    overwrite: bool = False
    max_line_bytes: int = MAX_LINE_BYTES


def add_scoring_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of scoring under any model."""
    add_reading_arguments(parser)
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="JSONL: the input's lines, two fields more"
    )
    parser.add_argument("--text-key", default="text", help="field that holds the text (default: text)")
    parser.add_argument("--tokenizer", help="folder with the tokenizer (default: the model's own)")
    parser.add_argument(
        "--context", type=int, help=f"tokens of a window (default: the model's, at most {MOST_CONTEXT})"
    )
    parser.add_argument("--first-tokens", type=int, help="score only the first tokens of each document (all)")
    parser.add_argument(
        "--batch-tokens", type=int, default=4096, help="tokens of a forward pass, padding counted (4096)"
    )
    parser.add_argument("--field", default="perplexity", help="field that is added (default: perplexity)")
    parser.add_argument("--tokens-field", default="tokens", help="field with the predicted tokens (tokens)")


def task_of(options: argparse.Namespace, model_context: int | None) -> Task:
    """The task of a command line; ``model_context``: tokens that the model was made for. Raises ConfigError."""
    for name in ("context", "first_tokens", "batch_tokens", "max_line_bytes"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: must be at least 1, found {value}")
    if options.field == options.tokens_field:
        raise ConfigError(f"--field and --tokens-field are both {options.field!r}; choose two names")
    if model_context is not None and (options.context or 0) > model_context:
        raise ConfigError(f"--context: {options.context} is more than the model's context of {model_context}")
    return Task(
        inputs=options.input,
        output=options.output,
        context=options.context or min(model_context or MOST_CONTEXT, MOST_CONTEXT),
        text_key=options.text_key,
        first_tokens=options.first_tokens,
        field=options.field,
        tokens_field=options.tokens_field,
        on_error=options.on_error,
        overwrite=options.overwrite,
        max_line_bytes=options.max_line_bytes,
    )


def weights_identity(path: str | Path) -> dict[str, Any]:
    """Names, sizes and times of the files of a model: enough to notice that another one lies there now."""
    files = sorted(file for file in Path(path).rglob("*") if file.is_file())
    status = [(file.relative_to(path).as_posix(), file.stat()) for file in files]
    return {name: [found.st_size, found.st_mtime_ns] for name, found in status}
