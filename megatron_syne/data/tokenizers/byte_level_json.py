"""A ``tokenizer.json`` that tiktoken can stand in for: the proof that both give the same ids for every text.

``tokenizers`` merges the adjacent pair that stands first in its list of merges; tiktoken the one whose joined
bytes have the lowest rank; both take the leftmost of equals. A boundary between two pieces, once merged, never
comes back, so what lies between two boundaries that survive has been merged as if it stood alone. Hence a token
can only ever be put together from the one pair that its own bytes alone lead to (:func:`last_pair`). If each
such pair is in the list of merges, and the list is in the order of the ids, the two libraries do the same merges.
What remains are the pattern that cuts the text first, of which only those are taken that the tests compare
between the two libraries over all of Unicode, and settings that tiktoken does not have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from megatron_syne.data.tokenizers.byte_bpe import GPT2_PATTERN, LLAMA3_PATTERN, byte_alphabet, splits


class ByteLevel(NamedTuple):
    """What tiktoken needs to know of a tokenizer."""

    pattern: str
    ranks: dict[bytes, int]
    special: dict[str, int]


def byte_level_of(tree: Any) -> ByteLevel | None:
    """The content of a ``tokenizer.json`` in tiktoken's terms; None where the same ids cannot be proved."""
    try:
        return _byte_level_of(tree)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):  # not of the shape looked for
        return None


def _byte_level_of(tree: dict[str, Any]) -> ByteLevel | None:
    model, added = tree["model"], tree["added_tokens"]
    special = {one["content"]: int(one["id"]) for one in added}
    whole_pieces = model.get("ignore_merges", False)
    if (
        model["type"] != "BPE"
        or model.get("dropout")
        or model.get("continuing_subword_prefix")
        or model.get("end_of_word_suffix")
        or tree.get("normalizer") is not None
        or (pattern := _pattern_of(tree["pre_tokenizer"])) is None
        or not all(one["special"] and one["content"] for one in added)  # others are looked for in the text
    ):
        return None
    # All of this in the file's own spelling, a character for each byte: strings join and compare as bytes do
    vocab: dict[str, int] = {
        token: number
        for token, number in model["vocab"].items()
        # GPT-2's <|endoftext|> is in both; where whole pieces are looked up a text could become it
        if token not in special or whole_pieces
    }
    alphabet = byte_alphabet()
    if not vocab.keys() >= set(alphabet) or not set(alphabet) >= set("".join(vocab)) or "" in vocab:
        return None
    if len({*vocab.values(), *special.values()}) != len(vocab) + len(special):
        return None
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    products = [vocab[merge.replace(" ", "")] for merge in merges]
    if products != sorted(products):
        return None
    listed = set(merges)
    valid = 0
    for token in vocab:
        if len(token) == 1:
            continue
        ways = [" ".join(pair) for pair in splits(token, vocab)]
        if whole_pieces and listed.issuperset(ways):  # then the one that comes up is among them
            valid += len(ways)
            continue
        valid += len(listed.intersection(ways))
        pair = last_pair(token, vocab)
        if pair is None and whole_pieces:
            continue  # neither library merges to it; both take it where it is a piece by itself
        if pair is None or " ".join(pair) not in listed:
            return None
    if valid != len(listed):  # some are of tokens that do not exist
        return None
    to_bytes = {ord(character): byte for byte, character in enumerate(alphabet)}
    ranks = {token.translate(to_bytes).encode("latin-1"): number for token, number in vocab.items()}
    return ByteLevel(pattern, ranks, special)


def _pattern_of(pre_tokenizer: dict[str, Any]) -> str | None:
    """The pattern that cuts the text, where it is one that both libraries are known to read alike."""
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if parts[-1]["type"] != "ByteLevel" or parts[-1]["add_prefix_space"]:
        return None
    if len(parts) == 1:
        return GPT2_PATTERN if parts[0].get("use_regex", True) else None
    if len(parts) != 2 or parts[1].get("use_regex", True):
        return None
    split = parts[0]
    if split["type"] != "Split" or split["behavior"] != "Isolated" or split["invert"]:
        return None
    pattern = split["pattern"].get("Regex")
    return pattern if pattern in (LLAMA3_PATTERN, GPT2_PATTERN) else None


def last_pair(token: str, ranks: Mapping[str, int]) -> tuple[str, str] | None:
    """The two pieces that merging by rank makes of a token's bytes before the token itself; None if it sticks."""
    parts = list(token)
    while len(parts) > 2:
        found = [
            (ranks[joined], at)
            for at in range(len(parts) - 1)
            if (joined := parts[at] + parts[at + 1]) in ranks
        ]
        if not found:
            return None
        at = min(found)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]
