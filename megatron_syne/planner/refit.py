"""The speed model's constants from measurements of our own, all at once. No torch.

``calibration`` takes one constant from one published row; measurements of one machine that differ in one thing each
tell several constants apart together: batches of more micro-batches the share of the memory bandwidth (by the
optimizer), longer sequences the attention's rate, fewer layers the output layer from the rest. Least squares of the
logarithms of predicted over measured seconds; each constant is also held to the one in use, as loosely as
:data:`SPREAD` says, so that what the rows say nothing of stays as it is. Passes of element-wise work, 3 % of a step,
are not among them: no row tells them from the products.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_syne.config.schema import RunConfig
from megatron_syne.models.config import resolve_model
from megatron_syne.planner.hardware import Gpu
from megatron_syne.planner.speed import step_time
from megatron_syne.planner.stacks import Stack

PLAIN = ("bf16_share", "memory_share", "chunked_passes")
RECIPES = ("delayed", "tensorwise", "blockwise")
SPREAD = {
    "bf16_share": 0.15,
    "memory_share": 0.15,
    "attention": 0.3,
    "chunked_passes": 1.5,
    "delayed": 0.3,
    "tensorwise": 0.3,
    "blockwise": 0.5,
}
"""Constant -> how far off (of its logarithm) it is thought to be before anything is measured: an assumption, which
matters only where the rows leave a constant open. ``attention`` is of both its shares; the names of recipes are of FP8
products under them."""
NOISE = 0.001
"""How far off a measured step is, of its logarithm. Rows that are off by 0.3 % moved the rates of a made-up machine by
up to 8 % and ``chunked_passes``, of which little depends, by half, but what they say of the case held out by 1 %."""


@dataclass(frozen=True)
class Observation:
    """One run that was measured on one GPU."""

    name: str
    config: RunConfig
    seconds: float
    """Of a step."""
    gpu: Gpu
    stack: Stack
    """Software as it is known before: the fit changes its constants."""


def with_constants(stack: Stack, constants: Mapping[str, float]) -> Stack:
    """The software with other constants; ``attention`` is a factor on both shares, and 1 where it is not given."""
    plain: dict[str, Any] = {name: constants[name] for name in PLAIN if name in constants}
    recipes = {name: constants[name] for name in RECIPES if name in constants}
    factor = constants.get("attention", 1.0)
    return replace(
        stack,
        attention_forward_share=factor * stack.attention_forward_share,
        attention_backward_share=factor * stack.attention_backward_share,
        recipe_shares={**stack.recipe_shares, **recipes},
        **plain,
    )


def in_use(stack: Stack) -> dict[str, float]:
    """Every constant's present value, by the names of :data:`SPREAD`."""
    shares = {recipe: stack.recipe_shares.get(recipe, stack.fp8_share) for recipe in RECIPES}
    return {
        "bf16_share": stack.bf16_share,
        "memory_share": stack.memory_share,
        "attention": 1.0,
        "chunked_passes": stack.chunked_passes,
        **shares,
    }


def predicted_seconds(one: Observation, constants: Mapping[str, float]) -> float:
    """Of a step of the observed run, with these constants."""
    stack = with_constants(one.stack, constants)
    return step_time(one.config, resolve_model(one.config.model), 1, one.gpu, stack=stack).seconds


def identified(observations: Sequence[Observation]) -> list[str]:
    """The constants that some row depends on: an FP8 recipe and a loss in parts need a row of their own."""
    absent = {*RECIPES, "chunked_passes"} - {one.config.precision.fp8 for one in observations}
    if any(one.config.memory.loss_chunk_tokens is not None for one in observations):
        absent.discard("chunked_passes")
    return [name for name in SPREAD if name not in absent]


def refit(observations: Sequence[Observation]) -> dict[str, float]:
    """The constants that :func:`identified` names, as the rows have them. Raises ValueError without a row.

    Gauss and Newton's steps on the logarithms, derivatives by small differences.
    """
    if not observations:
        raise ValueError("no measured row to fit the constants to")
    names, start = identified(observations), in_use(observations[0].stack)
    logs, small = [0.0] * len(names), 1e-4

    def residuals(logs: Sequence[float]) -> list[float]:
        constants = {name: start[name] * math.exp(log) for name, log in zip(names, logs, strict=True)}
        return [math.log(predicted_seconds(one, constants) / one.seconds) / NOISE for one in observations] + [
            log / SPREAD[name] for name, log in zip(names, logs, strict=True)
        ]

    for _ in range(12):
        here = residuals(logs)
        slopes = []
        for column in range(len(names)):
            moved = [log + small * (number == column) for number, log in enumerate(logs)]
            slopes.append([(a - b) / small for a, b in zip(residuals(moved), here, strict=True)])
        normal = [[_dot(a, b) for b in slopes] for a in slopes]
        step = _solved(normal, [-_dot(slope, here) for slope in slopes])
        logs = [log + max(-0.5, min(0.5, change)) for log, change in zip(logs, step, strict=True)]
        if max(map(abs, step)) < 1e-7:
            break
    return {name: start[name] * math.exp(log) for name, log in zip(names, logs, strict=True)}


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def _solved(matrix: list[list[float]], right: list[float]) -> list[float]:
    """x of matrix x = right, by elimination; the matrix is symmetric and positive."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for column, pivot in enumerate(rows):
        for row in rows[column + 1 :]:
            factor = row[column] / pivot[column]
            row[column:] = [
                value - factor * above for value, above in zip(row[column:], pivot[column:], strict=True)
            ]
    result: list[float] = []
    for column in reversed(range(len(rows))):
        known = _dot(rows[column][column + 1 : -1], result)
        result.insert(0, (rows[column][-1] - known) / rows[column][column])
    return result
