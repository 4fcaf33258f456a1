"""What a checkpoint says of itself before it is loaded: its account of the data, and its model. No torch."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_syne.checkpoint import folder as folders
from megatron_syne.config.schema import ModelConfig
from megatron_syne.errors import ConfigError


def read_ledger(path: Path) -> tuple[dict[str, Any], int, int]:
    """(account of the data read so far, samples consumed, step) of the checkpoint that a run goes on from.

    ConfigError for a checkpoint from before there was this account, which kept a fingerprint in its place.
    """
    run = folders.read_run(path)
    if "data" not in run:
        raise ConfigError(
            f"{path} was written before checkpoints kept an account of the data read, and its order of samples "
            "is not today's: it cannot be gone on from. Start a new run_dir with checkpoint.initialize_from set "
            "to it (its weights alone are taken), or finish the run with the version that wrote it"
        )
    return run["data"], int(run["state"]["consumed_samples"]), int(run["state"]["step"])


STAGE_MAY_CHANGE = (
    "rotary_base",
    "rope_scaling_factor",
    "rope_low_freq_factor",
    "rope_high_freq_factor",
    "rope_original_max_position_embeddings",
    "max_position_embeddings",
)
"""Fields of the model without weights of their own, which may change where a stage begins."""


def check_same_model(path: Path, model: ModelConfig, stage_begins: bool = False) -> list[str]:
    """Refuse a checkpoint of another architecture, naming every field that differs.

    ``stage_begins``: positions (:data:`STAGE_MAY_CHANGE`) may differ, as at the begin of a stage or of a run;
    the differences are returned, to be told and recorded.
    """
    stored = folders.read_run(path)["model"]
    differing = {
        name: f"{name}: checkpoint {stored.get(name)!r}, configuration {value!r}"
        for name, value in asdict(model).items()
        if name not in ("hf_path", "preset") and stored.get(name) != value
    }
    allowed = [text for name, text in differing.items() if name in STAGE_MAY_CHANGE]
    if not differing or (stage_begins and len(allowed) == len(differing)):
        return allowed
    hint = ""
    if allowed and not stage_begins:
        hint = " (a new stage may change rotary_base and max_position_embeddings: data.stages[])"
    raise ConfigError(
        f"{path} holds another model: {'; '.join(differing.values())}{hint}. Restore the model section, or start a "
        "new run_dir with other weights"
    )
