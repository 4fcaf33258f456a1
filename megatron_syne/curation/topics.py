"""``label-topics``: train a topic classifier for each language, label documents with it, split them by a field.

    curate_data.py label-topics train --input labelled.jsonl --label-key topic --model topics_model
    curate_data.py label-topics apply --model topics_model --input web.jsonl.gz --output web_labelled.jsonl.gz
    curate_data.py label-topics apply --model topics_model --input web/ --split-by language topic --output-dir by_topic
    curate_data.py label-topics split --input web_labelled.jsonl.gz --split-by topic --output-dir by_topic

The topics are those of the labels (Llama-3-SynE: eleven English ones after MMLU, eleven Chinese after CMMLU). A
document's language is told by its script, or stands in the field ``--language-key``.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterator

from megatron_syne.curation.labelling import OTHER, label_all, load_labeller
from megatron_syne.curation.records import (
    Documents,
    Record,
    Source,
    add_output_arguments,
    add_reading_arguments,
    line_of,
    name_in,
    refuse_present,
)
from megatron_syne.curation.topic_training import language_in, train
from megatron_syne.data.documents.atomic import Outputs
from megatron_syne.data.documents.jsonl import text_in
from megatron_syne.errors import ConfigError

MAX_CHARS = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The three actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True)
    one = actions.add_parser("train", help="make a classifier for each language from labelled documents")
    add_reading_arguments(one)
    one.add_argument("--model", required=True, metavar="FOLDER", help="the classifiers are written here")
    one.add_argument("--label-key", default="topic", help="field with the topic (topic)")
    _add_text_arguments(one)
    one.add_argument("--held-out", type=float, default=0.1, help="share of each topic to score on (0.1)")
    one.add_argument("--seed", type=int, default=1234, help="of the choice of these, and of an encoder")
    one.add_argument(
        "--max-chars", type=int, default=MAX_CHARS,
        help=f"the first characters of a document, by which it is judged ({MAX_CHARS})",
    )  # fmt: skip
    one.add_argument(
        "--encoder", action="append", default=[], metavar="[LANGUAGE=]FOLDER",
        help="fine-tune this Hugging Face encoder (safetensors) instead of the linear classifier",
    )  # fmt: skip
    one.add_argument("--epochs", type=int, default=3, help="of fine-tuning an encoder (3)")
    one.add_argument("--learning-rate", type=float, default=5e-5, help="of fine-tuning an encoder (5e-5)")
    one.add_argument("--device", default="cpu", help="of the encoder, as torch names it (cpu)")

    one = actions.add_parser("apply", help="write the topic and its probability to each document")
    add_reading_arguments(one)
    add_output_arguments(one)
    one.add_argument("--model", required=True, metavar="FOLDER", help="made by label-topics train")
    one.add_argument(
        "--topic-key", default="topic", help="field to add; KEY_probability is added too (topic)"
    )
    _add_text_arguments(one)
    one.add_argument(
        "--min-confidence", type=float, default=0.0, help=f'below this probability the topic is "{OTHER}" (0)'
    )
    one.add_argument("--workers", type=int, default=1, help="processes (1); same output for any number")
    one.add_argument("--device", default="cpu", help="of an encoder, as torch names it (cpu)")

    one = actions.add_parser("split", help="one file for each value of a field")
    add_reading_arguments(one)
    add_output_arguments(one)


def _add_text_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text-key", default="text", help="field with the text (text)")
    parser.add_argument("--language-key", help="field with the language; not given = told by the script")


def run(options: argparse.Namespace) -> int:
    """Do what the options say; raises ConfigError, MissingInput, DataError, CannotCreate."""
    _check(options)
    return {"train": train, "apply": apply, "split": split}[options.action](options)


def _check(options: argparse.Namespace) -> None:
    wrong = []
    if options.action == "train":
        if not 0 < options.held_out <= 0.5:
            wrong.append(f"--held-out: must lie between 0 and 0.5, found {options.held_out}")
        if options.max_chars < 1 or options.epochs < 1:
            wrong.append("--max-chars, --epochs: must be at least 1")
        if not 0 < options.learning_rate < 1:
            wrong.append(f"--learning-rate: must lie between 0 and 1, found {options.learning_rate}")
    elif options.action == "apply":
        if not 0 <= options.min_confidence <= 1:
            wrong.append(f"--min-confidence: must lie between 0 and 1, found {options.min_confidence}")
        if options.workers < 1:
            wrong.append(f"--workers: must be at least 1, found {options.workers}")
    if wrong:
        raise ConfigError("; ".join(wrong))


def apply(options: argparse.Namespace) -> int:
    """``label-topics apply``: the document as it was, and its topic."""
    labeller = load_labeller(options.model, options.device)
    language_key = options.language_key or labeller.language_key
    topic, probability, told = (
        options.topic_key,
        f"{options.topic_key}_probability",
        f"{options.topic_key}_language",
    )
    added = [topic, probability] + ([told] if language_key is None else [])
    splits = options.split_by or ([topic] if options.output_dir else [])
    begin = time.monotonic()
    with Outputs(overwrite=options.overwrite) as outputs:
        documents = Documents(outputs, options)
        source = Source(options, documents.quarantine)
        counts: Counter[tuple[str, str]] = Counter()

        def extract(record: Record) -> tuple[str, str]:
            text = text_in(record.fields, options.text_key, record.line)
            refuse_present(record, added, "--topic-key")
            for key in splits:
                if key not in added:
                    name_in(record, key)
            return text[: labeller.max_chars], language_in(record, text, language_key)

        def jobs() -> Iterator[tuple[list[Record], list[str], list[str]]]:
            for chunk in source.chunks(extract):
                texts = [text for _, (text, _) in chunk]
                yield [record for record, _ in chunk], texts, [language for _, (_, language) in chunk]

        for (records, _, languages), labels in label_all(jobs(), labeller, options):
            for record, language, label in zip(records, languages, labels, strict=True):
                name = label.topic if label.probability >= options.min_confidence else OTHER
                values = {topic: name, probability: label.probability, told: language}
                fields = {key: values[key] for key in added}
                group = tuple(str(values[key]) if key in added else name_in(record, key) for key in splits)
                documents.write(line_of(record, fields), group)
                source.tally.written += 1
                counts[language, name] += 1
        report = {
            "model": {"folder": str(options.model), "sha256": labeller.sha256},
            "min_confidence": options.min_confidence,
            "topics": [
                {"language": language, "topic": name, "documents": number}
                for (language, name), number in sorted(counts.items())
            ],
        }
        documents.publish(source, report)
    seconds = time.monotonic() - begin
    for (language, name), number in sorted(counts.items()):
        print(f"  {language:8} {number:12,}  {100 * number / max(source.tally.written, 1):5.1f} %  {name}")
    print(
        f"{source.tally.describe()}; judged by their first {labeller.max_chars:,} characters, "
        f"{source.tally.lines / max(seconds, 1e-9):,.0f} documents/s",
        flush=True,
    )
    return 0


def split(options: argparse.Namespace) -> int:
    """``label-topics split``: each document, unchanged, to the file of its group."""
    if not options.output_dir or not options.split_by:
        raise ConfigError("label-topics split: give --split-by FIELD and --output-dir FOLDER")
    with Outputs(overwrite=options.overwrite) as outputs:
        documents = Documents(outputs, options)
        source = Source(options, documents.quarantine)
        for chunk in source.chunks(lambda record: tuple(name_in(record, key) for key in options.split_by)):
            for record, group in chunk:
                documents.write(line_of(record, {}), group)
                source.tally.written += 1
        documents.publish(source, {"split_by": options.split_by})
    for one in documents.files:
        print(f"  {one['documents']:12,}  {one['file']}")
    print(source.tally.describe(), flush=True)
    return 0
