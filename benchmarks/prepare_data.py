"""Preparation of tokens against Megatron-LM's preprocess_data.py, ``tokenizers`` and datatrove, in one run.

    python benchmarks/prepare_data.py --tokenizer Llama-3-8B --corpus books.jsonl web.jsonl --folder /scratch/bench
    python benchmarks/prepare_data.py ... --megatron-lm ~/Megatron-LM --datatrove venv/bin/python --megabytes 200

One JSONL of the size asked for is made from the corpora: they are gone through again and again, and each time every
document is turned, so that it begins at another of its words and no document occurs twice. Words do recur, as in any
text; only ``tokenizers`` and what is built on it keep a cache of words, so that this can but favour them. Each
round runs every row once, so that a machine whose speed wanders slows all of them alike; the table has the median
of the rounds and the median of the ratios to the first row of the same round. Times are of whole processes, start of
Python included. What a row needs before its first token is measured too, once, on the first 20 lines. CPU seconds
are of the process and its children: where other work shares the machine they tell more than the clock does.

Ours must write the bytes of Megatron-LM's .bin and .idx; the benchmark stops where they differ.
"""

from __future__ import annotations

import argparse
import filecmp
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
TOOL = [sys.executable, str(ROOT / "tools" / "prepare_data.py")]
MEGATRON, OURS = "Megatron-LM preprocess_data.py, 2 workers", "ours"
TOKENIZERS = """
import itertools, json, sys
import numpy as np
from tokenizers import Tokenizer
source, out, folder = sys.argv[1:]
tokenizer = Tokenizer.from_file(folder + "/tokenizer.json")
with open(source, encoding="utf-8") as lines, open(out + ".bin", "wb") as stream:
    while texts := [json.loads(line)["text"] for line in itertools.islice(lines, 1000)]:
        for one in tokenizer.encode_batch(texts, add_special_tokens=False):
            stream.write(np.array(one.ids, dtype=np.int32).tobytes())
"""
DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
if __name__ == "__main__":
    source, out, folder, eos = sys.argv[1:]
    tokenise = DocumentTokenizer(out, tokenizer_name_or_path=folder + "/tokenizer.json", eos_token=eos,
                                 shuffle_documents=False)
    LocalPipelineExecutor([JsonlReader(source), tokenise], tasks=2, workers=2, logging_dir=out + "/logs",
                          start_method="spawn").run()
"""


@dataclass
class Row:
    """One line of the table; ``command`` lacks the input and the output, which :func:`command_of` puts in."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    start: float = 0.0
    start_cpu: float = 0.0
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    failure: str = ""


def make_corpus(corpora: Sequence[Path], megabytes: float, file: Path) -> None:
    """Write documents of all corpora in turn until the size is reached; see the module's docstring."""
    documents = [json.loads(line)["text"] for path in corpora for line in path.open(encoding="utf-8")]
    order = np.random.default_rng(0).permutation(len(documents))
    written = turn = 0
    with file.open("xb") as stream:
        while True:
            for index in order:
                text = documents[index]
                at = text.find(" ", turn * 97 % max(len(text), 1)) + 1
                line = json.dumps({"text": text[at:] + text[:at]}, ensure_ascii=False).encode() + b"\n"
                stream.write(line)
                written += len(line)
                if written >= megabytes * 1e6:
                    return
            turn += 1


def parts_of(file: Path, folder: Path) -> None:
    """The file in two halves, which is how datatrove gives work to two processes."""
    folder.mkdir()
    lines = file.read_bytes().splitlines(keepends=True)
    for part in range(2):
        (folder / f"{part}.jsonl").write_bytes(
            b"".join(lines[part * len(lines) // 2 :][: len(lines) // 2 + 1])
        )


def rows_of(options: argparse.Namespace, eos: str) -> list[Row]:
    """Every row in the order in which a round runs them; ours with two workers is what others are compared to."""
    tokenizer = str(options.tokenizer)
    ours = [*TOOL, "--min-tokens", "0", "--overwrite", "--tokenizer"]
    rows = [Row(f"{OURS}, {n} worker{'s'[: n > 1]}", [*ours, tokenizer, "--workers", str(n)]) for n in (2, 1)]
    if (options.tokenizer / "tokenizer.model").is_file():
        command = [*ours, f"{tokenizer}/tokenizer.model", "--workers", "2"]
        rows.append(Row(f"{OURS} from tokenizer.model, 2 workers", command))
    if options.megatron_lm:
        script = [sys.executable, str(options.megatron_lm / "tools" / "preprocess_data.py")]
        flags = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer, "--append-eod"]
        path = os.pathsep.join([str(options.megatron_lm), *map(str, options.megatron_path)])
        rows.append(Row(MEGATRON, [*script, *flags, "--workers", "2"], {"PYTHONPATH": path}))
    for threads in ("true", "false"):
        name = f"tokenizers.encode_batch, one process, {'its threads' if threads == 'true' else 'one thread'}"
        rows.append(
            Row(name, [sys.executable, "-c", TOKENIZERS, tokenizer], {"TOKENIZERS_PARALLELISM": threads})
        )
    if options.datatrove:
        script_file = options.folder / "datatrove_tokens.py"
        script_file.write_text(DATATROVE)
        rows.append(Row("datatrove, 2 tasks", [str(options.datatrove), str(script_file), tokenizer, eos]))
    return rows


def command_of(row: Row, source: Path, out: Path) -> list[str]:
    """The command with its input and output."""
    if "-c" in row.command[:2]:
        return [*row.command[:3], str(source), str(out), *row.command[3:]]
    if row.name.startswith("datatrove"):
        return [*row.command[:2], str(source.with_suffix("")), str(out), *row.command[2:]]
    return [*row.command, "--input", str(source), "--output-prefix", str(out)]


def run(row: Row, source: Path, out: Path) -> tuple[float, float]:
    """Seconds and CPU seconds of one run; a failure is kept in the row."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **row.environment}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    done = subprocess.run(command_of(row, source, out), capture_output=True, text=True, env=environment)
    seconds = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        row.failure = (done.stderr.strip() or done.stdout.strip() or f"exit {done.returncode}")[-400:]
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def check_bytes(ours: Path, theirs: Path) -> None:
    """Raises where ours are not the bytes of Megatron-LM's."""
    for suffix in (".bin", ".idx"):
        if not filecmp.cmp(f"{ours}{suffix}", f"{theirs}_text_document{suffix}", shallow=False):
            raise SystemExit(f"{ours}{suffix} differs from Megatron-LM's")


def table(rows: Sequence[Row], tokens: int, bytes_read: int, options: argparse.Namespace) -> str:
    """The results as markdown."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("tiktoken", "tokenizers"))
    lines = [
        f"{bytes_read / 1e6:.0f} MB of JSONL, {tokens:,} tokens with EOS, {options.rounds} rounds, "
        f"{os.cpu_count()} CPUs, Python {platform.python_version()}, {versions}",
        "",
        "| what | seconds, median (min-max) | tokens/s | time against ours | start-up, s "
        "| after start-up: tokens/s | time against ours | CPU s (of which start-up) "
        "| CPU after start-up, against ours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    first = rows[0]
    net = {row.name: max(statistics.median(row.seconds) - row.start, 1e-3) for row in rows if row.seconds}
    cpu = {row.name: max(statistics.median(row.cpu) - row.start_cpu, 1e-3) for row in rows if row.cpu}
    for row in rows:
        if row.failure:
            lines.append(f"| {row.name} | failed: {row.failure.splitlines()[-1]} | | | | | | | |")
            continue
        middle = statistics.median(row.seconds)
        ratio = statistics.median(a / b for a, b in zip(row.seconds, first.seconds, strict=True))
        lines.append(
            f"| {row.name} | {middle:.1f} ({min(row.seconds):.1f}-{max(row.seconds):.1f}) | {tokens / middle:,.0f} "
            f"| {ratio:.2f}x | {row.start:.1f} | {tokens / net[row.name]:,.0f} "
            f"| {net[row.name] / net[first.name]:.2f}x | {statistics.median(row.cpu):.1f} ({row.start_cpu:.1f}) "
            f"| {cpu[row.name] / cpu[first.name]:.2f}x |"
        )
    scaling = net[rows[1].name] / net[first.name]
    whole = statistics.median(a / b for a, b in zip(rows[1].seconds, first.seconds, strict=True))
    lines += ["", f"Two workers against one: {whole:.2f}x whole, {scaling:.2f}x after start-up."]
    return "\n".join(lines)


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="working folder; emptied of its results")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--corpus", type=Path, nargs="+", required=True, help="JSONL files with a field text")
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megatron-lm", type=Path, help="a checkout; core_v0.16.1 is the engine's version")
    parser.add_argument(
        "--megatron-path",
        type=Path,
        nargs="*",
        default=[],
        help="folders with what its script imports and this Python lacks (triton, pydantic)",
    )
    parser.add_argument("--datatrove", type=Path, help="Python of an environment with datatrove")
    parser.add_argument("--output", type=Path, help="also write the table here")
    options = parser.parse_args()
    work = options.folder / "prepare_data"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    options.folder = work
    source, few = work / "corpus.jsonl", work / "few.jsonl"
    make_corpus(options.corpus, options.megabytes, source)
    with source.open("rb") as lines:
        few.write_bytes(b"".join(line for line, _ in zip(lines, range(20), strict=False)))
    parts_of(source, source.with_suffix(""))
    parts_of(few, few.with_suffix(""))
    eos = json.loads((options.tokenizer / "tokenizer_config.json").read_text())["eos_token"]
    rows = rows_of(options, eos if isinstance(eos, str) else eos["content"])
    outputs = {row.name: work / f"out{number}" for number, row in enumerate(rows)}
    for row in rows:
        row.start, row.start_cpu = run(row, few, work / "start")
        shutil.rmtree(work / "start", ignore_errors=True)  # datatrove's is a folder and remembers being done
        for file in work.glob("start*"):
            file.unlink()
    for _ in range(options.rounds):
        for row in rows:
            if not row.failure:
                shutil.rmtree(outputs[row.name], ignore_errors=True)
                seconds, cpu = run(row, source, outputs[row.name])
                row.seconds.append(seconds)
                row.cpu.append(cpu)
        if failed := [row for row in rows if row.failure and row.name.startswith(OURS)]:
            raise SystemExit(f"{failed[0].name}: {failed[0].failure}")
        if any(row.name == MEGATRON and not row.failure for row in rows):
            for row in rows:
                if row.name.startswith(OURS) and not row.failure:
                    check_bytes(outputs[row.name], outputs[MEGATRON])
    tokens = json.loads(Path(f"{outputs[rows[0].name]}.json").read_text())["counts"]["tokens"]
    text = table(rows, tokens, source.stat().st_size, options)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
