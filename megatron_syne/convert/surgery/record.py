"""``surgery.json``: what was done to a model, for whoever trains it next.

It travels with the tokenizer and the licence. ``new_layers`` and ``new_tokens`` are in the numbering of the model
beside which the file lies, over all operations: a layer that an earlier operation added is still listed where a
later one has moved it to, so that training can freeze everything else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_syne.convert.files import exists_inside, read_json_inside
from megatron_syne.convert.formats.documents import HF_FOLDER, json_document
from megatron_syne.convert.pieces import Span
from megatron_syne.convert.streams import Weights
from megatron_syne.errors import DataError
from megatron_syne.models.json_file import parse_json

RECORD = "surgery.json"
FORMAT, VERSION = "megatron_syne.surgery", 1


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a folder of weights in any format; None where there is none. Raises DataError."""
    for place in (folder, folder / HF_FOLDER):
        if place.is_dir() and exists_inside(place, RECORD):
            return _checked(read_json_inside(place, RECORD), str(place / RECORD))
    return None


def record_of(weights: Weights) -> dict[str, Any]:
    """The record that weights carry; an empty one where nothing was done to them yet."""
    found = None
    content = getattr(weights, "documents", {}).get(RECORD)
    if content is not None:
        found = _checked(parse_json(content, RECORD), RECORD)
    elif weights.artifacts_dir is not None:
        found = read_record(weights.artifacts_dir)
    return found or {
        "format": FORMAT, "version": VERSION, "operations": [], "new_layers": [], "new_tokens": []
    }  # fmt: skip


def extended(
    record: dict[str, Any],
    operation: str,
    parameters: dict[str, Any],
    *,
    new_layers: list[int] | None = None,
    new_tokens: list[Span] | None = None,
) -> bytes:
    """The document with one operation more; lists that are not given stay as they are."""
    own: dict[str, Any] = {"operation": operation, "parameters": parameters}
    record = {**record, "operations": [*record["operations"], own]}
    if new_layers is not None:
        record["new_layers"] = new_layers
    if new_tokens is not None:
        record["new_tokens"] = [list(span) for span in new_tokens]
    return json_document(json.loads(json.dumps(record)))


def _checked(record: dict[str, Any], where: str) -> dict[str, Any]:
    if record.get("format") != FORMAT or record.get("version") != VERSION:
        raise DataError(
            f"{where}: expected format {FORMAT!r}, version {VERSION}; found {record.get('format')!r}, "
            f"{record.get('version')!r}; remove the file if another tool wrote it"
        )
    layers, tokens, operations = (record.get(k) for k in ("new_layers", "new_tokens", "operations"))
    good = isinstance(operations, list) and _is_list_of_numbers(layers) and isinstance(tokens, list)
    if not good or not all(_is_list_of_numbers(span) and len(span) == 2 for span in tokens or ()):
        raise DataError(
            f"{where}: expected lists operations, new_layers (numbers) and new_tokens ([first, end) pairs)"
        )
    return record


def _is_list_of_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)
