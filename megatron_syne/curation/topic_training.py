"""Labelled documents to a folder of classifiers, with their scores on labels held out."""

from __future__ import annotations

import argparse
import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_syne.curation import topic_scores
from megatron_syne.curation.labelling import (
    ENCODER,
    FORMAT,
    LANGUAGE_NAME,
    LINEAR,
    VERSION,
    Classifier,
)
from megatron_syne.curation.languages import CHINESE, UNKNOWN, language_of
from megatron_syne.curation.records import Record, Source, name_in, write_report
from megatron_syne.curation.topic_features import CHARACTERS, WORDS
from megatron_syne.curation.topic_model import train_linear
from megatron_syne.data.documents.atomic import Outputs
from megatron_syne.data.documents.jsonl import BadLine, text_in
from megatron_syne.errors import ConfigError, DataError


class Labelled(NamedTuple):
    """One labelled text, cut to the characters that count."""

    text: str
    topic: str
    language: str


def language_in(record: Record, text: str, key: str | None) -> str:
    """The language of a record: its field ``key``, or by script; raises BadLine for no name of a language."""
    if key is None:
        return language_of(text)
    name = name_in(record, key)
    if not LANGUAGE_NAME.fullmatch(name):
        reason = (
            f"field {key!r} must name a language in at most 16 Latin letters and digits, found {name[:20]!r}"
        )
        raise BadLine(reason, record.line.offset)
    return name


def train(options: argparse.Namespace) -> int:
    """``label-topics train``: read, split, fit, score, write. Nothing is written where any of it fails."""
    folder = Path(options.model)
    with Outputs(overwrite=options.overwrite) as outputs:
        seal = outputs.create(folder / "model.json", seal=True)
        readable = outputs.create(folder / "report.txt")
        source = Source(options, outputs.create(folder / "quarantine.jsonl", optional=True))
        parts = _split(_read(source, options), options.held_out, options.seed)
        encoders = _encoders(options.encoder, parts)
        described: dict[str, Any] = {}
        text = []
        for language, (fitted, held_out) in parts.items():
            texts, topics = [one.text for one in fitted], [one.topic for one in fitted]
            model: Classifier
            if language in encoders:
                from megatron_syne.curation.encoder import train_encoder

                model = train_encoder(encoders[language], texts, topics, options)
                described[language] = {"kind": ENCODER, "encoder": encoders[language]}
                files = {f"{language}.encoder/{name}": data for name, data in model.files().items()}
            else:
                units = _units(texts)
                model = train_linear(texts, topics, units, options.max_chars)
                described[language] = {"kind": LINEAR, "units": units}
                files = {f"{language}.{name}.npy": data for name, data in model.files().items()}
            for name, data in files.items():
                outputs.create(folder / name).write(data)
            found = model.probabilities([one.text for one in held_out]).argmax(axis=1)
            scores = topic_scores.score(
                model.topics, [one.topic for one in held_out], [model.topics[i] for i in found]
            )
            described[language] |= {
                "topics": list(model.topics),
                "trained_on": len(fitted),
                "held_out": scores,
                "sha256": {Path(name).name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
            }
            text.append(topic_scores.describe(language, scores))
        readable.write(("\n\n".join(text) + "\n").encode("utf-8"))
        named = ("label_key", "text_key", "held_out", "seed", "epochs", "learning_rate")
        write_report(
            seal,
            {
                "format": FORMAT,
                "version": VERSION,
                "max_chars": options.max_chars,
                "language_key": options.language_key,
                "languages": described,
                "options": {name: getattr(options, name) for name in named},
                "counts": source.tally.to_dict(),
                "inputs": source.files,
            },
        )
        outputs.publish()
    print("\n\n".join(text))
    print(f"{folder}: {source.tally.describe()}", flush=True)
    return 0


def _read(source: Source, options: argparse.Namespace) -> dict[str, list[Labelled]]:
    """Distinct labelled texts by language, in an order that the order of the files does not touch."""
    seen: dict[bytes, tuple[str, str]] = {}
    found: dict[str, list[tuple[bytes, Labelled]]] = defaultdict(list)

    def extract(record: Record) -> tuple[bytes, Labelled] | None:
        text = text_in(record.fields, options.text_key, record.line)
        topic = name_in(record, options.label_key)
        if not text.strip():
            raise BadLine(f"field {options.text_key!r} is empty", record.line.offset)
        cut = text[: options.max_chars]
        digest = hashlib.sha256(f"{options.seed}\0{cut}".encode()).digest()
        where = f"{record.path}:{record.line.number}"
        if digest in seen:
            before, place = seen[digest]
            if before != topic:
                reason = f"the same text has the topic {before!r} at {place}, and {topic!r} here"
                raise BadLine(reason, record.line.offset)
            return None
        seen[digest] = topic, where
        return digest, Labelled(cut, topic, language_in(record, text, options.language_key))

    for chunk in source.chunks(extract):
        for _, one in chunk:
            if one is None:
                source.tally.drop("repeated")
            elif one[1].language == UNKNOWN:
                source.tally.drop("unknown language")
            else:
                source.tally.written += 1
                found[one[1].language].append(one)
    return {language: [one for _, one in sorted(found[language])] for language in sorted(found)}


def _split(
    labelled: dict[str, list[Labelled]], fraction: float, seed: int
) -> dict[str, tuple[list[Labelled], list[Labelled]]]:
    """(to fit, held out) by language: of each topic the first by hash of seed and text, one at least."""
    parts, lacking = {}, []
    for language, documents in labelled.items():
        by_topic: dict[str, list[Labelled]] = defaultdict(list)
        for one in documents:
            by_topic[one.topic].append(one)
        lacking += [f"{language}: {topic!r} has 1" for topic, ones in by_topic.items() if len(ones) < 2]
        if len(by_topic) < 2:
            lacking.append(f"{language}: only the topic {next(iter(by_topic))!r}")
        kept_out = {topic: max(1, int(fraction * len(ones))) for topic, ones in by_topic.items()}
        held_out = [one for topic, ones in by_topic.items() for one in ones[: kept_out[topic]]]
        fitted = [one for topic, ones in by_topic.items() for one in ones[kept_out[topic] :]]
        parts[language] = fitted, held_out
    if lacking or not parts:
        raise DataError(
            "a classifier needs two topics for each language and two different texts for each topic: "
            + ("; ".join(lacking[:20]) or "no labelled text was found")
        )
    return parts


def _units(texts: Sequence[str]) -> str:
    """Characters where most texts are Chinese, whatever the data call the language; else words."""
    chinese = sum(language_of(text) == CHINESE for text in texts)
    return CHARACTERS if 2 * chinese > len(texts) else WORDS


def _encoders(given: Sequence[str], languages: Any) -> dict[str, str]:
    """Language -> folder of its encoder, from ``FOLDER`` (all languages) or ``LANGUAGE=FOLDER``."""
    found: dict[str, str] = {}
    for one in given:
        language, equals, folder = one.partition("=")
        if equals and LANGUAGE_NAME.fullmatch(language):
            if language not in languages:
                raise ConfigError(
                    f"--encoder {one}: no labelled text in {language}; found: {', '.join(languages)}"
                )
            found[language] = folder
        else:
            found |= {language: one for language in languages if language not in found}
    return found
