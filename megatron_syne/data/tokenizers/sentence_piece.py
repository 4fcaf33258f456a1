"""sentencepiece's ``tokenizer.model``: Llama-2, Mistral, INF."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_syne.data.tokens.indexed import token_dtype


class SentencePieceTokenizer:
    """Raises what the library raises where the data is no model.

    The model itself says whether a space goes before each text (Llama-2: yes), which is what transformers'
    LlamaTokenizer does with either value of ``legacy`` for a text without special tokens.
    """

    kind = library = "sentencepiece"

    def __init__(self, fingerprint: str, data: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        self._backend = SentencePieceProcessor()
        self._backend.LoadFromSerializedProto(data)
        self.vocab_size = int(self._backend.vocab_size())
        self.fingerprint = fingerprint
        self.eos_id: int | None = _or_none(self._backend.eos_id())
        self.bos_id: int | None = _or_none(self._backend.bos_id())
        self._dtype = token_dtype(self.vocab_size)

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = (self.fingerprint, self._backend.serialized_model_proto())
        return type(self), arguments, {"eos_id": self.eos_id, "bos_id": self.bos_id}

    def encode(self, text: str) -> list[int]:
        return list(self._backend.Encode(text))

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        return [np.array(self._backend.Encode(text), dtype=self._dtype) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._backend.Decode([int(one) for one in ids]))

    def token_id(self, name: str) -> int | None:
        found = int(self._backend.PieceToId(name))  # the unknown token's id, where there is no such piece
        return found if self._backend.IdToPiece(found) == name else None


def _or_none(token: int) -> int | None:
    return token if token >= 0 else None  # sentencepiece says -1 for "none"
