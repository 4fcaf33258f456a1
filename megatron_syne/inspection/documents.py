"""``documents``: what a prepared prefix holds, and its documents as text."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from megatron_syne.data.tokens.reader import IndexedReader
from megatron_syne.errors import ConfigError
from megatron_syne.inspection.text import cut, decoded, matching_tokenizer, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("prefix", help="of the .bin, .idx and .json files")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="to show text; without it token ids are shown")
    parser.add_argument("--index", type=int, nargs="+", metavar="N", help="these documents, from 0")
    parser.add_argument("--count", type=int, default=3, help="so many, spread over the file (3)")
    parser.add_argument(
        "--characters", type=int, default=1000, help="at most so many of each; 0 = all (1000)"
    )


def run(options: argparse.Namespace) -> int:
    """Print; returns the exit code."""
    reader = IndexedReader(options.prefix, require_manifest=False)
    tokenizer = matching_tokenizer(options.tokenizer, reader.manifest, options.prefix)
    say("\n".join(summary(reader)))
    most = reader.num_documents
    chosen = options.index
    if chosen is None:
        chosen = np.linspace(0, most - 1, num=min(max(options.count, 0), most)).astype(int).tolist()
    if wrong := [index for index in chosen if not 0 <= index < most]:
        raise ConfigError(f"--index: {wrong[0]} of {most} documents (from 0)")
    names = sorted((reader.manifest or {}).get("fields", {}))
    fields = {name: reader.field(name) for name in names}
    for index in chosen:
        tokens = reader.document(index)
        kept = "".join(f", {name} {values[index]:g}" for name, values in fields.items())
        place = f"from token {reader.document_start(index):,}"
        say(f"\n── document {index} of {most:,}: {tokens.size:,} tokens, {place}{kept}")
        say(cut(decoded(tokenizer, tokens), options.characters or None))
    return 0


def summary(reader: IndexedReader) -> list[str]:
    """What the files and their manifest say, one fact a line."""
    lines = [
        f"{reader.prefix}: {reader.num_documents:,} documents, {reader.num_tokens:,} tokens ({reader.dtype.name})"
    ]
    manifest = reader.manifest
    if manifest is None:
        return [*lines, "no manifest: made by another tool; tokenizer and sources are not known"]
    tokenizer, counts = manifest["tokenizer"], manifest["counts"]
    lines.append(
        f"tokenizer: {tokenizer.get('kind', '?')}, SHA-256 {tokenizer['fingerprint'][:16]}..., vocabulary of "
        f"{tokenizer['vocab_size']:,}, EOS {tokenizer.get('eos_id')}; highest token id {manifest['max_token_id']:,}"
    )
    lines.append("counts: " + ", ".join(_items(counts)))
    if options := manifest.get("options"):
        lines.append("options: " + ", ".join(f"{key} {value}" for key, value in options.items()))
    for source in manifest.get("sources", []):
        if isinstance(source, dict):
            lines.append("source: " + ", ".join(_items(source)))
    if fields := manifest.get("fields"):
        lines.append(f"numbers kept with each document: {', '.join(sorted(fields))}")
    if split := manifest.get("split"):
        lines.append("part: " + ", ".join(_items(split)))
    return lines


def _items(values: dict[str, Any], above: str = "") -> list[str]:
    """``name value`` of each, nested ones with the names above them; hashes are shortened."""
    result = []
    for key, value in values.items():
        name = f"{above}{key.replace('_', ' ')}"
        if isinstance(value, dict):
            result += _items(value, f"{name} ")
        elif isinstance(value, int) and not isinstance(value, bool):
            result.append(f"{name} {value:,}")
        else:
            text = str(value)
            result.append(f"{name} {text[:16] + '...' if len(text) == 64 else text}")
    return result
