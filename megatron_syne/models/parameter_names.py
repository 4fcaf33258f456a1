"""Names of parameters, and the patterns in which a configuration speaks of them. No torch.

A name is the same on every platform and in every layout: that of checkpoints and of Transformer Engine's
layers, with the layer's number in the whole model (``decoder.layers.3.self_attention.linear_qkv.weight``).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from megatron_syne.config.schema import ModelConfig, RunConfig
from megatron_syne.errors import ConfigError, DataError
from megatron_syne.models.family import completed
from megatron_syne.models.json_file import read_json

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
NEW, ORIGINAL = "layers.new", "layers.original"
SURGERY = "surgery.json"  # written by convert/surgery/record.py

# Norms are modules of their own in megatron-core's local layers, and part of the next linear layer in
# Transformer Engine's; megatron-core's gpt_layer_specs.py maps them alike in checkpoints.
_LOCAL_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def canonical(name: str, tied: bool = False) -> str:
    """Name of a parameter from megatron-core's, which has the global layer number already.

    ``tied``: the last pipeline stage's copy of a tied embedding is the embedding.
    """
    if tied and name == OUTPUT:
        return EMBEDDING
    for local, fused in _LOCAL_NORMS.items():
        name = name.replace("." + local, "." + fused)
    return name


def parameter_names(model: ModelConfig) -> list[str]:
    """Every parameter of a resolved model."""
    model = completed(model)
    kinds = ("weight", "bias") if model.normalization == "LayerNorm" else ("weight",)
    layer = [
        *(f"self_attention.linear_qkv.layer_norm_{kind}" for kind in kinds),
        "self_attention.linear_qkv.weight",
        *(["self_attention.linear_qkv.bias"] if model.add_qkv_bias else []),
        "self_attention.linear_proj.weight",
        *(f"mlp.linear_fc1.layer_norm_{kind}" for kind in kinds),
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
    ]
    return [
        EMBEDDING,
        *(f"decoder.layers.{number}.{name}" for number in range(model.num_layers or 0) for name in layer),
        *(f"decoder.final_layernorm.{kind}" for kind in kinds),
        *([] if model.share_embeddings_and_output_weights else [OUTPUT]),
    ]


def matches(name: str, pattern: str, new_layers: Sequence[int] | None) -> bool:
    """Whether a canonical name fits a pattern: ``*`` and ``?`` as in a shell, ``layers.new``, ``layers.original``.

    ``new_layers`` (global numbers) must be known for the last two.
    """
    if pattern not in (NEW, ORIGINAL):
        return fnmatchcase(name, pattern)
    assert new_layers is not None, "layers.new and layers.original need surgery.json"
    parts = name.split(".")
    if parts[:2] != ["decoder", "layers"]:
        return False
    return (int(parts[2]) in new_layers) == (pattern == NEW)


def matches_any(name: str, patterns: Iterable[str], new_layers: Sequence[int] | None) -> bool:
    """Whether a canonical name fits one of the patterns."""
    return any(matches(name, pattern, new_layers) for pattern in patterns)


def trains(
    name: str, freeze: Sequence[str], train_only: Sequence[str], new_layers: Sequence[int] | None
) -> bool:
    """Whether a parameter trains: it fits ``train_only`` (where given) and no pattern of ``freeze``."""
    chosen = not train_only or matches_any(name, train_only, new_layers)
    return chosen and not matches_any(name, freeze, new_layers)


def nearest_names(pattern: str, names: Iterable[str]) -> str:
    """The names that a pattern without a match may have meant, for people."""
    if pattern in (NEW, ORIGINAL):
        return "none: there are no such layers"
    return ", ".join(difflib.get_close_matches(pattern, sorted(set(names)), n=3, cutoff=0.0))


def ask_for_new_layers(patterns: Iterable[str]) -> bool:
    """Whether some pattern is ``layers.new`` or ``layers.original``."""
    return any(pattern in (NEW, ORIGINAL) for pattern in patterns)


def surgery_folders(config: RunConfig) -> list[Path]:
    """Where ``surgery.json`` may lie: the run's own folder goes before what the run starts from."""
    run = Path(config.run_dir)
    kept = sorted((run / "checkpoints").glob("iter_*[0-9]"), reverse=True)
    starts = [config.checkpoint.branch_from, config.checkpoint.initialize_from]
    roots = [run, *kept, *(Path(start) for start in starts if start)]
    return [folder for root in roots for folder in (root / "hf", root)]


def new_layers_of(config: RunConfig) -> list[int]:
    """Numbers of the layers that a block expansion added, from ``surgery.json``.

    Raises ConfigError where there is no such file, DataError for one that is not right.
    """
    folders = surgery_folders(config)
    file = next((folder / SURGERY for folder in folders if (folder / SURGERY).is_file()), None)
    if file is None:
        looked = ", ".join(str(folder) for folder in folders if folder.is_dir()) or "no folder that exists"
        raise ConfigError(
            f"{NEW} and {ORIGINAL} need {SURGERY}, which a block expansion writes beside the weights; looked in: "
            f"{looked}. Start from the expanded weights, or name the layers: decoder.layers.3.*"
        )
    listed = read_json(file).get("new_layers")
    if not isinstance(listed, list) or not all(type(number) is int and number >= 0 for number in listed):
        raise DataError(f"{file}: new_layers must be a list of layer numbers, found {listed!r}")
    return listed
