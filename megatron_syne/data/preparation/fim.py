"""Fill in the middle: a document cut at two places and told in another order, so that a model learns to infill.

Bavarian et al. 2022 (arXiv:2207.14255): a share ``rate`` of the documents is cut, before tokenising, at two
characters chosen uniformly; of those a share ``spm_rate`` begins with the suffix. With the sentinel tokens::

    PSM   <prefix> prefix <suffix> suffix <middle> middle
    SPM   <prefix> <suffix> suffix <middle> prefix middle      (their variant 2, which shares PSM's sentinels)

The choice is a pure function of the seed and the text: the same for any number of workers and any order of files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_syne.data.tokenizer import Tokenizer
from megatron_syne.errors import ConfigError

_DOMAIN = b"fim"


@dataclass(frozen=True)
class FillInMiddle:
    """What is asked for."""

    rate: float
    """Share of the documents that are cut."""
    spm_rate: float
    """Share of those that are told suffix first."""
    tokens: tuple[str, str, str]
    """Names of the sentinel tokens: before the prefix, before the middle, before the suffix."""

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ConfigError(f"--fim-rate: must lie above 0 and not above 1, found {self.rate}")
        if not 0 <= self.spm_rate <= 1:
            raise ConfigError(f"--fim-spm-rate: must lie between 0 and 1, found {self.spm_rate}")
        if len(set(self.tokens)) != 3:
            raise ConfigError(
                f"--fim-tokens: three different tokens are needed, found {' '.join(self.tokens)}"
            )

    def sentinels(self, tokenizer: Tokenizer) -> tuple[int, int, int]:
        """Ids of the sentinel tokens; ConfigError names those that the vocabulary lacks."""
        found = {name: tokenizer.token_id(name) for name in self.tokens}
        if missing := [name for name, number in found.items() if number is None]:
            raise ConfigError(
                f"--fim-tokens: not in the vocabulary: {', '.join(missing)}; name tokens that the tokenizer "
                f"has (reserved ones serve, if the model is trained on them)"
            )
        prefix, middle, suffix = (int(number) for number in found.values() if number is not None)
        return prefix, middle, suffix


class Cut(NamedTuple):
    """A document in three pieces."""

    prefix: str
    middle: str
    suffix: str
    suffix_first: bool


def cut(text: str, fim: FillInMiddle, seed: int) -> Cut | None:
    """The three pieces of a document, None where it stays as it is."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=32, key=b"%d" % seed, person=_DOMAIN).digest()
    chosen, order, one, other = (int.from_bytes(digest[at : at + 8], "little") for at in (0, 8, 16, 24))
    if chosen >= fim.rate * 2.0**64:
        return None
    places = len(text) + 1
    begin, end = sorted((one * places >> 64, other * places >> 64))
    return Cut(text[:begin], text[begin:end], text[end:], order < fim.spm_rate * 2.0**64)


def rearrange(
    pieces: Sequence[NDArray[Any]], suffix_first: bool, sentinels: tuple[int, int, int], dtype: np.dtype[Any]
) -> NDArray[Any]:
    """Tokens of prefix, middle and suffix in the order told, with the sentinels."""
    prefix, middle, suffix = pieces
    at_prefix, at_middle, at_suffix = (np.array([one], dtype) for one in sentinels)
    if suffix_first:
        return np.concatenate([at_prefix, at_suffix, suffix, at_middle, prefix, middle])
    return np.concatenate([at_prefix, prefix, at_suffix, suffix, at_middle, middle])
