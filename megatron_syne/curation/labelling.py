"""A folder of topic classifiers, one for each language, and documents labelled with it by several processes."""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_syne.curation.topic_model import load_linear
from megatron_syne.errors import DataError, IOFault, MissingInput

FORMAT, VERSION = "megatron_syne topic model", 1
LINEAR, ENCODER = "linear", "encoder"
OTHER = "other"
LANGUAGE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,15}")
_AHEAD = 3

Job = TypeVar("Job")


class Classifier(Protocol):
    """What labels the texts of one language."""

    @property
    def topics(self) -> tuple[str, ...]:
        """Names of the columns."""
        ...

    def probabilities(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """[texts, topics], rows summing to 1."""
        ...

    def files(self) -> dict[str, bytes]:
        """What is stored of it, by name."""
        ...


class Label(NamedTuple):
    """The likeliest topic and its probability; ``other`` and 0 in a language without a classifier."""

    topic: str
    probability: float


@dataclass(frozen=True)
class Labeller:
    """The classifiers of a folder that ``label-topics train`` made."""

    classifiers: dict[str, Classifier]
    max_chars: int
    language_key: str | None
    sha256: str
    """Of ``model.json``, which has the hashes of all other files."""

    def label(self, texts: Sequence[str], languages: Sequence[str]) -> list[Label]:
        """A label for each text."""
        labels = [Label(OTHER, 0.0)] * len(texts)
        for language, classifier in self.classifiers.items():
            places = [place for place, name in enumerate(languages) if name == language]
            probabilities = classifier.probabilities([texts[place] for place in places])
            best = probabilities.argmax(axis=1)
            for place, topic, row in zip(places, best, probabilities, strict=True):
                labels[place] = Label(classifier.topics[topic], round(float(row[topic]), 4))
        return labels


def load_labeller(folder: str | Path, device: str = "cpu") -> Labeller:
    """Read a model folder; MissingInput or DataError where it is none, or not what its ``model.json`` says."""
    folder = Path(folder)
    path = folder / "model.json"
    try:
        data = path.read_bytes()
        described = json.loads(data)
    except FileNotFoundError:
        raise MissingInput(f"{path}: no such file; make one with label-topics train") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        raise DataError(f"{path}: is no topic model")
    if described.get("version") != VERSION:
        raise DataError(f"{path}: version {described.get('version')!r}, this program reads {VERSION}")
    max_chars, languages = described.get("max_chars"), described.get("languages")
    if not isinstance(max_chars, int) or max_chars < 1 or not isinstance(languages, dict) or not languages:
        raise DataError(f"{path}: max_chars must be a number of characters, languages name at least one")
    classifiers: dict[str, Classifier] = {}
    for language, one in languages.items():
        if not LANGUAGE_NAME.fullmatch(language) or not isinstance(one, dict):
            raise DataError(f"{path}: {language[:20]!r} is no name of a language")
        if one.get("kind") == ENCODER:
            from megatron_syne.curation.encoder import load_encoder

            classifiers[language] = load_encoder(folder / f"{language}.encoder", one, max_chars, device)
        elif one.get("kind") == LINEAR:
            classifiers[language] = load_linear(folder, language, one, max_chars)
        else:
            raise DataError(f"{path}: {language}: kind must be {LINEAR} or {ENCODER}")
    digest = hashlib.sha256(data).hexdigest()
    return Labeller(classifiers, max_chars, described.get("language_key"), digest)


def label_all(
    jobs: Iterable[tuple[Job, Sequence[str], Sequence[str]]], labeller: Labeller, options: argparse.Namespace
) -> Iterator[tuple[tuple[Job, Sequence[str], Sequence[str]], list[Label]]]:
    """Each job (what the caller likes, texts, languages) and its labels, in order.

    By ``options.workers`` processes; the labels are the same for any number.
    """
    workers = options.workers
    if workers == 1:
        for job in jobs:
            yield job, labeller.label(job[1], job[2])
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(str(options.model), options.device)
    )
    waiting: deque[tuple[tuple[Job, Sequence[str], Sequence[str]], Future[list[Label]]]] = deque()
    try:
        for job in jobs:
            waiting.append((job, pool.submit(_label_in_worker, job[1], job[2])))
            if len(waiting) >= _AHEAD * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    except BrokenProcessPool:
        raise IOFault(
            "a labelling process died (out of memory?); start again, with fewer --workers if it repeats"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_label: Callable[[Sequence[str], Sequence[str]], list[Label]] | None = None


def _start_worker(folder: str, device: str) -> None:
    global _label
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers for ctrl-C
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _label = load_labeller(folder, device).label


def _leave_with_parent() -> None:
    """A parent that is killed outright cannot stop its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _label_in_worker(texts: Sequence[str], languages: Sequence[str]) -> list[Label]:
    assert _label is not None
    return _label(texts, languages)
