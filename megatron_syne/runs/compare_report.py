"""What a comparison found, in words for a terminal and as an object for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_syne.runs.compare import Comparison, Difference, Result
from megatron_syne.runs.history import History
from megatron_syne.runs.text import readable


def report(a: History, b: History, result: Result, tolerance: float, relative: bool) -> str:
    """The table: who is compared, then each metric."""
    names = [f"{who}  {each.path}" for who, each in (("A", a), ("B", b))]
    width = max(map(len, names))
    blocks = [
        "\n".join(
            f"{name:{width}}  steps to {each.last_step:,}" for name, each in zip(names, (a, b), strict=True)
        )
    ]
    blocks += [_block(each, _allowed(tolerance, relative)) for each in result.metrics]
    if result.left_out:
        blocks.append("\n".join(f"not compared: {each}" for each in result.left_out))
    if result.equal:
        steps = any(each.only_a or each.only_b for each in result.metrics)
        but = ", but not at the same steps" if steps else ", but not of the same metrics"
        blocks.append(f"equal {_allowed(tolerance, relative)}{'' if result.same_steps else but}")
    else:
        first = min((each.first for each in result.metrics if each.first), key=lambda each: each.step)
        blocks.append(f"differ first at step {first.step:,}")
    return "\n\n".join(blocks)


def as_object(a: History, b: History, result: Result, tolerance: float, relative: bool) -> dict[str, Any]:
    """For JSON; a NaN becomes null there."""
    return {
        "equal": result.equal,
        "same_steps": result.same_steps,
        "tolerance": tolerance,
        "relative": relative,
        **{
            who: {
                "path": readable(str(each.path)),
                "last_step": each.last_step,
                "broken": each.broken,
                "problems": [readable(problem) for problem in each.problems],
            }
            for who, each in (("a", a), ("b", b))
        },
        "metrics": {
            each.metric: {
                "common_steps": len(each.steps),
                "differing_steps": each.differing,
                "first": _object(each.first),
                "largest": _object(each.largest),
                "last": _object(each.last),
                "only_a": each.only_a.tolist(),
                "only_b": each.only_b.tolist(),
            }
            for each in result.metrics
        },
        "not_compared": result.left_out,
    }


def ranges(steps: Sequence[int], most: int = 4) -> str:
    """``1-3, 5``: runs of steps that follow one another at the same distance are drawn together."""
    parts: list[str] = []
    at = 0
    while at < len(steps):
        end = at
        while (
            end + 1 < len(steps)
            and steps[end + 1] - steps[end] == steps[min(at + 1, len(steps) - 1)] - steps[at]
        ):
            end += 1
        if end - at == 1:
            end = at  # two say less as a range
        every = steps[at + 1] - steps[at] if end > at else 1
        stride = f" (every {every:,})" if every > 1 else ""
        parts.append(f"{steps[at]:,}" if end == at else f"{steps[at]:,} to {steps[end]:,}{stride}")
        at = end + 1
        if len(parts) == most and at < len(steps):
            parts.append(f"... ({len(steps) - at:,} more)")
            break
    return ", ".join(parts)


def _block(one: Comparison, allowed: str) -> str:
    title = f"{one.metric}: {len(one.steps):,} common steps ({ranges(one.steps)})"
    if one.first is None:
        lines = [f"{title}, equal {allowed}"]
        if one.largest is not None:
            lines.append(_line("largest difference", one.largest))
    else:
        lines = [f"{title}, {one.differing:,} not equal {allowed}"]
        lines.append(_line("first difference", one.first))
        lines.append(_line("largest difference", one.largest or one.first))
        lines.append(_line("last common step", one.last))
    for who, steps in (("A", one.only_a), ("B", one.only_b)):
        if steps:
            lines.append(f"  only in {who}: {len(steps):,} steps, {ranges(steps)}")
    rows = one.around_first()
    if rows:
        width = max(22, *(len(repr(value)) for each in rows for value in (each.a, each.b)))
        lines.append(f"  {'step':>10}  {'A':>{width}}  {'B':>{width}}  {'B - A':>11}")
        for each in rows:
            mark = " <-- first" if one.first is not None and each.step == one.first.step else ""
            amount = f"{each.amount:+11.3e}" if each.rank else f"{'0':>11}"
            lines.append(f"  {each.step:>10,}  {each.a!r:>{width}}  {each.b!r:>{width}}  {amount}{mark}")
    return "\n".join(lines)


def _line(what: str, each: Difference) -> str:
    change = "same" if not each.rank else f"{each.amount:+.3e}, relative {each.relative:.3e}"
    return f"  {what:<19} step {each.step:,}: {each.a!r} -> {each.b!r} ({change})"


def _allowed(tolerance: float, relative: bool) -> str:
    if not tolerance:
        return "to the bit"
    return f"within {tolerance:g}{' of the larger value' if relative else ''}"


def _object(each: Difference | None) -> dict[str, Any] | None:
    if each is None:
        return None
    return {"step": each.step, "a": each.a, "b": each.b, "difference": each.amount, "relative": each.relative}
