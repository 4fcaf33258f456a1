"""A tokenizer's vocabulary, and which rows of an embedding mean the same under another one.

Two kinds are read, from the files' contents: ``tokenizer.json`` (library ``tokenizers``) and sentencepiece's
``tokenizer.model``, each with the tokens that ``added_tokens.json`` or ``tokenizer_config.json`` add to it. No
code that comes with a tokenizer is run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_syne.errors import DataError, MissingInput
from megatron_syne.models.json_file import parse_json

MAX_IDS = 2**24
"""More than any tokenizer has; the library's memory grows with the largest id in its file."""
NONE = -2
"""No row of the old embedding: a new token, or a row without a token."""

Key = tuple[bool, bytes]


@dataclass
class Vocabulary:
    """Tokens of a tokenizer by their strings."""

    file: str
    """``tokenizer.json`` or ``tokenizer.model``."""
    sha256: str
    """Of that file."""
    scheme: str
    """How the strings spell text: ``byte-level`` (GPT-2's alphabet of bytes), ``sentencepiece`` (``▁`` for a
    space, ``<0x0A>`` for a byte), ``plain``."""
    ids: dict[str, int]
    literal: set[str]
    """Tokens whose string is the text itself: added tokens, control tokens."""
    encode: Callable[[list[str]], list[list[int]]]
    """Texts to ids as they stand inside a longer text: nothing is put before or behind them."""
    unknown: int | None = None
    named: dict[str, str] = field(default_factory=dict)
    """``bos_token``, ``eos_token``, ... as ``tokenizer_config.json`` names them."""

    @property
    def size(self) -> int:
        """Largest id + 1: the rows that an embedding must have."""
        return max(self.ids.values(), default=-1) + 1

    def text(self, token: str) -> bytes:
        """The bytes that a token stands for; they need not be whole characters."""
        if token in self.literal or self.scheme == "plain":
            return token.encode("utf-8", "surrogatepass")
        if self.scheme == "byte-level":
            table = _byte_alphabet()
            if all(letter in table for letter in token):
                return bytes(table[letter] for letter in token)
        elif _is_byte(token):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode("utf-8", "surrogatepass")

    def key(self, token: str) -> Key:
        """What two tokens that are not literal must have in common to mean the same."""
        text = self.text(token)
        # sentencepiece has both <0x41> and A
        return (self.scheme == "sentencepiece" and _is_byte(token) and text < b"\x80", text)


def read_vocabulary(documents: Mapping[str, bytes], where: str) -> Vocabulary:
    """The vocabulary in a tokenizer's files (by name); ``tokenizer.json`` goes before ``tokenizer.model``.

    ``where`` is named in messages. Raises MissingInput, DataError.
    """
    config = _json(documents, "tokenizer_config.json", where)
    if (content := documents.get("tokenizer.json")) is not None:
        found = _from_json(content, f"{where}/tokenizer.json")
    elif (content := documents.get("tokenizer.model")) is not None:
        found = _from_sentencepiece(content, f"{where}/tokenizer.model")
    else:
        raise MissingInput(f"{where}: no tokenizer: looked for tokenizer.json and tokenizer.model")
    for token, number in _added(config, _json(documents, "added_tokens.json", where), where).items():
        if found.ids.setdefault(token, number) != number:
            raise DataError(
                f"{where}: {token!r} has id {found.ids[token]} in {found.file} and {number} among the added "
                f"tokens (added_tokens.json, tokenizer_config.json); make them agree"
            )
        found.literal.add(token)
    by_id: dict[int, str] = {}
    for token, number in found.ids.items():
        if by_id.setdefault(number, token) != token:
            raise DataError(f"{where}: {by_id[number]!r} and {token!r} have the same id {number}")
    for name, value in config.items():
        content_of = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content_of, str):
            found.named[name] = content_of
    return found


def same_tokens(new: Vocabulary, old: Vocabulary, rows: int) -> npt.NDArray[np.int64]:
    """For every id of ``new`` the id of ``old`` with the same meaning, ``NONE`` where it has none.

    Tokens are the same whose strings are, or, where the two spell text differently (byte-level against
    sentencepiece), whose bytes are. Ids of ``old`` beyond its embedding's ``rows`` do not count.
    """
    old_ids = {token: number for token, number in old.ids.items() if number < rows}
    same_spelling = new.scheme == old.scheme
    by_text: dict[Key, int] = {}
    if not same_spelling:
        for token, number in sorted(old_ids.items(), key=lambda item: item[1]):
            if token not in old.literal:
                by_text.setdefault(old.key(token), number)
    found = np.full(new.size, NONE, np.int64)
    for token, number in new.ids.items():
        if same_spelling or (token in new.literal and token in old.literal):
            found[number] = old_ids.get(token, NONE)
        elif token not in new.literal:
            found[number] = by_text.get(new.key(token), NONE)
    return found


def sub_pieces(new: Vocabulary, old: Vocabulary, tokens: list[str], rows: int) -> list[list[int]]:
    """The ids into which ``old`` cuts each token's text; none where it cannot.

    A token of broken characters (byte-level vocabularies have them) is cut into its bytes.
    """
    texts: list[str] = []
    bytes_only: dict[int, bytes] = {}
    for index, token in enumerate(tokens):
        raw = new.text(token)
        try:
            texts.append(raw.decode("utf-8"))
        except UnicodeDecodeError:
            texts.append("")
            bytes_only[index] = raw
    single = {
        old.text(token): number
        for token, number in old.ids.items()
        if token not in old.literal
        and (old.scheme == "byte-level" or _is_byte(token))
        and len(old.text(token)) == 1
    }
    found = old.encode(texts)
    for index, raw in bytes_only.items():
        found[index] = [single.get(bytes([byte]), -1) for byte in raw]
    return [[n for n in ids if 0 <= n < rows and n != old.unknown] for ids in found]


def _from_json(content: bytes, where: str) -> Vocabulary:
    from tokenizers import Tokenizer

    tree = parse_json(content, where)
    if not (largest := _largest_id(tree)) < MAX_IDS:
        raise DataError(f"{where}: has an id {largest}; expected ids below {MAX_IDS}")
    try:
        bare = Tokenizer.from_str(json.dumps(_without_prefix({**tree, "truncation": None, "padding": None})))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{where}: not a tokenizer that the library can read: {error}") from None
    parts = json.dumps([tree.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")])
    scheme = "plain"
    if '"ByteLevel"' in parts:
        scheme = "byte-level"
    elif json.dumps("▁") in parts or '"Metaspace"' in parts:
        scheme = "sentencepiece"
    ids = {str(token): int(number) for token, number in bare.get_vocab(with_added_tokens=True).items()}
    unknown = tree["model"].get("unk_token") if isinstance(tree.get("model"), dict) else None
    return Vocabulary(
        file="tokenizer.json",
        sha256=hashlib.sha256(content).hexdigest(),
        scheme=scheme,
        ids=ids,
        literal={added.content for added in bare.get_added_tokens_decoder().values()},
        encode=lambda texts: [
            list(one.ids) for one in bare.encode_batch_fast(texts, add_special_tokens=False)
        ],
        unknown=ids.get(unknown) if isinstance(unknown, str) else None,
    )


def _largest_id(tree: dict[str, Any]) -> int:
    model, added = tree.get("model"), tree.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    ids += [one.get("id") for one in added if isinstance(one, dict)] if isinstance(added, list) else []
    return max((number for number in ids if isinstance(number, int)), default=-1)


def _from_sentencepiece(content: bytes, where: str) -> Vocabulary:
    from sentencepiece import SentencePieceProcessor

    # Settings that follow replace earlier ones (protobuf joins a field that stands twice): normalizer_spec,
    # field 3, with add_dummy_prefix, field 3, and remove_extra_whitespaces, field 4, both false.
    model = SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(content + b"\x1a\x04\x18\x00\x20\x00")
    except Exception as error:
        raise DataError(
            f"{where}: not a sentencepiece model: {error}; if it is tiktoken's file of ranks (Llama-3), put the "
            f"tokenizer.json of the same model beside it"
        ) from None
    numbers = range(model.vocab_size())
    ids = {model.IdToPiece(number): number for number in numbers if not model.IsUnused(number)}
    return Vocabulary(
        file="tokenizer.model",
        sha256=hashlib.sha256(content).hexdigest(),
        scheme="sentencepiece",
        ids=ids,
        literal={piece for piece, n in ids.items() if model.IsControl(n) or model.IsUnknown(n)},
        encode=lambda texts: [list(model.Encode(text)) for text in texts],
        unknown=int(model.unk_id()),
    )


def _without_prefix(node: Any) -> Any:
    """A ``tokenizer.json`` that puts no space before a text, which the pieces of a token must not have."""
    if isinstance(node, list):
        kept = [one for one in node if not (isinstance(one, dict) and one.get("type") == "Prepend")]
        return [_without_prefix(one) for one in kept]
    if not isinstance(node, dict):
        return node
    found = {
        key: value if key in ("vocab", "merges") else _without_prefix(value) for key, value in node.items()
    }
    normalizer = found.get("normalizer")
    if isinstance(normalizer, dict) and normalizer.get("type") == "Prepend":
        found["normalizer"] = None
    if "add_prefix_space" in found:
        found["add_prefix_space"] = False
    if "prepend_scheme" in found:
        found["prepend_scheme"] = "never"
    return found


def _added(config: dict[str, Any], added: dict[str, Any], where: str) -> dict[str, int]:
    """Tokens beside the vocabulary: ``added_tokens.json`` {token: id}, ``added_tokens_decoder`` {id: {...}}."""
    found: dict[str, int] = {}
    decoder = config.get("added_tokens_decoder") or {}
    pairs: list[tuple[Any, Any]] = list(added.items())
    try:
        pairs += [(entry["content"], int(number)) for number, entry in decoder.items()]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise DataError(
            f"{where}/tokenizer_config.json: added_tokens_decoder: expected {{id: {{content: ...}}}}"
        ) from None
    for token, number in pairs:
        if not isinstance(token, str) or type(number) is not int or not 0 <= number < MAX_IDS:
            raise DataError(f"{where}: added token {token!r}: {number!r} is not an id")
        if found.setdefault(token, number) != number:
            raise DataError(f"{where}: added token {token!r} has two ids, {found[token]} and {number}")
    return found


def _json(documents: Mapping[str, bytes], name: str, where: str) -> dict[str, Any]:
    content = documents.get(name)
    return {} if content is None else parse_json(content, f"{where}/{name}")


def _is_byte(token: str) -> bool:
    return (
        len(token) == 6
        and token.startswith("<0x")
        and token.endswith(">")
        and token[3:5].isalnum()
        and (all(letter in "0123456789ABCDEFabcdef" for letter in token[3:5]))
    )


@cache
def _byte_alphabet() -> dict[str, int]:
    """Letter to byte of byte-level tokenizers: printable Latin-1 stands for itself, the other bytes in order
    for the letters from 256 on (openai/gpt-2, ``encoder.py``, ``bytes_to_unicode``)."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): byte for i, byte in enumerate(others)}
