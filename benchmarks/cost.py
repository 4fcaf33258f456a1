"""Cost of a step as layers, width, sequence and ranks grow: a table and a picture.

    python benchmarks/cost.py --output cost.png [--steps 8]

A small Llama on the CPU platform, fp32, random tokens; one axis varies, the others stay at the base. Each row is a run
of its own: the median of its steps after the first three (with all that watches a run), and the peak of resident
memory of rank 0. "per FLOP" is the time divided by that of the base times the model's own count of floating-point
operations (6 x parameters in matrices + 6 x layers x sequence x heads x head size per token, causal attention counted
once): 1.0 means that the cost grows as the arithmetic does.
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
from megatron_syne.pictures.canvas import picture  # noqa: E402

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
    def flops(self) -> float:
        """Floating-point operations of one token, forward and backward."""
        heads, head = 8, self.hidden // 8
        layer = self.hidden * self.hidden * 2 + 2 * self.hidden * head * 4 + 3 * self.hidden * 3 * self.hidden
        matrices = self.layers * layer + VOCABULARY * self.hidden
        return 6.0 * matrices + 6.0 * self.layers * self.seq_length * heads * head


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


def draw(path: Path, found: dict[str, list[tuple[Point, float, float]]]) -> None:
    """Four panels: milliseconds of a step along each axis, and what the arithmetic alone would give."""
    with picture(path, 1400, 900, rows=2, columns=2) as axes:
        for panel, (axis, rows) in zip(axes, found.items(), strict=True):
            names = [label(axis, point) for point, _, _ in rows]
            values = [seconds * 1000 for _, seconds, _ in rows]
            if axis == "ranks":
                panel.bar(names, values, color="#4878a8")
                panel.set_xlabel(f"layout (on {os.cpu_count()} CPUs)")
            else:
                base = next(
                    seconds / (point.flops * point.seq_length) for point, seconds, _ in rows if point == BASE
                )
                panel.plot(names, values, "o-", color="#4878a8", label="measured")
                panel.plot(
                    names,
                    [1000 * base * point.flops * point.seq_length for point, _, _ in rows],
                    "--",
                    color="#888888",
                    label="as the arithmetic grows",
                )
                panel.set_yscale("log")
                panel.legend()
                panel.set_xlabel({"layers": "layers", "width": "hidden size", "sequence": "tokens"}[axis])
            panel.set_title(f"step time by {axis}")
            panel.set_ylabel("ms per step")
            panel.grid(alpha=0.3)


def main() -> None:
    """Measure every point, print the table, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("cost.png"))
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    found: dict[str, list[tuple[Point, float, float]]] = {}
    seen: dict[Point, tuple[float, float]] = {}
    print("| axis | value | ms per step | tokens/s | per FLOP | rank 0, MB |\n|---|---|---|---|---|---|")
    seen[BASE] = measure(BASE, options.steps)
    base = seen[BASE][0] / (BASE.flops * BASE.seq_length)
    for axis, points in AXES.items():
        for point in points:
            if point not in seen:
                seen[point] = measure(point, options.steps)
            seconds, memory = seen[point]
            found.setdefault(axis, []).append((point, seconds, memory))
            print(
                f"| {axis} | {label(axis, point)} | {seconds * 1000:.1f} | "
                f"{SAMPLES * point.seq_length / seconds:,.0f} | "
                f"{seconds / (point.flops * point.seq_length) / base:.2f} | {memory / 1e6:.0f} |",
                flush=True,
            )
    draw(options.output, found)
    print(f"\n{os.cpu_count()} CPUs, {time.strftime('%Y-%m-%d')}")


if __name__ == "__main__":
    main()
