"""Text to token ids, from the files that a Hugging Face folder carries.

Two kinds are read: ``tokenizer.json`` (library ``tokenizers``) and sentencepiece's ``tokenizer.model``.
In both, text is only ever text: no BOS or EOS is added, and a document that spells out ``<|end_of_text|>``
gets ordinary tokens, so that no document can forge the end of another.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_syne.errors import DataError, MissingInput

_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
_MAX_TOKENIZER_BYTES = 1 << 28


class Tokenizer(Protocol):
    """What the rest of the data room asks of a tokenizer."""

    vocab_size: int
    """Largest token id + 1: the rows that an embedding must have."""
    eos_id: int | None
    """Id appended to each document; None where no file in the folder names it."""
    bos_id: int | None
    """Id of the beginning-of-text token, where one is named."""
    fingerprint: str
    """SHA-256 of ``tokenizer.json`` / ``tokenizer.model``: what ``sha256sum`` prints."""
    kind: str
    """``tokenizers`` or ``sentencepiece``."""

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Tokenizer of a folder (``tokenizer.json`` goes before ``tokenizer.model``) or of one such file.

    Raises MissingInput where there is none, DataError where a file cannot be understood.
    """
    file = find_tokenizer_file(path)
    data = file.read_bytes()
    fingerprint = hashlib.sha256(data).hexdigest()
    if file.suffix == ".json":
        return _HuggingFaceTokenizer(file, data, fingerprint)
    if _TIKTOKEN_LINE.match(data):
        raise DataError(
            f"{file}: is in tiktoken's format (base64 token and rank on each line), which is not read; "
            f"put the tokenizer.json of the same model beside it"
        )
    return _SentencePieceTokenizer(file, data, fingerprint)


def find_tokenizer_file(path: str | Path) -> Path:
    """The file that defines the tokenisation; raises MissingInput or DataError."""
    path = Path(path)
    candidates = [path / "tokenizer.json", path / "tokenizer.model"] if path.is_dir() else [path]
    for file in candidates:
        if file.exists():
            break
    else:
        raise MissingInput(f"{path}: no tokenizer here; expected tokenizer.json or tokenizer.model")
    if not file.is_file() or file.suffix not in (".json", ".model"):
        raise DataError(f"{file}: not a tokenizer; expected a file tokenizer.json or tokenizer.model")
    if (size := file.stat().st_size) > _MAX_TOKENIZER_BYTES:
        raise DataError(f"{file}: {size} bytes is no tokenizer (limit {_MAX_TOKENIZER_BYTES})")
    return file


def tokenizer_fingerprint(path: str | Path) -> str:
    """SHA-256 of the defining file, without loading the tokenizer."""
    return hashlib.sha256(find_tokenizer_file(path).read_bytes()).hexdigest()


class _HuggingFaceTokenizer:
    kind = "tokenizers"

    def __init__(self, file: Path, data: bytes, fingerprint: str) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            self._backend = Backend.from_str(data.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{file}: not a tokenizer that the library can read: {error}") from None
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True  # special tokens spelled in a text stay text
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.fingerprint = fingerprint
        self.eos_id, self.bos_id = _named_ids(file.parent, self._backend.token_to_id, self.vocab_size)

    def encode(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # the fast form leaves out character offsets, which nobody reads here
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [list(one.ids) for one in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=False))


class _SentencePieceTokenizer:
    kind = "sentencepiece"

    def __init__(self, file: Path, data: bytes, fingerprint: str) -> None:
        from sentencepiece import SentencePieceProcessor

        self._backend = SentencePieceProcessor()
        try:
            self._backend.LoadFromSerializedProto(data)
        except Exception as error:
            raise DataError(f"{file}: not a sentencepiece model: {error}") from None
        self.vocab_size = int(self._backend.vocab_size())
        self.fingerprint = fingerprint
        eos, bos = _named_ids(file.parent, self._piece_id, self.vocab_size)
        self.eos_id = eos if eos is not None else self._own(self._backend.eos_id())
        self.bos_id = bos if bos is not None else self._own(self._backend.bos_id())

    def _piece_id(self, piece: str) -> int | None:
        found = int(self._backend.PieceToId(piece))
        return found if self._backend.IdToPiece(found) == piece else None

    @staticmethod
    def _own(token: int) -> int | None:
        return token if token >= 0 else None  # sentencepiece says -1 for "none"

    def encode(self, text: str) -> list[int]:
        return list(self._backend.Encode(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(self._backend.Encode(text)) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._backend.Decode(list(ids)))


def _named_ids(folder: Path, token_to_id: Any, vocab_size: int) -> tuple[int | None, int | None]:
    """(eos, bos): by name in tokenizer_config.json, else by id in generation_config.json, config.json.

    A list of ids (Llama-3-Instruct's generation_config.json) stands for its first one.
    """
    tokenizer_config = _read_json(folder / "tokenizer_config.json")
    fallbacks = [(name, _read_json(folder / name)) for name in ("generation_config.json", "config.json")]
    found: list[int | None] = []
    for which in ("eos", "bos"):
        token = tokenizer_config.get(f"{which}_token")
        if isinstance(token, dict):  # an AddedToken, written out
            token = token.get("content")
        if token is not None:
            number = token_to_id(token) if isinstance(token, str) else None
            if number is None:
                raise DataError(
                    f"{folder / 'tokenizer_config.json'}: {which}_token {token!r} is not in the vocabulary"
                )
            found.append(number)
            continue
        chosen = None
        for name, config in fallbacks:
            number = config.get(f"{which}_token_id")
            number = number[0] if isinstance(number, list) and number else number
            if number is None:
                continue
            if type(number) is not int or not 0 <= number < vocab_size:
                raise DataError(
                    f"{folder / name}: {which}_token_id {number!r} is not in a vocabulary of {vocab_size}"
                )
            chosen = number
            break
        found.append(chosen)
    return found[0], found[1]


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content
