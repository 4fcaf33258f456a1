"""The goals of the measurements, judged by the records alone. No torch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from case import FP8
from record import Record

MATMUL = "bf16 8192^3"
"""The rate of ``machine`` that the goals are held to."""
PEERS = ("8l-transformers", "8l-compiled")
Records = Mapping[str, Record]


def measured(records: Records, name: str) -> Record | None:
    """The record of a case that has figures."""
    record = records.get(name)
    return None if record is None or record.error else record


def matmul_rate(records: Records) -> float | None:
    """The measured rate that goals are held to, FLOP/s."""
    machine = measured(records, "machine")
    return None if machine is None else machine.found.get(MATMUL)


def ratio(mine: float | None, theirs: float | None) -> float | None:
    """One over the other, None where one is not known."""
    return mine / theirs if mine is not None and theirs else None


def tokens_rate(records: Records, *names: str) -> float | None:
    """The best tokens/s of these cases, None where none is measured."""
    rates = [record.tokens_per_second for name in names if (record := measured(records, name)) is not None]
    known = [rate for rate in rates if rate is not None]
    return max(known) if known else None


def goals(records: Records) -> list[tuple[str, str, float | None, bool | None]]:
    """(goal, what is needed, what was found, whether it is met); None = not measured."""
    bf16 = measured(records, "8l-bf16")
    flops = None if bf16 is None else bf16.model_flops_per_second
    ours, fp8 = tokens_rate(records, "8l-bf16"), tokens_rate(records, *(f"8l-{recipe}" for recipe in FP8))
    peer, fp8_peer = tokens_rate(records, *PEERS), tokens_rate(records, "8l-compiled-tensorwise")
    spent = None if bf16 is None else bf16.found["loader_share"] + bf16.found["logger_share"]
    whole = measured(records, "8b-bf16") or measured(records, "8b-on-80gib")
    text = (
        whole is not None and whole.found.get("tokens") == "real text"
    )  # random tokens have nothing to learn
    fall = falling(whole.losses) if whole is not None and text else None
    at_least = (
        ("bf16, share of the measured matmul rate", 0.60, ratio(flops, matmul_rate(records))),
        ("best FP8 recipe over bf16, tokens/s", 1.35, ratio(fp8, ours)),
        ("bf16 over the best peer in bf16, tokens/s", 1.15, ratio(ours, peer)),
        ("best FP8 recipe over the best peer in bf16, tokens/s", 1.40, ratio(fp8, peer)),
        ("best FP8 recipe over the best peer in FP8, tokens/s", 1.0, ratio(fp8, fp8_peer)),
    )
    rows: list[tuple[str, str, float | None, bool | None]] = [
        (goal, f">= {least:.2f}", found, None if found is None else found >= least)
        for goal, least, found in at_least
    ]
    rows.append(
        ("loader and logger, share of a step", "<= 0.005", spent, None if spent is None else spent <= 0.005)
    )
    rows.append(
        (
            "8B, 32 layers: loss on real text falls over 30 steps, nats",
            "> 0",
            fall,
            None if fall is None else fall > 0,
        )
    )
    return rows


def falling(losses: Sequence[float]) -> float | None:
    """Mean of the first five losses less that of the last five; None below ten steps."""
    return None if len(losses) < 10 else statistics.mean(losses[:5]) - statistics.mean(losses[-5:])
