"""Folders of Megatron's checkpoints: which iteration is meant, and of which model it is.

A folder given may be the checkpoint itself or what holds several, as Megatron-LM, Megatron-Bridge and our own
runs lay them out: ``iter_0000100`` or ``release`` below it, and the newest one's number in a small text file.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from megatron_syne.config.schema import ModelConfig
from megatron_syne.convert.files import exists_inside, open_inside, read_json_inside
from megatron_syne.convert.formats.documents import CONFIG, HF_FOLDER, check_artifacts
from megatron_syne.errors import ConfigError, DataError, MissingInput
from megatron_syne.models.config import model_differences
from megatron_syne.models.family import completed
from megatron_syne.models.hf_config import model_config_from_hf

TRACKER = "latest_checkpointed_iteration.txt"
_ITERATION = re.compile(r"iter_\d+")
_OTHER_FILES = 256
"""Descriptors that the rest of the process may need."""


def checkpoint_folder(folder: Path, is_checkpoint: Callable[[Path], bool]) -> Path:
    """The checkpoint that ``folder`` is or holds: the one that Megatron-LM's tracker file names, else the one
    with the highest iteration. Raises MissingInput, DataError."""
    if not folder.is_dir():
        raise MissingInput(f"{folder}: no such folder; expected a checkpoint of Megatron's")
    if is_checkpoint(folder):
        return folder
    if exists_inside(folder, TRACKER):
        with os.fdopen(open_inside(folder, TRACKER), "rb") as stream:
            text = stream.read(100).decode("ascii", "replace").strip()
        if text != "release" and not (text.isdigit() and len(text) < 20):
            raise DataError(
                f"{folder / TRACKER}: expected an iteration's number or 'release', found {text!r}"
            )
        found = folder / (text if text == "release" else f"iter_{int(text):07d}")
        if not is_checkpoint(found):
            raise MissingInput(f"{found}: holds no checkpoint, though {folder / TRACKER} names it")
        return found
    iterations = sorted(
        (int(entry.name[5:]), entry.name) for entry in folder.iterdir() if _ITERATION.fullmatch(entry.name)
    )
    for _, name in reversed(iterations):
        if is_checkpoint(folder / name):
            return folder / name
    raise MissingInput(f"{folder}: holds no checkpoint, nor does an iter_* folder below it")


def model_of(folder: Path, hf_config: Path | None) -> tuple[ModelConfig, dict[str, Any], Path]:
    """(model, contents of ``config.json``, folder with it and the tokenizer) of a checkpoint.

    The configuration is the checkpoint's own, ``hf/config.json``; where it has none, that of ``hf_config``.
    Raises MissingInput that says what to give, ConfigError for two, DataError, SecurityRefusal.
    """
    own = folder / HF_FOLDER
    if exists_inside(folder, HF_FOLDER) and exists_inside(own, CONFIG):
        if hf_config is not None:
            raise ConfigError(
                f"{folder}: has {HF_FOLDER}/{CONFIG} of its own; leave out the other one ({hf_config})"
            )
        home = own
    elif hf_config is not None:
        home = hf_config
    else:
        raise MissingInput(
            f"{folder}: does not say of which model it is (no {HF_FOLDER}/{CONFIG}). Give the folder with the "
            f"Hugging Face {CONFIG} of the model (and its tokenizer) by --hf-config"
        )
    config = read_json_inside(home, CONFIG)
    model = model_config_from_hf(config, str(home / CONFIG))
    check_artifacts(home, model)
    return model, config, home


def same_model(model: ModelConfig, stated: Any, where: str) -> ModelConfig:
    """The model with the padding rule that a checkpoint states beside its fields. Raises DataError where it
    states another model."""
    if not isinstance(stated, dict):
        raise DataError(f"{where}: model: expected an object")
    unknown = sorted(set(stated) - {field.name for field in fields(ModelConfig)})
    if unknown:
        raise DataError(f"{where}: model: unknown fields {', '.join(unknown)}")
    theirs = completed(ModelConfig(**stated))
    different = model_differences(theirs, model)
    if different:
        raise DataError(f"{where}: model disagrees with {HF_FOLDER}/{CONFIG}: {'; '.join(different)}")
    multiple = theirs.make_vocab_size_divisible_by
    if type(multiple) is not int or multiple < 1:
        raise DataError(
            f"{where}: model.make_vocab_size_divisible_by: {multiple!r} must be a whole number from 1 on"
        )
    return replace(model, make_vocab_size_divisible_by=multiple)


def open_files(folder: Path, names: Iterable[str]) -> dict[str, int]:
    """Descriptors of files below ``folder``, by their names (with ``/``). Raises as ``files.open_inside``.

    A checkpoint of a thousand ranks has more files than a process may open by default, so the soft limit is
    raised as far as needed and allowed.
    """
    wanted = sorted(names)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(wanted) + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and needed > soft:
        raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
    found: dict[str, int] = {}
    try:
        for name in wanted:
            found[name] = open_inside(folder, *name.split("/"))
    except BaseException:
        close_files(found)
        raise
    return found


def close_files(descriptors: dict[str, int]) -> None:
    """Close what :func:`open_files` opened."""
    for descriptor in descriptors.values():
        os.close(descriptor)
