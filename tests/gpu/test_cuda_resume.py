"""A run that was stopped goes on: to the bit in ``train.deterministic_mode``, near it without. Not run on a GPU yet."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from .lab import ENVIRONMENT, REPOSITORY, Lab
from .plan import DETERMINISTIC, RECIPES, VARIABLES

pytestmark = pytest.mark.gpu

NEAR = 5e-3
"""Of the loss without the mode: two runs of the same steps differ by the order in which kernels add up."""


def both(lab: Lab, group: str, name: str) -> list[str]:
    """Losses of the two parts of a run."""
    assert lab.result(group, f"{name}.second")["first_step"] == 5
    return lab.hexes(group, f"{name}.first") + lab.hexes(group, f"{name}.second")


def test_bf16_in_deterministic_mode_goes_on_to_the_bit(lab: Lab) -> None:
    assert lab.result("exact", "whole")["deterministic_mode"] or lab.rehearse
    assert both(lab, "exact", "stopped") == lab.hexes("exact", "whole")[:10]


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_in_deterministic_mode_goes_on_to_the_bit(lab: Lab, recipe: str) -> None:
    whole = lab.hexes("exact", f"whole.{recipe}")
    assert whole != lab.hexes("exact", "whole")[:10], "FP8 was not on"
    assert both(lab, "exact", f"stopped.{recipe}") == whole


def test_the_program_itself_goes_on_to_the_bit(lab: Lab) -> None:
    """``python -m megatron_syne.train``, stopped after 5 steps and started again: exit 75 twice, the same losses."""
    if lab.rehearse == "stand-in":
        pytest.skip("rehearsal on stand-in: the program itself finds no GPU")
    run = lab.folder / "program"
    expected = lab.hexes("exact", "whole")[:10]
    for stop in (5, 10):
        done = subprocess.run(
            [sys.executable, "-m", "megatron_syne.train", "--config", str(lab.config), f"run_dir={run}",
             f"platform={lab.platform}", DETERMINISTIC, f"train.exit_interval={stop}"],
            env={**ENVIRONMENT, **VARIABLES["exact"]}, cwd=REPOSITORY, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 75, done.stderr[-3000:]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["loss_hex"] for row in rows] == expected


@pytest.mark.parametrize(("name", "whole"), [("resumed.bf16", "bf16"), ("resumed.delayed", "delayed")])
def test_without_the_mode_it_goes_on_near_it(lab: Lab, name: str, whole: str) -> None:
    found, expected = both(lab, "main", name), lab.hexes("main", whole)[:10]
    pairs = [(float.fromhex(a), float.fromhex(b)) for a, b in zip(found, expected, strict=True)]
    gaps = [abs(a / b - 1) for a, b in pairs]
    same = sum(a == b for a, b in zip(found, expected, strict=True))
    lab.figure(
        "resume without deterministic mode", run=whole, largest_relative_gap=max(gaps), equal_steps=same
    )
    assert len(gaps) == 10 and max(gaps) < NEAR
