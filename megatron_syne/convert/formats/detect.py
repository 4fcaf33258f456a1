"""Which format a folder holds, by the files in it; and the folder opened."""

from __future__ import annotations

import os
import re
from pathlib import Path

from megatron_syne.convert.files import exists_inside, read_json_inside
from megatron_syne.convert.streams import StoredWeights
from megatron_syne.errors import ConfigError, MissingInput

_ITERATION = re.compile(r"iter_\d+|release")
_RANK = re.compile(r"mp_rank_\d+(_\d+)?(_\d+)?")
_LEGACY_WEIGHTS = "model_optim_rng.pt"
_TRACKER = "latest_checkpointed_iteration.txt"

LOOKED_FOR = (
    "config.json (Hugging Face folder), manifest.json (TP/PP shards), .metadata (torch_dist, training "
    f"checkpoint), mp_rank_*/{_LEGACY_WEIGHTS} (Megatron-LM), iter_* or {_TRACKER} (a folder of those)"
)


def open_weights(path: str | Path, hf_config: str | Path | None = None) -> StoredWeights:
    """Weights in any format, opened and checked in all but their values; with the folder's certificate.

    ``hf_config``: folder with the ``config.json`` of weights that lie without one (Megatron-LM's). Raises
    MissingInput, DataError, SecurityRefusal; ConfigError where ``hf_config`` is not wanted.
    """
    folder = Path(path)
    config = None if hf_config is None else Path(hf_config)
    kind = detect(folder)
    if config is not None and kind in ("hf", "shards"):
        raise ConfigError(f"{folder}: has a config.json of its own; leave out the other one ({config})")
    # One format's module is enough: each costs milliseconds of a short command.
    if kind == "hf":
        from megatron_syne.convert.formats.hf import open_hf

        weights = open_hf(folder)
    elif kind == "shards":
        from megatron_syne.convert.formats.shards import open_shards

        weights = open_shards(folder)
    elif kind == "torch_dist":
        from megatron_syne.convert.formats.torch_dist import open_torch_dist

        weights = open_torch_dist(folder, config)
    else:
        from megatron_syne.convert.formats.megatron_pt import open_megatron_pt

        weights = open_megatron_pt(folder, config)
    try:
        _attach_certificate(weights)
    except BaseException:
        weights.close()
        raise
    return weights


def detect(folder: Path) -> str:
    """``hf``, ``shards``, ``torch_dist`` or ``megatron_pt``. Raises MissingInput that says what was looked
    for."""
    if not folder.is_dir():
        what = "is a file; give its folder" if folder.exists() else "no such folder"
        raise MissingInput(f"{folder}: {what}; expected {LOOKED_FOR}")
    if exists_inside(folder, ".metadata"):  # before manifest.json: a training checkpoint has one too
        return "torch_dist"
    if exists_inside(folder, "manifest.json"):
        return "shards"
    try:
        names = sorted(os.listdir(folder))
    except PermissionError:
        raise MissingInput(f"{folder}: not readable by this user") from None
    if any(_RANK.fullmatch(name) and exists_inside(folder / name, _LEGACY_WEIGHTS) for name in names):
        return "megatron_pt"
    if exists_inside(folder, "config.json"):
        return "hf"
    for name in reversed(names):  # a folder of checkpoints: all are of one kind, the newest tells
        if _ITERATION.fullmatch(name) and (folder / name).is_dir():
            return "torch_dist" if exists_inside(folder / name, ".metadata") else "megatron_pt"
    raise MissingInput(f"{folder}: holds no weights in a known format; looked for {LOOKED_FOR}")


def _attach_certificate(weights: StoredWeights) -> None:
    """The certificate beside the weights, if this program wrote it; another tool's file of that name is
    left alone."""
    if not exists_inside(weights.folder, "certificate.json"):
        return
    from megatron_syne.convert.certificate import CERTIFICATE, FORMAT, read_certificate

    if read_json_inside(weights.folder, CERTIFICATE).get("format") == FORMAT:
        weights.certificate = read_certificate(weights.folder)
