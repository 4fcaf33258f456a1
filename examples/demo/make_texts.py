"""Makes the texts of the demo: ``texts/<source>.train.jsonl`` and ``texts/<source>.valid.jsonl``.

    python examples/demo/make_texts.py              # all six sources (Python 3.11.7 made the shipped ones)
    python examples/demo/make_texts.py zh_web synth_qa

``en_web`` and ``en_code`` come out of the Python installation and differ between its versions, so the files are
shipped. The other four are written from ``handwritten/`` with a fixed seed: any Python 3.11+ makes the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import stdlib_texts
from phrasebook import Template, Writer, read_tables, read_templates

HERE = Path(__file__).resolve().parent
SEED = 20240726
VALID_BYTES = 50_000
CODE_BUCKETS = range(16)  # of 100: these modules give programs, the others prose
TARGETS = {  # bytes of JSONL, training and validation together; the limit of what is found for en_web
    "en_web": 2_050_000,
    "en_code": 1_250_000,
    "en_math": 550_000,
    "zh_web": 650_000,
    "zh_book": 350_000,
    "synth_qa": 650_000,
}


class Unit(NamedTuple):
    """A text with its origin: a document holds texts of one topic, each from another template."""

    topic: str
    template: str
    text: str


def line(text: str, source: str) -> str:
    """One line of JSONL."""
    return json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n"


def written(templates: list[Template], writer: Writer, size: int, dress: Callable[[str], str]) -> list[Unit]:
    """Different texts, the same number of every template, of ``size`` bytes of JSONL in all.

    A template that has nothing new to say 40 times in a row has told all it knows and is left out from there.
    """
    units: list[Unit] = []
    seen: set[str] = set()
    misses = dict.fromkeys([template.name for template in templates], 0)
    total = 0
    while total < size:
        alive = [template for template in templates if misses[template.name] < 40]
        if not alive:
            raise SystemExit(f"the templates are exhausted after {total} of {size} bytes: write more of them")
        for template in alive:
            text = dress(writer.write(template))
            if text in seen:
                misses[template.name] += 1
                continue
            misses[template.name] = 0
            seen.add(text)
            units.append(Unit(template.tags[0] if template.tags else "", template.name, text))
            total += len(json.dumps(text, ensure_ascii=False).encode())
    return units


def grouped(units: list[Unit], rng: random.Random, low: int, high: int, title: str = "") -> list[str]:
    """Documents of ``low`` to ``high`` texts of one topic and different templates, under ``title``, shuffled."""
    rng.shuffle(units)
    open_documents: dict[str, list[tuple[int, list[Unit]]]] = {}  # by topic: (wanted length, texts so far)
    documents: list[str] = []

    def close(topic: str, texts: list[Unit]) -> None:
        heading = [title + topic.replace("-", " ")] if title else []
        documents.append("\n\n".join(heading + [unit.text for unit in texts]))

    for unit in units:
        waiting = open_documents.setdefault(unit.topic, [])
        for entry in waiting:
            if all(unit.template != other.template for other in entry[1]):
                break
        else:
            entry = (rng.randint(low, high), [])
            waiting.append(entry)
        wanted, texts = entry
        texts.append(unit)
        if len(texts) == wanted:
            waiting.remove(entry)
            close(unit.topic, texts)
    for topic, waiting in open_documents.items():
        for _, texts in waiting:
            close(topic, texts)
    rng.shuffle(documents)
    return documents


def asked(question: str, answer: str) -> Callable[[str], str]:
    """Puts ``question`` before the first paragraph and ``answer`` before the rest."""

    def dress(text: str) -> str:
        first, _, rest = text.partition("\n\n")
        return f"{question}{first}\n{answer}{rest}"

    return dress


def unchanged(text: str) -> str:
    """The text itself."""
    return text


def phrasebook(templates: str, tables: str, join: str, rng: random.Random) -> tuple[list[Template], Writer]:
    """Templates of a file of ``handwritten/`` and the writer for them."""
    folder = HERE / "handwritten"
    return read_templates(folder / templates), Writer(read_tables(folder / tables), rng, join)


def generated(source: str, size: int) -> list[str]:
    """All documents of one of the four generated sources."""
    rng = random.Random(f"{SEED} {source}")
    match source:
        case "zh_web":
            units = written(*phrasebook("zh_web.txt", "zh_tables.txt", "", rng), size, unchanged)
            return grouped(units, rng, 1, 3)
        case "zh_book":
            units = written(*phrasebook("zh_book.txt", "zh_tables.txt", "", rng), size, unchanged)
            return grouped(units, rng, 1, 1)
        case "en_math":
            dress = asked("Problem: ", "Answer: ")
            units = written(*phrasebook("en_math.txt", "en_tables.txt", " ", rng), size, dress)
            return grouped(units, rng, 1, 3)
        case "synth_qa":
            english = phrasebook("qa_en.txt", "en_tables.txt", " ", rng)
            chinese = phrasebook("qa_zh.txt", "qa_zh_tables.txt", "", rng)
            first = written(*english, size * 2 // 3, asked("Question: ", "Answer: "))
            second = written(*chinese, size // 3, asked("问：", "答："))
            documents = grouped(first, rng, 2, 4, "Subject: ") + grouped(second, rng, 2, 4, "学科：")
            rng.shuffle(documents)
            return documents
    raise ValueError(f"no generated source {source!r}")


def split(documents: Iterable[str], source: str) -> tuple[list[str], list[str]]:
    """(train, valid) lines of generated documents: the first ``VALID_BYTES`` are held out."""
    train: list[str] = []
    valid: list[str] = []
    held_out = 0
    for document in documents:
        text = line(document, source)
        if held_out < VALID_BYTES:
            valid.append(text)
            held_out += len(text.encode())
        else:
            train.append(text)
    return train, valid


def split_by_origin(pages: Iterator[tuple[str, str]], source: str, size: int) -> tuple[list[str], list[str]]:
    """(train, valid) lines of library texts: whole modules are held out, so that no class is in both."""
    rng = random.Random(f"{SEED} {source}")
    origins: dict[str, list[str]] = {}
    seen: set[str] = set()
    for origin, text in pages:
        if text not in seen:
            seen.add(text)
            origins.setdefault(origin, []).append(line(text, source))
    names = sorted(origins)
    rng.shuffle(names)
    train: list[str] = []
    valid: list[str] = []
    held_out = used = 0
    for name in names:
        weight = sum(len(text.encode()) for text in origins[name])
        if held_out + weight <= VALID_BYTES * 1.1 and weight <= VALID_BYTES // 4:
            valid += origins[name]
            held_out += weight
        elif used + weight <= size - VALID_BYTES:
            train += origins[name]
            used += weight
    rng.shuffle(train)
    rng.shuffle(valid)
    return train, valid


def make(source: str) -> tuple[list[str], list[str]]:
    """(train, valid) lines of one source."""
    size = TARGETS[source]
    if source == "en_web":
        return split_by_origin(stdlib_texts.web_documents(CODE_BUCKETS), source, size)
    if source == "en_code":
        return split_by_origin(stdlib_texts.code_documents(CODE_BUCKETS), source, size)
    return split(generated(source, size), source)


def write(path: Path, lines: list[str]) -> None:
    """Writes a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "sources", nargs="*", metavar="SOURCE", help=f"of {', '.join(TARGETS)}; all by default"
    )
    parser.add_argument("--out", type=Path, default=HERE / "texts", help="folder for the files")
    options = parser.parse_args()
    for source in options.sources:
        if source not in TARGETS:
            parser.error(f"no source {source!r}; there are {', '.join(TARGETS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    for source in options.sources or TARGETS:
        for part, lines in zip(("train", "valid"), make(source), strict=True):
            path = options.out / f"{source}.{part}.jsonl"
            write(path, lines)
            print(f"{path.name}: {len(lines)} documents, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
