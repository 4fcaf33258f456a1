"""The small files that travel with weights: configuration, tokenizer, generation config, licence.

They are read whole at planning, so that a target is complete before its first byte is written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_syne.config.schema import ModelConfig
from megatron_syne.convert.files import exists_inside, open_inside, read_json_inside
from megatron_syne.convert.numbers import ITEM_BYTES, TORCH_NAMES
from megatron_syne.convert.pieces import matrix
from megatron_syne.convert.streams import Weights
from megatron_syne.errors import DataError, SecurityRefusal
from megatron_syne.models.config import model_differences
from megatron_syne.models.family import family_of
from megatron_syne.models.hf_config import config_dtype, hf_config_from_model, model_config_from_hf

CONFIG = "config.json"
HF_FOLDER = "hf"
"""Where formats that are not Hugging Face's keep these files."""

# Files that only mean something together: they come from one folder or from the other, never from both.
VOCABULARY = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")
# The licence must travel: Meta's terms ask for it.
ARTIFACTS = (
    "generation_config.json",
    *VOCABULARY,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
    "LICENSE",
    "LICENSE.txt",
    "USE_POLICY.md",
    "NOTICE",
    "surgery.json",  # which layers are new (convert/surgery/record.py): training freezes the others by it
)
_LIMIT_BYTES = 256 * 2**20


def check_artifacts(folder: Path, model: ModelConfig) -> None:
    """Raises SecurityRefusal where the tokenizer wants to bring code, DataError where its JSON is broken.

    Of a family that is known to (``Family.brings_code``) the key is let pass; the code is never run.
    """
    known = family_of(model.model_type).brings_code
    for name in ("tokenizer_config.json", "generation_config.json"):
        if not exists_inside(folder, name):
            continue
        if read_json_inside(folder, name).get("auto_map") is not None and not known:
            raise SecurityRefusal(
                f"{folder / name}: auto_map asks to run code that comes with the model; this is never done. "
                f"Remove the key if the standard tokenizer classes read these files"
            )


def read_artifacts(folders: Iterable[Path]) -> dict[str, bytes]:
    """Contents of tokenizer, generation config and licence files; the first folder that has a file gives it,
    and the first with a vocabulary gives all of its files. Raises DataError, SecurityRefusal (links)."""
    found: dict[str, bytes] = {}
    for folder in folders:
        if not folder.is_dir():
            continue
        skip = {*found, *(VOCABULARY if found.keys() & set(VOCABULARY) else ())}
        for name in ARTIFACTS:
            if name not in skip and exists_inside(folder, name):
                found[name] = _read_small(folder, name)
    return found


def json_document(value: Any) -> bytes:
    """A JSON file's bytes: sorted keys, two spaces, as transformers writes them."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def hf_config(weights: Weights, dtypes: dict[str, str]) -> dict[str, Any]:
    """The ``config.json`` of weights in the given formats: the source's own with what is now different."""
    return hf_config_from_model(weights.model, TORCH_NAMES[main_dtype(weights, dtypes)], base=weights.config)


def hf_folder(weights: Weights, dtypes: dict[str, str]) -> dict[str, bytes]:
    """Documents below ``hf/`` for formats of Megatron's. The configuration is the source's, word for word,
    unless it no longer describes the weights (another format, surgery)."""
    config, where = weights.config, CONFIG
    same = not model_differences(weights.model, model_config_from_hf(config, where))
    if not same or config_dtype(config, where) not in (None, TORCH_NAMES[main_dtype(weights, dtypes)]):
        config = hf_config(weights, dtypes)
    found = carried(weights) | {CONFIG: json_document(config)}
    return {f"{HF_FOLDER}/{name}": content for name, content in found.items()}


def carried(weights: Weights, tokenizer_dir: Path | None = None) -> dict[str, bytes]:
    """All but ``config.json``: the weights' own documents (of an operation on them), then ``tokenizer_dir``'s
    files, then those of the source."""
    own: dict[str, bytes] = dict(getattr(weights, "documents", {}))
    folders = [folder for folder in (tokenizer_dir, weights.artifacts_dir) if folder is not None]
    for folder in folders:
        check_artifacts(folder, weights.model)
    found = read_artifacts(folders)
    if own.keys() & set(VOCABULARY):
        found = {name: content for name, content in found.items() if name not in VOCABULARY}
    return found | own


def main_dtype(weights: Weights, dtypes: dict[str, str]) -> str:
    """The format that most bytes of the weights have."""
    sizes: dict[str, int] = {}
    for name, dtype in dtypes.items():
        rows, columns = matrix(weights.shapes[name])
        sizes[dtype] = sizes.get(dtype, 0) + rows * columns * ITEM_BYTES[dtype]
    return max(sizes, key=lambda dtype: sizes[dtype])


def _read_small(folder: Path, name: str) -> bytes:
    with os.fdopen(open_inside(folder, name), "rb") as stream:
        content = stream.read(_LIMIT_BYTES + 1)
    if len(content) > _LIMIT_BYTES:
        raise DataError(f"{folder / name}: larger than {_LIMIT_BYTES} bytes, which no file of this kind is")
    return content
