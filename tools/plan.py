"""Plan before spending: does a run fit, how fast is it, what does it cost, which layout is best and why.

    python tools/plan.py --config run.yaml
    python tools/plan.py --config run.yaml --search --plot pictures/
    python tools/plan.py --model llama3_8b --gpus 64 --seq-length 8192 --global-batch-size 512 --tokens 100B
    python tools/plan.py --model weights/Meta-Llama-3-70B --gpu h100 --gpus 64 --seq-length 8192 \\
        --global-batch-size 128 --precision tensorwise --search
    python tools/plan.py --config run.yaml --search --gpus 64 128 256        a line for each number of GPUs

Nothing is started and no GPU is needed. A configuration is read and checked as by the trainer; what cannot run is
refused with the same words. Predictions are closed formulas; the last lines say how far they were off where
others have published what they measured, and whether the plan lies outside of that. Exit codes: 0 planned, 1
planned and does not fit, 64 wrong option or configuration, 65 damaged input, 66 no such input, 73 a picture cannot
be created.
"""

from __future__ import annotations

import os
import sys

from megatron_syne.errors import run_cli
from megatron_syne.planner.cli import main as plan


def main() -> int:
    try:
        return plan(description=__doc__)
    except BrokenPipeError:  # the reader has seen enough (head, less)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
