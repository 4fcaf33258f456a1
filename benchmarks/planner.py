"""The planner's speeds beside measurements: published rows on H100, and our own on a CPU.

    python benchmarks/planner.py [--fit] [--output benchmarks/results/planner.md]

Writes the tables. ``--fit`` finds the constants of ``planner/stacks.py`` again from the fitted rows and prints them
beside those in use. Needs neither torch nor a GPU; takes seconds.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from cost import AXES, BASE, SAMPLES, Point, label  # noqa: E402

from megatron_syne.config.schema import (  # noqa: E402
    DataConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    TrainConfig,
)
from megatron_syne.models.config import resolve_model  # noqa: E402
from megatron_syne.planner.calibration import FITTED, IN_USE, error, fit, solve, with_constants  # noqa: E402
from megatron_syne.planner.hardware import GPUS  # noqa: E402
from megatron_syne.planner.published import ROWS, Row, prediction  # noqa: E402
from megatron_syne.planner.speed import step_time  # noqa: E402
from megatron_syne.planner.stacks import Stack  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


def published_tables() -> str:
    """Every published row beside its prediction, and the errors by use."""
    lines = [
        "| row | layout | GBS/MBS | GPUs | measured | predicted | error | bubble | MFU | use |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        time = prediction(row)
        lines.append(
            f"| {row.name} | {layout_of(row)} | {row.global_batch}/{row.micro_batch} | {row.gpus} | "
            f"{row.tokens_per_second:,.0f} | {time.tokens_per_second_per_gpu:,.0f} | {error(row):+.1%} | "
            f"{time.bubble:.1%} | {time.mfu:.1%} | {row.use} |"
        )
    lines += ["", "| rows | number | median error | worst |", "|---|---|---|---|"]
    for name, uses in (
        ("counted", ("fitted", "unfitted")),
        ("fitted", ("fitted",)),
        ("unfitted", ("unfitted",)),
        ("extra", ("extra",)),
    ):
        errors = [abs(error(row)) for row in ROWS if row.use in uses]
        lines.append(f"| {name} | {len(errors)} | {statistics.median(errors):.1%} | {max(errors):.1%} |")
    return "\n".join(lines)


def layout_of(row: Row) -> str:
    """What is cut, what is computed again, on which software."""
    sizes = [
        f"{name}{size}"
        for name, size in (("TP", row.tp), ("PP", row.pp), ("VPP", row.vpp), ("CP", row.cp))
        if size and size > 1
    ]
    again = ["full recompute"] if row.full_recompute else ["selective"] if row.stack.selective_ops else []
    return ", ".join([" ".join(sizes) or "DP", row.stack.name, *again])


def sources() -> str:
    """Where each row is from and what its source leaves open."""
    lines = ["| row | source | left open |", "|---|---|---|"]
    lines += [f"| {row.name} | {row.source} | {row.note or '-'} |" for row in ROWS]
    return "\n".join(lines)


OTHER_FITS: tuple[tuple[str, dict[str, tuple[str, ...]]], ...] = (
    ("as in use", {}),
    ("the four rows chosen first, torchtitan's TP as ours", {"torchtitan: tp_exposed": ()}),
    ("FP8 from Megatron-Bridge 25.11", {"fp8_share": ("8B FP8 FSDP, 25.11",)}),
    ("FP8 from 70B of 25.02", {"fp8_share": ("70B FP8 TP4 PP4 CP2",)}),
    ("FP8 between 24.12 and 25.02", {"fp8_share": ("8B FP8 CP2", "8B FP8 CP2, 24.12")}),
    ("torchtitan's rates from eager", {"torchtitan: rates": ("8B bf16 torchtitan eager",)}),
    ("torchtitan's TP from 8B", {"torchtitan: tp_exposed": ("8B bf16 torchtitan TP8",)}),
    ("torchtitan's TP from 70B", {"torchtitan: tp_exposed": ("70B bf16 torchtitan TP8",)}),
)


def other_fits() -> str:
    """What other rows would have given: errors over the counted rows that the fit in question did not use."""
    lines = [
        "| fit | constants | unfitted rows | median error | worst | which |",
        "|---|---|---|---|---|---|",
    ]
    for name, changes in OTHER_FITS:
        fitted = {constant: rows for constant, rows in (FITTED | changes).items() if rows}
        constants = fit(fitted)
        used = {row for rows in fitted.values() for row in rows}
        errors = {
            row.name: error(with_constants(row, constants))
            for row in ROWS
            if row.use != "extra" and row.name not in used
        }
        worst = max(errors, key=lambda row: abs(errors[row]))
        lines.append(
            f"| {name} | {', '.join(f'{value:.3f}' for value in constants.values())} | {len(errors)} | "
            f"{statistics.median(map(abs, errors.values())):.1%} | {errors[worst]:+.1%} | {worst} |"
        )
    return "\n".join(lines)


CPUS = 2
CPU_STACK = Stack(
    "CPU platform, fp32", 1.0, 1.0, 1.0, 0.5, 0.5, memory_share=1.0, link_share=1.0, elementwise_passes=3.0
)
"""Products at the calibrated rate, attention without the causal half, element-wise work unfused."""


def cpu_seconds(point: Point, rate: float) -> float:
    """Predicted step of a row of ``cost.py``: each rank one CPU of ``rate`` FLOP/s, more ranks than CPUs share them."""
    slower = max(1.0, point.world / CPUS)
    cpu = replace(
        GPUS["h100"],
        name="one CPU",
        bf16_flops=2 * rate / slower,  # fp32 counts as half of it
        fp8_flops=0.0,
        memory_bandwidth=10e9 / slower,
        nvlink_bandwidth=2e9 / slower,
        network_bandwidth=2e9 / slower,
    )
    config = RunConfig(
        run_dir="run",
        platform="cpu",
        model=point.model,
        parallel=ParallelConfig(
            tensor_model_parallel_size=point.tp,
            pipeline_model_parallel_size=point.pp,
            context_parallel_size=point.cp,
            sequence_parallel=point.tp > 1,
            cp_comm_type="all_gather",
        ),
        data=DataConfig(seq_length=point.seq_length, mock=True),
        precision=PrecisionConfig(params_dtype="fp32"),
        train=TrainConfig(micro_batch_size=1, global_batch_size=SAMPLES, train_iters=1),
    )
    return step_time(config, resolve_model(config.model), point.world, cpu, stack=CPU_STACK).seconds


def cpu_table() -> str:
    """``results/training.md``'s table of costs beside predictions; the base row gives the rate."""
    text = (RESULTS / "training.md").read_text().partition("## Cost of a step")[2]
    measured = {
        (axis, value): float(milliseconds) / 1000
        for axis, value, milliseconds in re.findall(
            r"^\| (\w+) \| ([\w ]+) \| ([\d.]+) \|", text, re.MULTILINE
        )
    }
    base = measured["ranks", "1"]
    rate = solve(lambda x: base - cpu_seconds(BASE, x), 1e8, 1e12)
    lines = ["| axis | value | measured, ms | predicted, ms | error |", "|---|---|---|---|---|"]
    for axis, points in AXES.items():
        for point in points:
            key = axis, label(axis, point)
            if key in measured:
                seconds = cpu_seconds(point, rate)
                lines.append(
                    f"| {axis} | {key[1]} | {measured[key] * 1000:,.0f} | {seconds * 1000:,.0f} | "
                    f"{seconds / measured[key] - 1:+.0%} |"
                )
    return f"Rate from the base row: {rate / 1e9:.1f} GFLOP/s per process.\n\n" + "\n".join(lines)


HEAD = """# The planner's speeds beside measurements

`python benchmarks/planner.py`. Tokens/s per GPU of Llama-3 on H100, sequence 8,192 unless the row says otherwise.
Error: predicted over measured, less 1. **fitted** rows gave the constants in `planner/stacks.py`, **unfitted**
ones are predictions alone; **extra** ones are shown and not counted: they are not in the list of peers that the goal
(median at most 7 %, worst at most 15 %) is set on, or leave too much open. MFU is of the format's peak, causal
attention counted once.
"""

READING = """## What to make of it

- Not a blind test. Four of the fitted rows were chosen before any error was computed; the form of the model was then
  changed four times with the errors of all rows in view, and two rows (bf16, torchtitan TP 8) became fitted because
  they and their FP8 twins had been missed by up to 26 %. `planner/calibration.py` lists the steps with their errors. By
  the table of other fits below the median stays at 2.5 to 4.4 % in all but one of them; the worst error does not: the
  15 % are met by three of eight. Nothing here has been run by us on a GPU.
- One configuration, two measurements: 8B FP8 CP2 gave 12,273 (NeMo 24.12) and 13,882 (25.02), 13 % apart; 70B FP8
  TP4 PP8 of one batch 1,621 to 1,664. No prediction from the configuration can be nearer to both than half of that.
  The worst error of all is the older of the first pair.
- Rows of Megatron-Bridge since 25.09 are all faster than predicted, by 3 to 7 %: newer kernels than the fitted ones.
- torchtitan's rows need their own two constants: GPUs at 500 W and HBM2e, FlashAttention 2, async TP. The TP 8 rows
  are the weakest, in both directions.
- Too fast: sequences of 32k and more on torchtitan, by 12 to 62 % (its CP of 2024, and FlashAttention 2; there are no
  published rows of megatron-core at such lengths to hold ours to); 405B, by 17 to 48 % (the cut and the micro-batch
  are guesses; thousands of GPUs lose more than the formulas know). Take both as upper bounds.
- Blockwise FP8, offloading, frozen parameters (counted as if they trained) and all GPUs but the H100 have no
  measurement here; of others the H100's shares of the peak are taken. Delays of kernels and messages are not counted:
  a small model on many GPUs is slower than predicted.

## The same with other rows fitted

The errors are over the rows that the fit in question did not use. Constants in the order of `calibration.FITTED`.
"""

CPU = """## On a CPU

`benchmarks/results/training.md`'s costs of a step (fp32, 8 samples a step, random tokens) beside the same formulas
with a CPU in place of the GPU: one rate from the base row (4 layers, width 256, 256 tokens, one process), 10 GB/s of
memory and 2 GB/s between processes assumed, more processes than 2 share the CPUs. It says where the formulas carry
over, no more: `tools/plan.py` plans GPUs.
"""

CPU_READING = """
- Layers: the formulas hold to 3 %; a step grows as the work.
- Width: one rate does not fit all (-15 to +12 %): a CPU's products of 128 reach less of it, those of 512 and more up to
  a tenth more.
- Sequence: within 20 % up to 2,048 tokens, since the CPU platform too has a kernel that never writes out the scores.
- Ranks: DP and PP come within 12 %; TP and CP cost up to twice what is predicted, as the delays of many small messages
  over gloo are not in the formulas, and the products that are cut are small already.
"""


def main() -> None:
    """Predict, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "planner.md")
    parser.add_argument("--fit", action="store_true", help="fit the constants again and print them")
    options = parser.parse_args()
    if options.fit:
        for name, value in fit().items():
            print(f"{name:24} {value:.4f}  in use {IN_USE[name]:.4f}")
    pieces = [
        HEAD,
        published_tables() + "\n",
        READING,
        other_fits() + "\n",
        "## Sources\n",
        sources() + "\n",
        CPU,
        cpu_table(),
        CPU_READING,
    ]
    text = "\n".join(pieces)
    print(text)
    options.output.write_text(text.rstrip() + "\n")


if __name__ == "__main__":
    main()
