"""What must travel with a run's weights besides tensors: configuration, tokenizer, generation config, licence."""

from __future__ import annotations

from pathlib import Path

from megatron_syne.config.schema import ModelConfig
from megatron_syne.convert.files import exists_inside, new_folder, read_json_inside, write_json
from megatron_syne.convert.hf_io import copy_artifacts
from megatron_syne.convert.shards_io import HF_FOLDER
from megatron_syne.convert.shards_io import MANIFEST as SHARDS_MANIFEST
from megatron_syne.models.hf_config import hf_config_from_model

_TORCH_NAMES = {"bf16": "bfloat16", "fp32": "float32"}


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
    base = next((read_json_inside(o, "config.json") for o in origin if exists_inside(o, "config.json")), None)
    target.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(target) as scratch:
        write_json(
            scratch / "config.json", hf_config_from_model(model, _TORCH_NAMES[params_dtype], base=base)
        )
        copied = ["config.json"]
        for folder in [*sources, *origin]:
            if folder.is_dir():
                copied += copy_artifacts(folder, scratch, skip=tuple(copied))


def _artifacts_of(path: Path) -> Path:
    """Where a Hugging Face folder, a folder of shards or a checkpoint keeps them."""
    return path / HF_FOLDER if exists_inside(path, SHARDS_MANIFEST) else path
