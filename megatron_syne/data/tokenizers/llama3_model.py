"""Meta's ``tokenizer.model`` of Llama-3: tiktoken's format, a base64 token and its rank on each line.

The file holds neither the pattern nor the special tokens. They are those of Meta's published code
(meta-llama/llama3, ``llama/tokenizer.py``): 256 special tokens from id 128000 on.
"""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path

from megatron_syne.errors import DataError

_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (\d+)\r?")
_NUM_RANKS = 128000
_NUM_SPECIAL = 256
_NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "<|eot_id|>",
}


def is_tiktoken(data: bytes) -> bool:
    """Whether a file starts as tiktoken's format does."""
    return _LINE.fullmatch(data.split(b"\n", 1)[0]) is not None


def read_ranks(file: Path, data: bytes) -> dict[bytes, int]:
    """Tokens and their ranks, which are their ids; raises DataError with the line."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), 1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise DataError(f"{file}:{number}: expected a base64 token and its rank, found {line[:40]!r}")
        try:
            token = base64.b64decode(match[1], validate=True)
        except binascii.Error as error:
            raise DataError(f"{file}:{number}: not base64: {error}") from None
        if int(match[2]) != len(ranks) or token in ranks:
            raise DataError(
                f"{file}:{number}: expected a new token with rank {len(ranks)}, found {line[:40]!r}"
            )
        ranks[token] = len(ranks)
    absent = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if len(ranks) != _NUM_RANKS or absent:
        raise DataError(
            f"{file}: is in tiktoken's format, but with {len(ranks)} tokens; only Llama-3's is known, with "
            f"{_NUM_RANKS}: the file tells neither the pattern nor the special tokens of another. Put the "
            f"tokenizer.json of the same model beside it"
        )
    return ranks


def special_tokens() -> dict[str, int]:
    """Names and ids: those without a use are ``<|reserved_special_token_N|>``, counted among themselves."""
    unused = iter(range(_NUM_SPECIAL))
    return {
        _NAMED.get(place) or f"<|reserved_special_token_{next(unused)}|>": _NUM_RANKS + place
        for place in range(_NUM_SPECIAL)
    }
