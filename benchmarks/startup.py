"""Time from the command to the first step, beside importing torch and megatron-core in as many processes.

    python benchmarks/startup.py [--rounds 5]

Whole processes, in turns. Ours is ``launch/local.sh run.yaml`` on the demo's model and converted weights; the clock
stops when the first batch is there and the first forward pass begins, and again when the first step is done (which
also computes it). The limit is ``import torch, megatron.core`` in as many processes at the same time, with compiled
fusions off as our CPU platform has them (``TORCH_COMPILE_DISABLE``).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MODEL = ROOT / "examples" / "demo" / "base_model"
LAYOUTS = {"one process": (1, 1), "TP 2 x PP 2": (2, 2)}
IMPORTS = "import torch, megatron.core"


def configuration(folder: Path, tp: int, pp: int) -> Path:
    """The YAML of a run of two steps that starts from weights."""
    path = folder / "run.yaml"
    path.write_text(
        f"run_dir: run\nplatform: cpu\nmodel: {{hf_path: {MODEL}}}\ncheckpoint: {{initialize_from: {MODEL}}}\n"
        f"parallel: {{tensor_model_parallel_size: {tp}, pipeline_model_parallel_size: {pp}}}\n"
        "data: {seq_length: 64, mock: true}\n"
        "train: {micro_batch_size: 1, global_batch_size: 4, train_iters: 2}\nmonitor: {progress: false}\n"
    )
    return path


def rank_main(config: str, started: float) -> None:
    """``megatron_syne.train`` with a callback that reads the clock."""
    from megatron_syne import assembly, train
    from megatron_syne.errors import run_cli
    from megatron_syne.training.callback import Callback

    class Clock(Callback):
        def on_batch(self, trainer: Any, batches: Any) -> None:
            if trainer.state.step == 0 and os.environ.get("RANK", "0") == "0":
                print(f"BEGINS {time.time() - started}", flush=True)

        def on_step_end(self, trainer: Any, metrics: dict[str, float]) -> None:
            if trainer.state.step == 1 and os.environ.get("RANK", "0") == "0":
                print(f"DONE {time.time() - started}", flush=True)

    build = assembly.build_trainer

    def with_clock(*arguments: Any, **options: Any) -> Any:
        trainer = build(*arguments, **options)
        trainer.callbacks = [*trainer.callbacks, Clock()]
        return trainer

    assembly.build_trainer = with_clock
    sys.exit(run_cli(lambda: train.main(["--config", config])))


def ours(tp: int, pp: int) -> tuple[float, float]:
    """Seconds until the first step begins, and until it is done."""
    from launch.local import free_port, rank_environment

    with tempfile.TemporaryDirectory() as folder:
        config, port = configuration(Path(folder), tp, pp), free_port()
        started = time.time()
        command = [sys.executable, __file__, "--rank", str(config), repr(started)]
        ranks = [
            subprocess.Popen(
                command, env=rank_environment(rank, tp * pp, port), stdout=subprocess.PIPE, text=True
            )
            for rank in range(tp * pp)
        ]
        outputs = [rank.communicate()[0] for rank in ranks]
        if any(rank.returncode for rank in ranks):
            sys.exit(f"startup.py: ranks ended with {[rank.returncode for rank in ranks]}")
    found = dict(line.split() for line in outputs[0].splitlines() if line.startswith(("BEGINS", "DONE")))
    return float(found["BEGINS"]), float(found["DONE"])


def imports(count: int) -> float:
    """Seconds of importing in ``count`` processes at once, until the last has ended."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"}
    started = time.time()
    processes = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", IMPORTS], env=environment)
        for _ in range(count)
    ]
    if any(process.wait() for process in processes):
        sys.exit("startup.py: torch and megatron-core cannot be imported")
    return time.time() - started


def main() -> None:
    """Measure in turns, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank_main(options.rank[0], float(options.rank[1]))
    print("| processes | imports, s | first step begins, s | ratio | first step done, s | ratio |")
    print("|---|---|---|---|---|---|")
    for name, (tp, pp) in LAYOUTS.items():
        limit, begins, done = [], [], []
        for _ in range(options.rounds):
            limit.append(imports(tp * pp))
            begin, end = ours(tp, pp)
            begins.append(begin)
            done.append(end)
        base, first, last = (statistics.median(values) for values in (limit, begins, done))
        print(
            f"| {name} | {base:.2f} | {first:.2f} | {first / base:.2f} | {last:.2f} | {last / base:.2f} |",
            flush=True,
        )
    print(f"\n{os.cpu_count()} CPUs, {time.strftime('%Y-%m-%d')}")


if __name__ == "__main__":
    main()
