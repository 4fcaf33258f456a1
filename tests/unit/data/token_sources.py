"""Token files with a manifest and numbers kept with the documents, as preparation writes them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from prepared import write_tokens

from megatron_syne.config.schema import SourceConfig
from megatron_syne.data.tokens.index_cache import IndexCache
from megatron_syne.data.tokens.reader import IndexedReader
from megatron_syne.data.tokens.streams import SourceDocuments

EOS = 7


def write_source(
    prefix: Path, documents: list[np.ndarray], fields: dict[str, list[float]] | None = None
) -> Path:
    """``.bin``, ``.idx``, manifest and ``.npy`` files; returns the prefix."""
    write_tokens(prefix, documents)
    facts = {}
    for name in ("bin", "idx"):
        data = Path(f"{prefix}.{name}").read_bytes()
        facts[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    kept = {}
    for name, values in (fields or {}).items():
        np.save(f"{prefix}.{name}.npy", np.array(values, np.float64))
        data = Path(f"{prefix}.{name}.npy").read_bytes()
        kept[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    highest = max((int(document.max()) for document in documents if document.size), default=0)
    manifest = {
        "format": "megatron_syne.tokens",
        "version": 1,
        "dtype": "int32",
        "max_token_id": highest,
        "counts": {"documents": len(documents), "tokens": sum(document.size for document in documents)},
        "tokenizer": {"vocab_size": highest + 1, "fingerprint": "f" * 64, "eos_id": EOS},
        "files": facts,
        "fields": kept,
    }
    Path(f"{prefix}.json").write_text(json.dumps(manifest))
    return prefix


def open_documents(
    prefix: Path, seed: int = 3, cache: Path | None = None, name: str = "x", **options: object
) -> SourceDocuments:
    """The documents of a source with options of its configuration."""
    kept = IndexCache(cache)
    reader = IndexedReader(prefix, require_manifest=False, cache=kept)
    return SourceDocuments(reader, name, seed, SourceConfig(str(prefix), **options), kept)  # type: ignore[arg-type]
