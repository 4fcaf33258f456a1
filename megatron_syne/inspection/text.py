"""Tokens as text that a person can check: boundaries, what is not predicted and what cannot be printed are marked."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_syne.data.tokenizer import Tokenizer, load_tokenizer
from megatron_syne.errors import DataError

NOT_PREDICTED = ("⟪", "⟫")
"""Round what is out of the loss."""
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def shown(text: str) -> str:
    """The text with control characters written out: a document must not move the cursor or turn the line round."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def decoded(tokenizer: Tokenizer | None, ids: Sequence[int] | NDArray[Any]) -> str:
    """The tokens as text, or their numbers where there is no tokenizer."""
    numbers = [int(token) for token in ids]
    return " ".join(map(str, numbers)) if tokenizer is None else shown(tokenizer.decode(numbers))


def marked(tokenizer: Tokenizer | None, ids: NDArray[Any], predicted: NDArray[np.bool_]) -> str:
    """The tokens as text, stretches that are not ``predicted`` between ``⟪`` and ``⟫``."""
    cuts = [0, *(np.flatnonzero(np.diff(predicted.astype(np.int8))) + 1).tolist(), len(ids)]
    parts = []
    for begin, end in pairwise(cuts):
        if begin < end:
            text = decoded(tokenizer, ids[begin:end])
            parts.append(text if predicted[begin] else text.join(NOT_PREDICTED))
    return "".join(parts)


def cut(text: str, most: int | None) -> str:
    """At most so many characters: the beginning and the end; None = all."""
    if most is None or len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} […{len(text) - 2 * half:,} characters…] {text[-half:]}"


def matching_tokenizer(folder: str | None, manifest: dict[str, Any] | None, prefix: str) -> Tokenizer | None:
    """The tokenizer of a folder (None = none), which must be the one that the files were made with (DataError)."""
    if folder is None:
        return None
    tokenizer = load_tokenizer(folder)
    expected = tokenizer.fingerprint if manifest is None else manifest["tokenizer"]["fingerprint"]
    if tokenizer.fingerprint != expected:
        raise DataError(
            f"{prefix}: was tokenised with another tokenizer (SHA-256 {expected[:12]}...) than that of {folder} "
            f"({tokenizer.fingerprint[:12]}...); its text would come out wrong"
        )
    return tokenizer


def say(text: str) -> None:
    """Print; what the terminal's encoding cannot show is written out."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))
