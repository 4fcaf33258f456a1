"""A plan at scale: twelve sources, 100 million documents, 100 billion tokens, built once and opened by a rank.

    python benchmarks/data_plan.py --folder /scratch/bench
    python benchmarks/data_plan.py --folder /scratch/bench --packing best_fit

The index files are synthetic (lengths log-normal around 1,000 tokens), the ``.bin`` files sparse: they take no
space. Every row is a process of its own, start of Python included, with its largest resident set size as the
kernel counts it (pages of mapped files included). Needs 4 GB in the folder, given back at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_syne.config.schema import DataConfig, RunConfig, SourceConfig, StageConfig  # noqa: E402
from megatron_syne.data.build import training_dataset  # noqa: E402
from megatron_syne.data.dataset import StagedDataset  # noqa: E402
from megatron_syne.data.mixture.planning import plan_mixture  # noqa: E402
from megatron_syne.data.tokens.indexed import IndexedWriter  # noqa: E402

SOURCES = 12
VOCABULARY = 128_256
SEQ_LENGTH = 8192


class NoTokens:
    """A ``.bin`` stream that only counts."""

    def write(self, data: bytes) -> int:
        return len(data)


def make_source(prefix: Path, documents: int, tokens: int, seed: int) -> None:
    """Index, manifest and sparse tokens of one source."""
    rng = np.random.default_rng(seed)
    lengths = rng.lognormal(0.0, 1.0, documents)
    lengths = np.maximum(2, lengths * (tokens / lengths.sum())).astype(np.int32)
    dtype = np.dtype("<i4")
    with open(f"{prefix}.idx", "w+b") as stream:
        writer = IndexedWriter(NoTokens(), stream, dtype)  # type: ignore[arg-type]
        writer.add_lengths(lengths)
        writer.tokens = int(lengths.sum(dtype=np.int64))
        files = writer.finish()
    with open(f"{prefix}.bin", "wb") as stream:
        stream.truncate(writer.tokens * dtype.itemsize)
    files["idx"]["sha256"] = hashlib.sha256(Path(f"{prefix}.idx").read_bytes()).hexdigest()
    manifest = {
        "format": "megatron_syne.tokens",
        "version": 1,
        "dtype": dtype.name,
        "max_token_id": VOCABULARY - 1,
        "counts": {"documents": documents, "tokens": writer.tokens},
        "tokenizer": {"vocab_size": VOCABULARY, "fingerprint": "synthetic", "eos_id": 1},
        "files": files,
    }
    Path(f"{prefix}.json").write_text(json.dumps(manifest))


def configuration(folder: Path, tokens: int, packing: str) -> RunConfig:
    """Two stages over all sources, together 99 % of their tokens."""
    config = RunConfig()
    names = [f"source{number:02d}" for number in range(SOURCES)]
    shares: dict[str, Any] = {name: 1 / SOURCES for name in names}
    stages = [
        StageConfig(name, int(share * tokens), shares) for name, share in (("first", 0.9), ("second", 0.09))
    ]
    config.data = DataConfig(
        seq_length=SEQ_LENGTH,
        sources={name: SourceConfig(str(folder / name), max_epochs=1.1) for name in names},
        stages=stages,
        packing=packing,  # type: ignore[arg-type]
    )
    config.train.global_batch_size = 512
    return config


def open_dataset(folder: Path, tokens: int, packing: str) -> StagedDataset:
    """The data set of the configuration, as a rank opens it."""
    config = configuration(folder, tokens, packing)
    dataset = training_dataset(config, plan_mixture(config), VOCABULARY, folder / "cache")
    assert isinstance(dataset, StagedDataset)
    return dataset


def make(folder: Path, documents: int, tokens: int) -> dict[str, float]:
    """The files of all sources. In a process of its own: the kernel counts a parent's memory to its children."""
    for number in range(SOURCES):
        make_source(folder / f"source{number:02d}", documents // SOURCES, tokens // SOURCES, number)
    return {}


def build(folder: Path, tokens: int, packing: str) -> dict[str, float]:
    """Everything that the run will read from the cache."""
    dataset = open_dataset(folder, tokens, packing)
    dataset.prepare()
    return {"samples": len(dataset)}


def read(folder: Path, tokens: int, packing: str) -> dict[str, float]:
    """Open, then samples at random, then in order, twice: the second time all is in the page cache."""
    start = time.perf_counter()
    dataset = open_dataset(folder, tokens, packing)
    opened = time.perf_counter() - start
    indices = np.random.default_rng(0).integers(0, len(dataset), 100).tolist()
    start = time.process_time()
    for index in indices:
        assert dataset[index].tokens.size == SEQ_LENGTH + 1
    busy = time.process_time() - start
    following = range(len(dataset) // 2, len(dataset) // 2 + 400)
    each = []
    for _ in range(2):
        start = time.process_time()
        for index in following:
            assert dataset[index].tokens.size == SEQ_LENGTH + 1
        each.append((time.process_time() - start) / len(following) * 1e6)
    return {"open_seconds": opened, "random_us": busy / len(indices) * 1e6, "in_order_us": each[1]}


def measure(command: str, options: argparse.Namespace) -> tuple[float, float, float, dict[str, float]]:
    """Seconds, those of them on a CPU, largest resident set in MB and answer of one process of this script."""
    arguments = [
        sys.executable,
        __file__,
        "--folder",
        str(options.folder),
        "--documents",
        str(options.documents),
    ]
    arguments += ["--tokens", str(options.tokens), "--packing", options.packing, "--run", command]
    start = time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    answer = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} failed")
    busy = usage.ru_utime + usage.ru_stime
    return time.perf_counter() - start, busy, usage.ru_maxrss / 1024, json.loads(answer)


def main() -> None:
    """Make the sources, run the rows, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="an empty or new folder")
    parser.add_argument("--documents", type=int, default=100_000_000)
    parser.add_argument("--tokens", type=int, default=100_000_000_000)
    parser.add_argument("--packing", choices=("concatenated", "best_fit"), default="concatenated")
    parser.add_argument("--run", choices=("make", "build", "read"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run == "make":
        print(json.dumps(make(options.folder, options.documents, options.tokens)))
        return
    if options.run:
        run = build if options.run == "build" else read
        print(json.dumps(run(options.folder, options.tokens, options.packing)))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    try:
        measure("make", options)
        print(
            f"{SOURCES} sources, {options.documents:,} documents, {options.tokens:,} tokens, {options.packing}, "
            f"sequence length {SEQ_LENGTH}; {os.cpu_count()} CPUs, Python {platform.python_version()}, "
            f"numpy {np.__version__}\n"
        )
        print("| what | seconds | CPU seconds | largest resident set, MB |\n|---|---|---|---|")
        seconds, busy, memory, answer = measure("build", options)
        print(f"| build: check the indices, make every order | {seconds:.1f} | {busy:.1f} | {memory:,.0f} |")
        cache = sum(path.stat().st_size for path in (options.folder / "cache").iterdir())
        rows = [measure("read", options) for _ in range(3)]
        seconds, busy, memory, times = sorted(rows, key=lambda row: row[0])[1]
        print(
            f"| a rank: open, 100 samples at random, 800 in order | {seconds:.2f} | {busy:.2f} | {memory:,.0f} |"
        )
        print(
            f"\nof which opening {times['open_seconds']:.2f} s; CPU time of a sample {times['random_us']:.0f} us at "
            f"random, {times['in_order_us']:.0f} us in order and read before; {answer['samples']:,} samples; the "
            f"cache takes {cache / 1e6:,.0f} MB"
        )
    finally:
        for path in options.folder.glob("source*"):
            path.unlink()
        shutil.rmtree(options.folder / "cache", ignore_errors=True)


if __name__ == "__main__":
    main()
