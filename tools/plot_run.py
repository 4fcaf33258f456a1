"""Draw a run, or several beside each other: one PNG, or one HTML page that needs no server and no network.

    python tools/plot_run.py runs/zh --output run.png
    python tools/plot_run.py runs/zh runs/zh_lr2 --output both.html --x tokens
    python tools/plot_run.py runs/zh --metrics "loss,validation/*" --smooth 20 --from-step 100 --output loss.png

Loss whole and by source, validation, learning rate, gradient norm, speed, parts of a step's time, memory and the
mixture as it was read; stages are marked. A run can be drawn while it is being written; what cannot be read is
named on stderr, and the rest is drawn. Exit codes: 64 wrong option or metric, 65 nothing can be read, 66 no such
input, 73 the picture cannot be created.
"""

from __future__ import annotations

import sys

from megatron_syne.errors import run_cli
from megatron_syne.runs import plot_cli


def main(argv: list[str] | None = None) -> int:
    return plot_cli.main(__doc__, argv)


if __name__ == "__main__":
    sys.exit(run_cli(main))
