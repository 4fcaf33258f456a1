"""How fast documents are labelled with topics and ordered by perplexity, in this run, on this machine.

    python benchmarks/topics.py --documents 20000 --chars 3000

Documents are made of random common words (English) and characters (Chinese) of their topics, ``--chars`` long on
average, eleven topics in each language, as Llama-3-SynE has. Rows: ``label-topics apply`` with 1 and more
processes; the n-gram counting within it, against scikit-learn's own for Chinese; ``order`` against ``sort -g`` of
GNU coreutils on the same numbers and lines. Times of commands are of whole processes, start of Python included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_syne.curation.topic_features import CHARACTERS, COLUMNS, WORDS, count_ngrams  # noqa: E402

TOOL = [sys.executable, str(ROOT / "tools" / "curate_data.py")]
TOPICS = 11
CUT = 1000


def make_text(chance: random.Random, language: str, topic: int, chars: int) -> str:
    """About ``chars`` characters, of which a fifth of the words go with the topic."""
    parts: list[str] = []
    length = 0
    while length < chars:
        own = chance.random() < 0.2
        number = 200 * topic + chance.randrange(200) if own else 2200 + int(chance.paretovariate(0.8)) % 8000
        word = chr(0x4E00 + number) if language == "zh" else f"{chr(97 + number % 26)}{number:x}"
        parts.append(word)
        length += len(word) + (language == "en")
    return ("" if language == "zh" else " ").join(parts)


def make_documents(path: Path, number: int, chars: int, seed: int) -> None:
    """JSONL: text, topic, perplexity; the languages by turns."""
    chance = random.Random(seed)
    with path.open("w", encoding="utf-8") as stream:
        for index in range(number):
            language, topic = ("en", "zh")[index % 2], index // 2 % TOPICS
            text = make_text(chance, language, topic, int(chars * chance.uniform(0.2, 1.8)))
            record = {"text": text, "label": f"{language}{topic}", "perplexity": chance.lognormvariate(2, 1)}
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def timed(command: list[str]) -> tuple[float, float]:
    """(seconds, resident MiB at most of the largest one) of a process and its children."""
    begin = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - begin
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{command}: exit {process.returncode}\n{output.read().decode()}")
    return seconds, usage.ru_maxrss / 1024


def rate_of_counting(texts: list[str], units: str, ours: bool) -> float:
    """Texts a second, best of three."""
    from sklearn.feature_extraction.text import HashingVectorizer

    judge = HashingVectorizer(
        n_features=COLUMNS, analyzer="char", ngram_range=(1, 3), alternate_sign=False, norm=None
    )
    best = 0.0
    for _ in range(3):
        begin = time.monotonic()
        for first in range(0, len(texts), 64):
            part = texts[first : first + 64]
            count_ngrams(part, units) if ours else judge.transform(part)
        best = max(best, len(texts) / (time.monotonic() - begin))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--chars", type=int, default=3000, help="mean length of a document (3000)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    print(f"{platform.platform()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_documents(work / "labels.jsonl", 4000, options.chars, 1)
        make_documents(work / "in.jsonl", options.documents, options.chars, 2)
        size = (work / "in.jsonl").stat().st_size
        print(f"{options.documents:,} documents, {size / 1e6:,.0f} MB\n")
        print(f"{'':44} {'seconds':>8} {'documents/s':>12} {'MiB':>6}")

        def row(name: str, seconds: float, documents: int, memory: float) -> None:
            print(f"{name:44} {seconds:8.1f} {documents / seconds:12,.0f} {memory:6,.0f}", flush=True)

        train = [
            *TOOL,
            "label-topics",
            "train",
            "--input",
            str(work / "labels.jsonl"),
            "--label-key",
            "label",
        ]
        row("train (4,000 labels, 22 topics)", *swap(timed([*train, "--model", str(work / "model")]), 4000))
        for language, one in json.loads((work / "model" / "model.json").read_text())["languages"].items():
            print(f"    {language}: held-out accuracy {one['held_out']['accuracy']}")
        for workers in sorted({1, options.workers}):
            command = [
                *TOOL, "label-topics", "apply", "--model", str(work / "model"), "--input", str(work / "in.jsonl"),
                "--output", str(work / f"out{workers}.jsonl"), "--workers", str(workers),
            ]  # fmt: skip
            row(f"apply, {workers} process(es)", *swap(timed(command), options.documents))
        order = [*TOOL, "order", "--input", str(work / "in.jsonl"), "--output", str(work / "ordered.jsonl")]
        row("order by perplexity", *swap(timed(order), options.documents))
        keyed = work / "keyed.tsv"
        with keyed.open("w", encoding="utf-8") as stream:
            for line in (work / "in.jsonl").open(encoding="utf-8"):
                stream.write(f"{json.loads(line)['perplexity']!r}\t{line}")
        sort = ["sort", "-s", "-g", "-k1,1", str(keyed), "-o", str(work / "sorted.tsv")]
        row("sort -s -g (numbers put before the lines)", *swap(timed(sort), options.documents))

        texts = {"en": [], "zh": []}  # type: dict[str, list[str]]
        for number, line in enumerate((work / "in.jsonl").open(encoding="utf-8")):
            if number < 2000:
                texts[("en", "zh")[number % 2]].append(json.loads(line)["text"][:CUT])
    print(f"\ncounting n-grams of the first {CUT:,} characters, one process")
    for name, language, units, ours in (
        ("English, words (scikit-learn)", "en", WORDS, True),
        ("Chinese, characters (ours)", "zh", CHARACTERS, True),
        ("Chinese, characters (scikit-learn)", "zh", CHARACTERS, False),
    ):
        print(f"{name:44} {rate_of_counting(texts[language], units, ours):21,.0f}")


def swap(measured: tuple[float, float], documents: int) -> tuple[float, int, float]:
    """Columns of a row."""
    return measured[0], documents, measured[1]


if __name__ == "__main__":
    main()
