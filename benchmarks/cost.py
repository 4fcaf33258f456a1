"""Cost of a step as layers, width, sequence and ranks grow: a table and a picture.

    python benchmarks/cost.py --output cost.png [--steps 8]
    python benchmarks/cost.py --output cost.png --table benchmarks/results/training.md --cpus 2    # only draws

A small Llama on the CPU platform, fp32, random tokens; one axis varies, the others stay at the base. Each row is a run
of its own: the median of its steps after the first three (with all that watches a run), and the peak of resident
memory of rank 0. "per FLOP" is the time divided by that of the base times the model's own count of floating-point
operations (``models/flops.py``): 1.0 means that the cost grows as the arithmetic does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from launch.local import run_ranks  # noqa: E402
from megatron_syne.config.schema import ModelConfig  # noqa: E402
from megatron_syne.models.flops import model_flops_per_token  # noqa: E402
from megatron_syne.pictures.cost import Cost, draw_cost  # noqa: E402

WARM = 3
VOCABULARY = 2048


@dataclass(frozen=True)
class Point:
    """One run."""

    layers: int = 4
    hidden: int = 256
    seq_length: int = 256
    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1

    @property
    def world(self) -> int:
        """Processes."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def model(self) -> ModelConfig:
        """The small Llama of this run."""
        return ModelConfig(
            model_type="llama",
            num_layers=self.layers,
            hidden_size=self.hidden,
            ffn_hidden_size=3 * self.hidden,
            num_attention_heads=8,
            num_query_groups=4,
            vocab_size=VOCABULARY,
            max_position_embeddings=4096,
            layernorm_epsilon=1e-5,
            rotary_base=500000.0,
            share_embeddings_and_output_weights=False,
        )

    @property
    def flops(self) -> float:
        """Floating-point operations of one token, forward and backward."""
        return model_flops_per_token(self.model, self.seq_length)


BASE = Point()
AXES = {
    "layers": [replace(BASE, layers=n) for n in (2, 4, 8, 16)],
    "width": [replace(BASE, hidden=n) for n in (128, 256, 512, 1024)],
    "sequence": [replace(BASE, seq_length=n) for n in (128, 256, 512, 1024, 2048)],
    "ranks": [
        BASE,
        *(replace(BASE, **{axis: 2}) for axis in ("dp", "pp", "tp", "cp")),
        replace(BASE, dp=4),
        replace(BASE, tp=2, pp=2),
    ],
}
SAMPLES = 8


def label(axis: str, point: Point) -> str:
    """What varies, in a few characters."""
    if axis != "ranks":
        return str({"layers": point.layers, "width": point.hidden, "sequence": point.seq_length}[axis])
    sizes = [(name, getattr(point, name)) for name in ("tp", "pp", "cp", "dp")]
    return " ".join(f"{name.upper()}{size}" for name, size in sizes if size > 1) or "1"


def measure(point: Point, steps: int) -> tuple[float, float]:
    """(seconds of a step, peak bytes of rank 0)."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "run.yaml").write_text(
            f"""run_dir: run
platform: cpu
model:
  num_layers: {point.layers}
  hidden_size: {point.hidden}
  ffn_hidden_size: {3 * point.hidden}
  num_attention_heads: 8
  num_query_groups: 4
  vocab_size: {VOCABULARY}
  max_position_embeddings: 4096
  layernorm_epsilon: 1.0e-5
  rotary_base: 500000.0
  share_embeddings_and_output_weights: false
parallel:
  tensor_model_parallel_size: {point.tp}
  pipeline_model_parallel_size: {point.pp}
  context_parallel_size: {point.cp}
  data_parallel_size: {point.dp}
  sequence_parallel: {str(point.tp > 1).lower()}
data: {{seq_length: {point.seq_length}, mock: true}}
precision: {{params_dtype: fp32}}
train: {{micro_batch_size: 1, global_batch_size: {SAMPLES}, train_iters: {steps + WARM}}}
monitor: {{progress: false, tensorboard: true}}
"""
        )
        code = run_ranks(
            [sys.executable, "-m", "megatron_syne.train", "--config", f"{folder}/run.yaml"], point.world
        )
        if code:
            sys.exit(f"cost.py: {point} ended with {code}")
        lines = map(json.loads, (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines())
        rows = [line for line in lines if "step_seconds" in line][WARM:]
        return statistics.median(row["step_seconds"] for row in rows), rows[-1]["peak_memory_bytes"]


def read_table(path: Path) -> dict[str, list[Cost]]:
    """The rows of a printed table, by axis."""
    found: dict[str, list[Cost]] = {}
    for line in path.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 6 and cells[0] in AXES:
            axis, value, milliseconds, _, per_flop, megabytes = cells
            row = Cost(value, *(float(cell.replace(",", "")) for cell in (milliseconds, per_flop, megabytes)))
            found.setdefault(axis, []).append(row)
    if not found:
        sys.exit(f"cost.py: {path} holds no table of this benchmark")
    return found


def measure_all(steps: int) -> dict[str, list[Cost]]:
    """Every point, printed as it is found."""
    found: dict[str, list[Cost]] = {}
    print("| axis | value | ms per step | tokens/s | per FLOP | rank 0, MB |\n|---|---|---|---|---|---|")
    seen = {BASE: measure(BASE, steps)}
    base = seen[BASE][0] / (BASE.flops * BASE.seq_length)
    for axis, points in AXES.items():
        for point in points:
            if point not in seen:
                seen[point] = measure(point, steps)
            seconds, memory = seen[point]
            per_flop = seconds / (point.flops * point.seq_length) / base
            found.setdefault(axis, []).append(
                Cost(label(axis, point), seconds * 1000, per_flop, memory / 1e6)
            )
            print(
                f"| {axis} | {label(axis, point)} | {seconds * 1000:.1f} | "
                f"{SAMPLES * point.seq_length / seconds:,.0f} | {per_flop:.2f} | {memory / 1e6:.0f} |",
                flush=True,
            )
    print(f"\n{os.cpu_count()} CPUs, {time.strftime('%Y-%m-%d')}")
    return found


def main() -> None:
    """Measure every point and print the table, or read it; draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("cost.png"))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--table", type=Path, help="draw the table in this file; nothing is measured")
    parser.add_argument(
        "--cpus", type=int, default=os.cpu_count(), help="with --table: CPUs it was measured on"
    )
    options = parser.parse_args()
    found = read_table(options.table) if options.table else measure_all(options.steps)
    draw_cost(
        options.output,
        found,
        f"Cost of a training step on {options.cpus} CPUs: fp32, {SAMPLES} samples a step; base {BASE.layers} layers, "
        f"hidden size {BASE.hidden}, {BASE.seq_length} tokens, one rank",
    )


if __name__ == "__main__":
    main()
