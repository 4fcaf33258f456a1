"""Text to token ids, from the files that a model's folder carries.

Three kinds are read: ``tokenizer.json``, Meta's ``tokenizer.model`` of Llama-3 (tiktoken's format) and
sentencepiece's ``tokenizer.model``. In all of them text is only ever text: no BOS or EOS is added, and a document
that spells out ``<|end_of_text|>`` gets ordinary tokens, so that no document can forge the end of another. The ids
are those of transformers' tokenizer with ``add_special_tokens=False, split_special_tokens=True``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from megatron_syne.data.tokenizers.byte_bpe import LLAMA3_PATTERN, ByteBpeTokenizer
from megatron_syne.data.tokenizers.byte_level_json import byte_level_of
from megatron_syne.data.tokenizers.hugging_face import HuggingFaceTokenizer
from megatron_syne.data.tokenizers.llama3_model import is_tiktoken, read_ranks, special_tokens
from megatron_syne.data.tokenizers.sentence_piece import SentencePieceTokenizer
from megatron_syne.errors import DataError, MissingInput

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
    """What the file is: ``tokenizers``, ``tiktoken`` or ``sentencepiece``."""
    library: str
    """What does the work; tiktoken also for a ``tokenizer.json`` where it is proved to give the same ids."""

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """One array of ids for each text, in ``token_dtype(vocab_size)``; they may be read-only."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def token_id(self, name: str) -> int | None:
        """Id of a token by its name, special tokens included; None where there is none."""
        ...


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Tokenizer of a folder (``tokenizer.json`` goes before ``tokenizer.model``) or of one such file.

    Raises MissingInput where there is none, DataError where a file cannot be understood.
    """
    file = find_tokenizer_file(path)
    data = file.read_bytes()
    fingerprint = hashlib.sha256(data).hexdigest()
    tokenizer: ByteBpeTokenizer | HuggingFaceTokenizer | SentencePieceTokenizer
    if file.suffix == ".json":
        tokenizer = _from_json(file, data, fingerprint)
    elif is_tiktoken(data):
        special = _renamed(file.parent, special_tokens())
        tokenizer = ByteBpeTokenizer("tiktoken", fingerprint, LLAMA3_PATTERN, read_ranks(file, data), special)
        tokenizer.eos_id = tokenizer.token_id("<|end_of_text|>")
        tokenizer.bos_id = tokenizer.token_id("<|begin_of_text|>")
    else:
        try:
            tokenizer = SentencePieceTokenizer(fingerprint, data)
        except Exception as error:
            raise DataError(f"{file}: not a sentencepiece model: {error}") from None
    eos, bos = _named_ids(file.parent, tokenizer.token_id, tokenizer.vocab_size)
    tokenizer.eos_id = tokenizer.eos_id if eos is None else eos
    tokenizer.bos_id = tokenizer.bos_id if bos is None else bos
    return tokenizer


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


def _from_json(file: Path, data: bytes, fingerprint: str) -> ByteBpeTokenizer | HuggingFaceTokenizer:
    try:
        found = byte_level_of(json.loads(data))
    except (ValueError, RecursionError):
        found = None  # the library says what is wrong with it
    if found is not None:
        return ByteBpeTokenizer("tokenizers", fingerprint, *found)
    try:
        return HuggingFaceTokenizer(fingerprint, data.decode("utf-8"))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a bare Exception, or Rust's PanicException, which is not even one
        raise DataError(f"{file}: not a tokenizer that the library can read: {error}") from None


def _renamed(folder: Path, special: dict[str, int]) -> dict[str, int]:
    """Special tokens by the names that tokenizer_config.json gives them: Llama-3.1 uses some reserved ones."""
    decoder = _read_json(folder / "tokenizer_config.json").get("added_tokens_decoder")
    names = {number: name for name, number in special.items()}
    for number, token in decoder.items() if isinstance(decoder, dict) else ():
        content = token.get("content") if isinstance(token, dict) else None
        if number.isdecimal() and int(number) in names and isinstance(content, str) and content:
            names[int(number)] = content
    return {name: number for number, name in names.items()}


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
