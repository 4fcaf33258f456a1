"""What must travel with a run's weights besides tensors: configuration, tokenizer, generation config, licence."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_syne.config.schema import ModelConfig
from megatron_syne.convert.files import exists_inside, new_folder, read_json_inside
from megatron_syne.convert.formats.documents import CONFIG, HF_FOLDER, json_document, read_artifacts
from megatron_syne.convert.numbers import SHORT_NAMES, TORCH_NAMES
from megatron_syne.models.hf_config import hf_config_from_model


def collect_artifacts(
    target: Path,
    model: ModelConfig,
    params_dtype: str,
    initialize_from: str | None,
    tokenizer_path: str | None,
) -> None:
    """Fill ``target`` (``<run_dir>/hf``) once, so that every checkpoint can be exported without its source.

    The configuration is the one of the weights that the run starts from, then ``model.hf_path``'s, else one
    made from the model; the run's own tokenizer goes before theirs. Raises DataError, SecurityRefusal.
    """
    if target.exists():
        return
    sources = [Path(tokenizer_path)] if tokenizer_path else []
    origin = [_artifacts_of(Path(initialize_from))] if initialize_from else []
    if model.hf_path:
        origin.append(Path(model.hf_path))
    base = next(
        (read_json_inside(folder, CONFIG) for folder in origin if exists_inside(folder, CONFIG)), None
    )
    config = hf_config_from_model(model, TORCH_NAMES[SHORT_NAMES[params_dtype]], base=base)
    documents = read_artifacts([*sources, *origin]) | {CONFIG: json_document(config)}
    target.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(target) as scratch:
        for name, content in documents.items():
            with (scratch / name).open("xb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())


def refresh_config(target: Path, model: ModelConfig, params_dtype: str) -> None:
    """Bring the configuration in ``target`` up to date with a model that a stage has changed (its RoPE base)."""
    before = read_json_inside(target, CONFIG)
    config = hf_config_from_model(model, TORCH_NAMES[SHORT_NAMES[params_dtype]], base=before)
    if config != before:
        scratch = target.with_name(f".{CONFIG}.tmp")
        scratch.write_bytes(json_document(config))
        os.replace(scratch, target / CONFIG)


def _artifacts_of(path: Path) -> Path:
    """Where a Hugging Face folder, a folder of shards or a checkpoint keeps them."""
    return path / HF_FOLDER if exists_inside(path, HF_FOLDER) else path
