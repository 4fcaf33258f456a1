"""Compare two runs, or a run and a golden one: the first step where they differ, and by how much.

    python tools/compare_runs.py runs/a runs/b
    python tools/compare_runs.py tests/golden.json runs/b --tolerance 1e-5 --relative
    python tools/compare_runs.py runs/a runs/b --metrics loss,grad_norm --output difference.png
    python tools/compare_runs.py runs/a --write-golden golden.json

The first is A, the second B. Steps that both have are compared, so a run can be compared while it is being
written; without --tolerance to the bit. Exit codes: 0 equal within the tolerance, 1 they differ (with
--all-steps also where only one has a step), 64 wrong option, 65 nothing in common or an input that is damaged
before its end (a difference found before that is still 1), 66 no such input, 73 a file cannot be created.
"""

from __future__ import annotations

import sys

from megatron_syne.errors import run_cli
from megatron_syne.runs import compare_cli


def main(argv: list[str] | None = None) -> int:
    return compare_cli.main(__doc__, argv)


if __name__ == "__main__":
    sys.exit(run_cli(main))
