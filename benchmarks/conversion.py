"""Conversion against ``cp -r`` and ``sync`` of the same bytes, and against transformers and peers, in one run.

    python benchmarks/conversion.py --folder /scratch/bench                 # 1.5 billion parameters, 3.0 GB
    python benchmarks/conversion.py --folder /scratch/bench --shape 8b --rounds 2   # 8 billion, 16 GB
    python benchmarks/conversion.py --folder /scratch/bench --peers venv/bin/python

A Llama-3-shaped bf16 folder is made in the given folder (once; it needs five times its size there). Each round
runs every row once, so that a machine whose speed wanders slows all of them alike; the table has the median of
the rounds and the median of the ratios to the copy of the same round. What a row reads is read once before it is
timed, so that all find it in the page cache. Times are of whole processes, start of Python included,
ended by ``sync``. Memory is the largest sum of the resident set sizes of the process and its children, sampled
every 10 ms, less that of an idle Python.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_syne.config.schema import ModelConfig  # noqa: E402
from megatron_syne.convert.formats.safetensors import TensorSpec, build_header  # noqa: E402
from megatron_syne.convert.table import hf_tensors  # noqa: E402
from megatron_syne.models.config import resolve_model  # noqa: E402
from megatron_syne.models.hf_config import hf_config_from_model  # noqa: E402

SHAPES = {
    # Llama-3 cut to 1.5 billion: the shape of Llama-3.2-1B with its own output layer
    "1.5b": {"num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "heads": 32},
    "8b": {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "heads": 32},
}
TOOL = [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py")]
TRANSFORMERS = """
import sys
import torch
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).save_pretrained(sys.argv[2])
"""
# Further options of a peer's script, one row for each list
PEER_OPTIONS = {
    "torchtitan_import": [[], ["--dtype", "bfloat16"]],  # its own command writes float32: twice the bytes
}


@dataclass
class Row:
    """One line of the table."""

    name: str
    command: list[str]
    source: Path
    out: Path
    keep: bool = False
    """Left standing for the rows after it, until the round ends."""
    seconds: list[float] = field(default_factory=list)
    memory_bytes: list[int] = field(default_factory=list)
    failure: str = ""


def make_model(folder: Path, shape: str) -> int:
    """Write the model unless it is there; bytes of its weights."""
    sizes = SHAPES[shape]
    model = resolve_model(
        ModelConfig(
            model_type="llama",
            num_layers=sizes["num_hidden_layers"],
            hidden_size=sizes["hidden_size"],
            ffn_hidden_size=sizes["intermediate_size"],
            num_attention_heads=sizes["heads"],
            num_query_groups=8,
            vocab_size=128256,
            max_position_embeddings=8192,
            layernorm_epsilon=1e-5,
            rotary_base=500000.0,
            share_embeddings_and_output_weights=False,
        )
    )
    tensors = [TensorSpec(name, "BF16", shape) for name, shape in hf_tensors(model).items()]
    files: list[list[TensorSpec]] = [[]]
    used = 0
    for tensor in tensors:
        if used + tensor.size_bytes > 5e9:
            files.append([])
            used = 0
        files[-1].append(tensor)
        used += tensor.size_bytes
    total = sum(tensor.size_bytes for tensor in tensors)
    if (folder / "config.json").is_file():
        return total
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    block = (rng.standard_normal(2**23, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)
    weight_map = {}
    for index, group in enumerate(files, 1):
        name = f"model-{index:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
        with (folder / name).open("xb") as stream:
            stream.write(build_header(group, {"format": "pt"})[0])
            for tensor in group:
                weight_map[tensor.name] = name
                left = tensor.size_bytes // block.itemsize
                block = np.roll(block, 12345)  # no two tensors alike
                while left:
                    stream.write(memoryview(block[: min(left, len(block))]))  # type: ignore[arg-type]
                    left -= min(left, len(block))
    if len(files) > 1:
        index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    (folder / "config.json").write_text(json.dumps(hf_config_from_model(model, "bfloat16")))
    os.sync()
    return total


def warm(folder: Path) -> None:
    """Read a folder, so that every row finds what it reads in the page cache, as far as it fits there."""
    block = bytearray(2**23)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb", buffering=0) as stream:
                while stream.readinto(block):
                    pass


def run(row: Row, idle_bytes: int) -> None:
    """Time one row, sync included, and watch its memory."""
    shutil.rmtree(row.out, ignore_errors=True)
    warm(row.source)
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(row.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    peak = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        watched = psutil.Process(process.pid)
        while not done.wait(0.01):
            size = 0
            try:
                for one in [watched, *watched.children(recursive=True)]:
                    size += one.memory_info().rss
            except psutil.Error:
                continue
            peak = max(peak, size)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output = process.communicate()[0]
    os.sync()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    if process.returncode:
        row.failure = output.decode(errors="replace").strip()[-300:]
        return
    row.seconds.append(seconds)
    row.memory_bytes.append(max(0, peak - idle_bytes))


def idle_python() -> int:
    """Resident set of a Python that has only started."""
    code = "import psutil; print(psutil.Process().memory_info().rss)"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)


def rows_of(folder: Path, source: Path, peers: Path | None) -> list[Row]:
    """Every row in the order in which a round runs them."""
    layout = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    out = {
        name: folder / name for name in ("copy", "shards", "dist", "hf", "hf_dist", "transformers", "peer")
    }
    rows = [
        Row("cp -r; sync", ["cp", "-r", str(source), str(out["copy"])], source, out["copy"]),
        Row(
            "import to TP 2 x PP 2 shards",
            [*TOOL, "import", "--from", str(source), "--out", str(out["shards"]), *layout],
            source,
            out["shards"],
            keep=True,
        ),
        Row(
            "export from the shards",
            [*TOOL, "export", "--from", str(out["shards"]), "--out", str(out["hf"])],
            out["shards"],
            out["hf"],
        ),
        Row(
            "import to torch_dist",
            [*TOOL, "import", "--format", "torch_dist", "--from", str(source), "--out", str(out["dist"])],
            source,
            out["dist"],
            keep=True,
        ),
        Row(
            "export from torch_dist",
            [*TOOL, "export", "--from", str(out["dist"]), "--out", str(out["hf_dist"])],
            out["dist"],
            out["hf_dist"],
        ),
        Row(
            "transformers load + save",
            [sys.executable, "-c", TRANSFORMERS, str(source), str(out["transformers"])],
            source,
            out["transformers"],
        ),
    ]
    if peers is not None:
        for script in sorted((ROOT / "benchmarks" / "peers").glob("*.py")):
            for extra in PEER_OPTIONS.get(script.stem, [[]]):
                name = " ".join([script.stem, *extra, "(peer)"])
                command = [str(peers), str(script), str(source), str(out["peer"]), *extra]
                rows.append(Row(name, command, source, out["peer"]))
    return rows


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, required=True, help="working folder, on the disk to be measured"
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="1.5b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", type=Path, help="Python of an environment that holds the peers' packages")
    parser.add_argument(
        "--only", nargs="+", help="beginnings of the names of rows to run (the copy always runs)"
    )
    options = parser.parse_args()
    source = options.folder / f"llama3-{options.shape}"
    size = make_model(source, options.shape)
    rows = rows_of(options.folder, source, options.peers)
    if options.only:
        rows = [row for row in rows if row.name.startswith(("cp", *options.only))]
    idle = idle_python()
    run(rows[0], idle)  # the first copy brings the source into the page cache and is not counted
    rows[0].seconds.clear()
    rows[0].memory_bytes.clear()
    for _ in range(options.rounds):
        for row in rows:
            if not row.failure:
                run(row, idle)
            if not row.keep:
                shutil.rmtree(row.out, ignore_errors=True)
        for row in rows:
            shutil.rmtree(row.out, ignore_errors=True)
    print(
        f"\n{source.name}: {size / 1e9:.2f} GB, {options.rounds} rounds, {os.cpu_count()} CPUs, "
        f"Python {platform.python_version()}\n"
    )
    print("| what | seconds, median (min-max) | against cp | GB/s | memory over idle Python, MB |")
    print("|---|---|---|---|---|")
    for row in rows:
        if row.failure:
            print(f"| {row.name} | failed: {row.failure.splitlines()[-1]} | | | |")
            continue
        middle = statistics.median(row.seconds)
        ratio = statistics.median(a / b for a, b in zip(row.seconds, rows[0].seconds, strict=True))
        print(
            f"| {row.name} | {middle:.2f} ({min(row.seconds):.2f}-{max(row.seconds):.2f}) | {ratio:.2f}x "
            f"| {size / 1e9 / middle:.2f} | {max(row.memory_bytes) / 1e6:,.0f} |"
        )


if __name__ == "__main__":
    main()
