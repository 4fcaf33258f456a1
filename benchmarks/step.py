"""A step of ours beside a step of a bare megatron-core loop, one after the other in the same processes.

    python benchmarks/step.py [--steps 40] [--rounds 3]

Same model (the demo's), layout, batch and format. Ours is everything between two steps of ``fit``: loader,
checks, agreement of the ranks, console, tensorboard, metrics.jsonl. The bare loop is
``benchmarks/peers/bare_megatron_core.py``. The two take turns, step by step, so that whatever else the machine
does meets both; a row is the ratio of the medians, over all rounds (each a start of its own).
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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from launch.local import run_ranks  # noqa: E402

MODEL = ROOT / "examples" / "demo" / "base_model"
SEQ_LENGTH, MICRO_BATCH, GLOBAL_BATCH = 256, 4, 32
LAYOUTS = {"one process": (1, 1), "TP 2 x PP 2": (2, 2)}
WARM = 5


def configuration(folder: Path, tp: int, pp: int, dtype: str, steps: int) -> Path:
    """The YAML of a run on random tokens, everything that watches a run switched on."""
    path = folder / "run.yaml"
    path.write_text(
        f"""run_dir: {folder}/run
platform: cpu
model: {{hf_path: {MODEL}}}
parallel:
  tensor_model_parallel_size: {tp}
  pipeline_model_parallel_size: {pp}
  sequence_parallel: {str(tp > 1).lower()}
data: {{seq_length: {SEQ_LENGTH}, mock: true}}
optimizer: {{lr: 1.0e-4}}
precision: {{params_dtype: {dtype}}}
train: {{micro_batch_size: {MICRO_BATCH}, global_batch_size: {GLOBAL_BATCH}, train_iters: {steps + WARM}}}
"""
    )
    return path


def rank_main(config_path: str, target: str) -> None:
    """One rank: ``fit`` with a bare step after each of ours."""
    from megatron_syne.assembly import build_trainer
    from megatron_syne.config.loader import load_config
    from megatron_syne.models.config import resolve_model
    from megatron_syne.parallel.ranks import rank_info
    from megatron_syne.platform.base import select
    from megatron_syne.training.callback import Callback

    config = load_config(config_path, [])
    info, model = rank_info(), resolve_model(config.model)
    trainer = build_trainer(config, model, select("cpu"), info)
    from peers.bare_megatron_core import BareLoop

    parallel, hf = config.parallel, json.loads((MODEL / "config.json").read_text())
    bare = BareLoop(
        hf,
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        SEQ_LENGTH,
        MICRO_BATCH,
        GLOBAL_BATCH // MICRO_BATCH,
        config.precision.params_dtype == "bf16",
    )
    seconds: dict[str, list[float]] = {"ours": [], "bare": []}

    class First(Callback):
        def on_step_start(self, trainer: Any) -> None:
            self.started = time.perf_counter()

    class Last(Callback):
        def on_step_boundary(self, trainer: Any) -> None:
            seconds["ours"].append(time.perf_counter() - first.started)
            seconds["bare"].append(bare.step())

    first = First()
    trainer.callbacks = [first, *trainer.callbacks, Last()]
    trainer.fit()
    if info.rank == 0:
        Path(target).write_text(json.dumps({name: values[WARM:] for name, values in seconds.items()}))
    from megatron_syne.parallel.setup import stop_distributed

    stop_distributed()


def measure(tp: int, pp: int, dtype: str, steps: int) -> dict[str, list[float]]:
    """Seconds of the steps of both, in processes of their own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config, target = configuration(folder, tp, pp, dtype, steps), folder / "seconds.json"
        command = [sys.executable, __file__, "--rank", str(config), str(target)]
        quiet = os.open(os.devnull, os.O_WRONLY)
        kept = os.dup(2)
        os.dup2(quiet, 2)  # the progress line of the run is part of it, but not of this table
        try:
            code = run_ranks(command, tp * pp)
        finally:
            os.dup2(kept, 2)
        if code:
            sys.exit(f"step.py: a rank ended with {code}")
        seconds: dict[str, list[float]] = json.loads(target.read_text())
        return seconds


def main() -> None:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank", nargs=2, metavar=("CONFIG", "TARGET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank_main(*options.rank)
        return
    print("| layout | format | bare loop, ms | ours, ms | ratio | by rounds |\n|---|---|---|---|---|---|")
    for layout, (tp, pp) in LAYOUTS.items():
        for dtype in ("fp32", "bf16"):
            rounds = [measure(tp, pp, dtype, options.steps) for _ in range(options.rounds)]
            ours = statistics.median([value for each in rounds for value in each["ours"]])
            bare = statistics.median([value for each in rounds for value in each["bare"]])
            single = [statistics.median(each["ours"]) / statistics.median(each["bare"]) for each in rounds]
            print(
                f"| {layout} | {dtype} | {bare * 1000:.1f} | {ours * 1000:.1f} | {ours / bare:.3f} | "
                f"{', '.join(f'{value:.3f}' for value in single)} |",
                flush=True,
            )
    versions = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True
    )
    print(f"\ntorch {versions.stdout.strip()}, {os.cpu_count()} CPUs, {time.strftime('%Y-%m-%d')}")


if __name__ == "__main__":
    main()
