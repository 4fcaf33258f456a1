"""Any ``tokenizer.json``, by the library ``tokenizers``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_syne.data.tokens.indexed import token_dtype


class HuggingFaceTokenizer:
    """Raises what the library raises (a bare Exception) where the content is no tokenizer."""

    kind = library = "tokenizers"

    def __init__(self, fingerprint: str, content: str) -> None:
        from tokenizers import Tokenizer

        self._backend = Tokenizer.from_str(content)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True  # special tokens spelled in a text stay text
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.fingerprint = fingerprint
        self.eos_id: int | None = None
        self.bos_id: int | None = None
        self._dtype = token_dtype(self.vocab_size)

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = (self.fingerprint, self._backend.to_str())
        return type(self), arguments, {"eos_id": self.eos_id, "bos_id": self.bos_id}

    def encode(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        # the fast form leaves out character offsets, which nobody reads here
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, dtype=self._dtype) for one in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode([int(one) for one in ids], skip_special_tokens=False))

    def token_id(self, name: str) -> int | None:
        found: int | None = self._backend.token_to_id(name)
        return found
