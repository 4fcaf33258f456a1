"""JSON from strangers: one well-formed object, or an error that names the file. No torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megatron_syne.errors import DataError, MissingInput

JSON_LIMIT_BYTES = 64 * 2**20


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises MissingInput, or DataError for anything but one well-formed object.

    Refuses duplicate keys and NaN (two readers would disagree about them) and files above 64 MiB.
    """
    if not os.path.isfile(path):  # Path.is_file() raises for a name that is too long
        raise MissingInput(f"{path}: no such file")
    with path.open("rb") as stream:
        return parse_json(stream.read(JSON_LIMIT_BYTES + 1), str(path))


def parse_json(raw: bytes, where: str) -> dict[str, Any]:
    """As :func:`read_json`, for bytes read already; ``where`` names them in messages."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise DataError(f"{where}: key {key!r} stands twice in one JSON object")
            found[key] = value
        return found

    def no_constant(name: str) -> Any:
        raise DataError(f"{where}: {name} is not JSON")

    if len(raw) > JSON_LIMIT_BYTES:
        raise DataError(f"{where}: larger than {JSON_LIMIT_BYTES} bytes, which no file of this kind is")
    try:
        value = json.loads(raw, object_pairs_hook=no_duplicates, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value
