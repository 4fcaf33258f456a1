"""One-process training of the demo's model beside ``transformers.Trainer``, with which Llama-3-SynE was trained.

    python -m pip install --no-deps --target /scratch/peers -r benchmarks/peers/requirements_training.txt
    python benchmarks/trainer.py --peers /scratch/peers [--steps 30] [--rounds 3]

The same weights, random tokens, batch and optimizer; both may use all CPUs. Tokens per second from the median of
the steps after the first five, in turns (ours, theirs, ours, ...), each row over all rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples" / "demo" / "base_model"
SEQ_LENGTH, MICRO_BATCH, GLOBAL_BATCH = 256, 4, 32
WARM = 5


def environment(*paths: str) -> dict[str, str]:
    """All CPUs to the one process, and what it imports."""
    threads = str(os.cpu_count())
    return {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join(map(str, paths))}


def ours(dtype: str, steps: int, more: Sequence[str]) -> list[float]:
    """Seconds of our steps, everything that watches a run included."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "run.yaml").write_text(
            f"run_dir: run\nplatform: cpu\nmodel: {{hf_path: {MODEL}}}\ncheckpoint: {{initialize_from: {MODEL}}}\n"
            f"data: {{seq_length: {SEQ_LENGTH}, mock: true}}\nprecision: {{params_dtype: {dtype}}}\n"
            "optimizer: {lr: 1.0e-4}\nschedule: {lr_decay_style: constant}\n"
            f"train: {{micro_batch_size: {MICRO_BATCH}, global_batch_size: {GLOBAL_BATCH}, train_iters: {steps}}}\n"
        )
        command = [sys.executable, "-m", "megatron_syne.train", "--config", f"{folder}/run.yaml", *more]
        done = subprocess.run(command, env=environment(str(ROOT)), capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"our run ended with {done.returncode}:\n{done.stderr[-2000:]}")
        lines = map(json.loads, (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines())
        return [line["step_seconds"] for line in lines if "step_seconds" in line][WARM:]


def theirs(bf16: bool, checkpointing: bool, steps: int, peers: str) -> list[float]:
    """Seconds of the Trainer's steps."""
    options = {
        "steps": steps + 1,
        "seq_length": SEQ_LENGTH,
        "micro_batch_size": MICRO_BATCH,
        "global_batch_size": GLOBAL_BATCH,
        "bf16": bf16,
        "gradient_checkpointing": checkpointing,
    }
    script = str(ROOT / "benchmarks" / "peers" / "transformers_trainer.py")
    command = [sys.executable, script, str(MODEL), json.dumps(options)]
    done = subprocess.run(command, env=environment(peers), capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("SECONDS ")]
    if done.returncode or not lines:
        sys.exit(f"transformers.Trainer ended with {done.returncode}:\n{done.stderr[-2000:]}")
    seconds: list[float] = json.loads(lines[0].removeprefix("SECONDS "))
    return seconds[WARM:]


def main() -> None:
    """Measure in turns, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--peers", default="", help="folder with accelerate, which Trainer needs")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    full = ["memory.recompute_granularity=full", "memory.recompute_method=uniform"]
    rows = {
        "fp32": ("fp32", False, False, []),
        "bf16 (theirs: fp32 weights, autocast)": ("bf16", True, False, []),
        "bf16, activations computed again": ("bf16", True, True, full),
    }
    tokens = SEQ_LENGTH * GLOBAL_BATCH
    print("| format | Trainer, tokens/s | ours, tokens/s | ratio | by rounds |\n|---|---|---|---|---|")
    for name, (dtype, bf16, checkpointing, more) in rows.items():
        found = [
            (
                statistics.median(ours(dtype, options.steps, more)),
                statistics.median(theirs(bf16, checkpointing, options.steps, options.peers)),
            )
            for _ in range(options.rounds)
        ]
        mine, peer = (statistics.median(each) for each in zip(*found, strict=True))
        rounds = ", ".join(f"{b / a:.2f}" for a, b in found)
        print(
            f"| {name} | {tokens / peer:,.0f} | {tokens / mine:,.0f} | {peer / mine:.2f} | {rounds} |",
            flush=True,
        )
    print(f"\n{os.cpu_count()} CPUs, {time.strftime('%Y-%m-%d')}")


if __name__ == "__main__":
    main()
