"""Helpers of these tests: a few documents, and token files made from them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from megatron_syne.data.tokens.indexed import IndexedWriter
from megatron_syne.data.tokens.reader import IndexedReader

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all today.",
    "數據的質量決定模型的質量;這是一個很短的中文段落,用來測試分詞器。",
    "def add(a, b):\n    return a + b  # a line of code, with a comment in it\n",
    "Question: what is 12 + 30? Answer: 12 + 30 = 42, so the answer is 42 and not 24.",
]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), "utf-8")
    return path


def many_texts(count: int) -> list[str]:
    """Distinct documents of different lengths."""
    return [f"Document {n}: " + (TEXTS[n % len(TEXTS)] + " ") * (1 + n % 5) for n in range(count)]


def write_tokens(prefix: Path, documents: list[np.ndarray], dtype: str = "<i4") -> IndexedReader:
    """Token files without a manifest."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{prefix}.bin", "w+b") as bin_stream, open(f"{prefix}.idx", "w+b") as idx_stream:
        writer = IndexedWriter(bin_stream, idx_stream, np.dtype(dtype))
        for document in documents:
            writer.add(document, np.array([document.size]))
        writer.finish()
    return IndexedReader(prefix, require_manifest=False)


def random_documents(count: int, seed: int = 0, longest: int = 60) -> list[np.ndarray]:
    """Documents whose tokens are all different: a token says where it stood."""
    lengths = np.random.default_rng(seed).integers(1, longest, count)
    ends = np.cumsum(lengths)
    return [np.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)]
