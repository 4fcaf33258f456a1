"""What is measured on one GPU, in order of importance: name, shape, precision, options. No torch.

Every case runs in a process of its own (``suite.py``), so one that fails takes nothing with it. ``tiny`` shapes are
for a rehearsal on a CPU: everything runs, no figure means anything.
"""

from __future__ import annotations

from dataclasses import replace

from case import FFN, FP8, GROUPS, HEADS, HIDDEN, MODULES, TINY, VOCABULARY, Case
from change_cases import CHANGES
from goal_cases import LAST, MAIN

__all__ = [
    "CASES",
    "FFN",
    "FP8",
    "GROUPS",
    "HEADS",
    "HELD_OUT",
    "HIDDEN",
    "MODULES",
    "TINY",
    "VOCABULARY",
    "Case",
    "case_named",
    "tiny",
]

HELD_OUT = "held-out"
"""The case that the planner is never calibrated with."""

CASES: tuple[Case, ...] = (*MAIN, LAST[-1], *LAST[:2], *CHANGES[:9], *LAST[2:-1], *CHANGES[9:])
"""All, in the order in which they are measured."""


def case_named(name: str) -> Case:
    """The case; raises SystemExit that names them all."""
    for case in CASES:
        if case.name == name:
            return case
    raise SystemExit(f"--case {name}: unknown; there are {', '.join(case.name for case in CASES)}")


_CUDA_ONLY = (
    "precision.fp8_param_gather",
    "optimizer.optimizer_cpu_offload",
    "optimizer.optimizer_offload_fraction",
)


def tiny(case: Case) -> Case:
    """The case as a CPU can run it in seconds; its widths are ``TINY``'s. Options of CUDA alone are left out."""
    overrides = []
    for text in case.overrides:
        key, _, value = text.partition("=")
        if key == "memory.loss_chunk_tokens":
            value = "48"
        elif key == "memory.recompute_num_layers":
            value = "1"
        if key not in _CUDA_ONLY:
            overrides.append(f"{key}={value}")
    between = "precision.first_last_layers_bf16=true" in case.overrides  # else none would be left in FP8
    return replace(
        case,
        num_layers=min(case.num_layers, 2 + between),
        seq_length=128,
        steps=3,
        warm=2,
        overrides=tuple(overrides),
    )
