"""The folder for the hub: weights, tokenizer, configuration, licence, model card, certificate, SHA256SUMS.

    plan = plan_release(Path("runs/syne"), name="Llama-3-SynE", base_model="meta-llama/Meta-Llama-3-8B")
    publish(plan, Path("release"))

The weights go the way of every conversion; what is added are documents, the search of all text for keys and
for paths of this machine, and the sums. The folder appears whole or not at all, and an interrupted release
resumes with the same command.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_syne.convert.certificate import CERTIFICATE, SUMS
from megatron_syne.convert.engine import convert
from megatron_syne.convert.files import BLOCK_BYTES, Progress, check_output, open_inside, quiet, sync_folder
from megatron_syne.convert.formats.detect import open_weights
from megatron_syne.convert.formats.documents import CONFIG, json_document
from megatron_syne.convert.formats.hf import DEFAULT_SHARD_SIZE, plan_hf
from megatron_syne.convert.numbers import SHORT_NAMES
from megatron_syne.convert.streams import StoredWeights, Target
from megatron_syne.errors import CannotCreate, ConfigError, DataError, MissingInput, SecurityRefusal
from megatron_syne.models.json_file import parse_json, read_json
from megatron_syne.release.card import CardFacts, model_card
from megatron_syne.release.licences import LICENCE_FILES, broken_terms, choose, with_notice
from megatron_syne.release.private import find_private
from megatron_syne.release.run_facts import locate, read_run

CARD = "README.md"

# Where transformers notes the folder that a file was loaded from; nothing reads them.
_LOCAL_KEYS = ("_name_or_path", "name_or_path", "special_tokens_map_file", "tokenizer_file", "vocab_file")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_LANGUAGE = re.compile(r"[a-z]{2,3}")


@dataclass
class ReleasePlan:
    """A release before its first byte: for ``engine.estimate`` and :func:`publish`."""

    weights: StoredWeights
    target: Target
    warnings: list[str] = field(default_factory=list)
    """Terms of the licence that were set aside with ``own_terms``."""


def plan_release(
    source: Path,
    *,
    name: str,
    base_model: str | None = None,
    licence: str | None = None,
    licence_file: Path | None = None,
    own_terms: bool = False,
    languages: tuple[str, ...] = (),
    evaluation: Path | None = None,
    dtype: str | None = "bf16",
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
    tokenizer_dir: Path | None = None,
    hf_config: Path | None = None,
) -> ReleasePlan:
    """What a release of a run folder, of one of its checkpoints, or of any weights will hold.

    ``name``: of the model, without the organisation. ``licence``: the hub's identifier (``llama3``,
    ``apache-2.0``); not given = told from the licence's text or from ``base_model``, a hub id.
    ``licence_file``: its text, where the weights come without. ``own_terms``: the licensor gave you others, so
    what the licence asks for is told as a warning only. ``evaluation``: JSON ``{task: {metric: value}}``.
    ``dtype``: ``bf16``, ``fp16``, ``fp32``; None keeps each tensor's.
    Raises ConfigError (all options at once), SecurityRefusal (keys and local paths, each with file and line),
    and what opening the weights raises.
    """
    scores = {} if evaluation is None else _read_evaluation(evaluation)
    folder, run_dir = locate(source)
    run = None if run_dir is None else read_run(run_dir, folder)
    weights = open_weights(folder, hf_config)
    try:
        target = plan_hf(
            weights,
            dtype=None if dtype is None else SHORT_NAMES[dtype],
            max_shard_size=max_shard_size,
            tokenizer_dir=tokenizer_dir,
        )
        documents = {file: _without_local_keys(file, content) for file, content in target.documents.items()}
        if licence_file is not None:
            documents = {n: c for n, c in documents.items() if n not in LICENCE_FILES}
            documents[LICENCE_FILES[0]] = _read_text(licence_file)
        chosen, contradictions = choose(licence, base_model, documents)
        terms = broken_terms(chosen, name, documents)
        problems = [*_option_problems(name, languages), *contradictions, *([] if own_terms else terms)]
        if problems:
            more = (
                "; if the licensor gave you other terms, say so (--own-terms)"
                if terms and not own_terms
                else ""
            )
            raise ConfigError("; ".join(problems) + more)
        documents = with_notice(chosen, documents)
        card = CardFacts(
            name=name,
            model=weights.model,
            parameters=sum(math.prod(shape) for shape in weights.shapes.values()),
            dtype=json.loads(documents[CONFIG])["dtype"],
            licence=chosen,
            licence_file=next((file for file in LICENCE_FILES if file in documents), None),
            base_model=base_model,
            languages=languages,
            source=weights.describe(),
            run=run,
            evaluation=scores,
        )
        documents[CARD] = model_card(card).encode()
        described = json_document(weights.describe())  # will stand in the certificate: better told now
        _refuse_private({**documents, CERTIFICATE: described})
        target.documents = documents
    except BaseException:
        weights.close()
        raise
    return ReleasePlan(weights, target, terms)


def publish(
    plan: ReleasePlan, out: Path, *, overwrite: bool = False, jobs: int = 0, progress: Progress = quiet
) -> dict[str, Any]:
    """Write a planned release; its certificate. Closes the weights.

    It is put together in ``.NAME.release`` beside ``out``. Raises CannotCreate, IOFault, DataError as
    ``engine.convert``, and SecurityRefusal where the certificate would tell of this machine.
    """
    final = check_output(out, plan.weights.folder, overwrite, (CONFIG, CERTIFICATE))
    work = final.with_name(f".{final.name}.release")
    made = work / final.name
    try:
        work.mkdir(exist_ok=True)
        lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise CannotCreate(f"{final}: cannot be made: {error.strerror} ({final.parent})") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise CannotCreate(f"{final}: another process is making this release; wait for it") from None
    try:
        certificate: dict[str, Any] = convert(
            plan.weights,
            plan.target,
            made,
            overwrite=True,  # of an earlier release that was killed at its very end
            jobs=jobs,
            progress=progress,
        )
        try:
            _refuse_private({CERTIFICATE: (made / CERTIFICATE).read_bytes()})
        except SecurityRefusal:
            shutil.rmtree(made)
            raise
        write_sums(made)
        _take_place(made, final)
    finally:
        plan.weights.close()
        if not any(work.iterdir()):  # what the engine keeps to resume from stays
            work.rmdir()
        os.close(lock)
    return certificate


def write_sums(folder: Path) -> None:
    """Write ``SHA256SUMS`` over all other files of a folder, as ``sha256sum -c`` reads it. Memory: one block
    a thread."""
    names = sorted(
        p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != SUMS
    )
    with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as pool:
        sums = pool.map(lambda name: _sha256(folder, name), names)
        lines = [f"{digest}  {name}\n" for name, digest in zip(names, sums, strict=True)]
    with (folder / SUMS).open("w", encoding="utf-8") as stream:
        stream.writelines(lines)
        stream.flush()
        os.fsync(stream.fileno())
    sync_folder(folder)


def _sha256(folder: Path, name: str) -> str:
    digest = hashlib.sha256()
    with os.fdopen(open_inside(folder, *name.split("/")), "rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _take_place(made: Path, final: Path) -> None:
    """Give the finished folder its name; one that stood there goes only then."""
    old = made.with_name(f"{made.name}.old")
    shutil.rmtree(old, ignore_errors=True)  # of a release killed right here
    try:
        if os.path.lexists(final):
            os.rename(final, old)
        os.rename(made, final)
    except OSError as error:
        raise CannotCreate(f"{final}: cannot be made: {error.strerror}") from None
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _option_problems(name: str, languages: tuple[str, ...]) -> list[str]:
    problems = []
    if not _NAME.fullmatch(name):
        problems.append(
            f"name: {name!r}: expected letters, digits, '-', '_' and '.', at most 96, as the hub takes them, "
            f"without the organisation"
        )
    problems += [
        f"language: {code!r}: expected a code of ISO 639, for example en or zh"
        for code in languages
        if not _LANGUAGE.fullmatch(code)
    ]
    return problems


def _without_local_keys(name: str, content: bytes) -> bytes:
    """A JSON document without the keys that hold where it was loaded from; any other unchanged."""
    if name not in (CONFIG, "generation_config.json", "tokenizer_config.json"):
        return content
    values = parse_json(content, name)
    kept = {key: value for key, value in values.items() if key not in _LOCAL_KEYS}
    return content if len(kept) == len(values) else json_document(kept)


def _refuse_private(documents: Mapping[str, bytes]) -> None:
    found = [line for name, content in sorted(documents.items()) for line in find_private(name, content)]
    if found:
        shown = [*found[:50], *([f"... and {len(found) - 50} more"] if len(found) > 50 else [])]
        raise SecurityRefusal(
            "\n  ".join([f"not to be published ({len(found)}); remove it from the source's files:", *shown])
        )


def _read_evaluation(path: Path) -> dict[str, dict[str, Any]]:
    scores = read_json(path)
    if scores.get("format") == "megatron_syne.evaluation":  # as megatron_syne.evaluation writes it
        measured = scores["results"].items()
        scores = {task: {name: v for name, v in row.items() if v is not None} for task, row in measured}
    for task, metrics in scores.items():
        good = isinstance(metrics, dict) and bool(metrics)
        if not good or not all(isinstance(value, str | int | float) for value in metrics.values()):
            raise DataError(
                f"{path}: {task}: expected an object of metric to number, {{task: {{metric: value}}}}"
            )
    return scores


def _read_text(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MissingInput(f"{path}: {error.strerror}") from None
