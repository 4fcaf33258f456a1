"""A checkpoint as a Hugging Face folder, for as long as it is looked at. No torch."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_syne.convert.certificate import weights_fingerprint
from megatron_syne.convert.engine import convert
from megatron_syne.convert.formats.detect import open_weights
from megatron_syne.convert.formats.hf import plan_hf
from megatron_syne.errors import CannotCreate, MissingInput

JOBS = 2  # tensors at work at once: a training may need the rest of the machine
TOKENIZERS = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class Snapshot:
    """Weights, configuration and tokenizer that transformers can load."""

    folder: Path
    weights: str | None
    """Fingerprint of the weights, as ``verify`` prints it; None for a folder without a certificate."""


@contextmanager
def hf_snapshot(source: Path, scratch: Path) -> Iterator[Snapshot]:
    """``source`` as a Hugging Face folder below ``scratch``, removed when the block ends.

    A source that is such a folder is used where it lies. Raises MissingInput (no such source, no tokenizer),
    DataError (damaged), IOFault (not enough room on the disk), CannotCreate.
    """
    weights = open_weights(source)
    try:
        artifacts = weights.artifacts_dir
        if artifacts is None or not any((artifacts / name).is_file() for name in TOKENIZERS):
            raise MissingInput(
                f"{source}: no tokenizer lies with the weights, and without one no task can be read; train with "
                "data.tokenizer_path given, or export with tools/convert_checkpoint.py export --tokenizer FOLDER "
                "and evaluate that"
            )
        if weights.kind == "hf":
            known = weights.certificate
            yield Snapshot(source, None if known is None else weights_fingerprint(known["tensors"]))
            return
        try:
            place = Path(tempfile.mkdtemp(prefix=".snapshot-", dir=scratch))
        except OSError as error:
            raise CannotCreate(f"{scratch}: no folder can be made there: {error.strerror}") from None
        try:
            certificate = convert(weights, plan_hf(weights), place / "hf", jobs=JOBS)
            yield Snapshot(place / "hf", weights_fingerprint(certificate["tensors"]))
        finally:
            shutil.rmtree(place, ignore_errors=True)
    finally:
        weights.close()
