"""A plan as plain JSON, for the ledger in a checkpoint, and back with everything checked. No torch."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from megatron_syne.data.mixture.interleave import MOST_SAMPLES, counts_before
from megatron_syne.data.mixture.plan import MixturePlan, Segment, StageRequest, based
from megatron_syne.errors import DataError

_KINDS = {"str": str, "int": int, "tuple[float, ...]": float, "tuple[int, ...]": int}


def plan_to_dict(plan: MixturePlan) -> dict[str, Any]:
    """Plain JSON; :func:`plan_from_dict` gives an equal plan."""
    return {
        "request": plan.request,
        "seed": plan.seed,
        "sources": list(plan.sources),
        "packing": plan.packing,
        "global_batch_size": plan.global_batch_size,
        "inherited": plan.inherited,
        "asked": [
            {
                **stage._asdict(),
                "shares": dict(stage.shares),
                "rampup_batch_size": list(stage.rampup_batch_size),
            }
            for stage in plan.asked
        ],
        "segments": [
            {
                key: list(value) if isinstance(value, tuple) else value
                for key, value in vars(segment).items()
                if key != "pattern" or segment.pattern != segment.counts
            }
            for segment in plan.segments
        ],
    }


def plan_from_dict(data: Any, where: str = "plan") -> MixturePlan:
    """The plan of :func:`plan_to_dict`; DataError names the field that is not as it must be.

    An account from before stages had batches of their own lacks ``inherited`` and, in its stages, the batch:
    there was none but the run's. Its segments lack the micro-batch.
    """
    batch = _get(data, "global_batch_size", int, where)
    sources = tuple(_list(data, "sources", str, where))
    asked = []
    for n, entry in enumerate(_list(data, "asked", dict, where)):
        at = f"{where}.asked[{n}]"
        shares = _get(entry, "shares", dict, at)
        flat = tuple((name, float(_get(shares, name, float, f"{at}.shares"))) for name in shares)
        if unknown := set(shares) - set(sources):
            raise DataError(f"{at}.shares: {sorted(unknown)} not in {where}.sources")
        asked.append(
            StageRequest(
                _get(entry, "name", str, at),
                _get(entry, "tokens", int, at),
                _get(entry, "seq_length", int, at),
                flat,
                _get({"global_batch_size": batch, **entry}, "global_batch_size", int, at),
                tuple(_list({"rampup_batch_size": [], **entry}, "rampup_batch_size", int, at)),
            )
        )
        if len(asked[-1].rampup_batch_size) not in (0, 3):
            raise DataError(f"{at}.rampup_batch_size: expected 3 numbers or none")
    packing = _get(data, "packing", str, where)
    if packing not in ("concatenated", "best_fit"):
        raise DataError(f"{where}.packing: expected concatenated or best_fit, found {packing!r}")
    segments = [
        _segment(entry, len(sources), f"{where}.segments[{n}]")
        for n, entry in enumerate(_list(data, "segments", dict, where))
    ]
    if not segments:
        raise DataError(f"{where}.segments: empty; a run has at least one")
    end = 0
    for n, (segment, right) in enumerate(zip(segments, based(sources, packing, segments), strict=True)):
        at = f"{where}.segments[{n}]"
        if segment.first_sample != end:
            raise DataError(f"{at}.first_sample: expected {end}, found {segment.first_sample}")
        if segment.bases != right.bases:
            raise DataError(f"{at}.bases: expected {list(right.bases)}, found {list(segment.bases)}")
        if segment.stage not in [stage.name for stage in asked]:
            raise DataError(f"{at}.stage: {segment.stage!r} is not in {where}.asked")
        end = segment.end
    plan = MixturePlan(
        seed=_get(data, "seed", int, where),
        sources=sources,
        packing=packing,
        global_batch_size=batch,
        asked=tuple(asked),
        segments=tuple(segments),
        inherited=_get({"inherited": 0, **data}, "inherited", int, where),
    )
    if _get(data, "request", str, where) != plan.request:
        raise DataError(f"{where}.request: is not the digest of {where}.asked: the record was changed")
    return plan


def _segment(entry: dict[str, Any], columns: int, where: str) -> Segment:
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Segment):
        kind, name = _KINDS[str(field.type)], field.name
        if name == "pattern" and name not in entry:
            values[name] = values["counts"]
        elif name == "micro_batch_size" and name not in entry:
            values[name] = 1
        elif str(field.type).startswith("tuple"):
            values[name] = tuple(kind(value) for value in _list(entry, name, kind, where))
            if len(values[name]) != columns:
                raise DataError(f"{where}.{name}: expected {columns} numbers, found {len(values[name])}")
        else:
            values[name] = _get(entry, name, kind, where)
    segment = Segment(**values)
    for name in ("samples", "iterations", "global_batch_size", "seq_length", "micro_batch_size"):
        if values[name] < 1:
            raise DataError(f"{where}.{name}: must be at least 1, found {values[name]}")
    if segment.samples != segment.iterations * segment.global_batch_size:
        raise DataError(
            f"{where}.samples: expected iterations x global_batch_size = "
            f"{segment.iterations * segment.global_batch_size}, found {segment.samples}"
        )
    if not segment.samples <= sum(segment.pattern) <= MOST_SAMPLES:
        raise DataError(f"{where}.pattern: its sum {sum(segment.pattern)} does not reach {segment.samples}")
    if counts_before(segment.pattern, segment.samples) != segment.counts:
        raise DataError(f"{where}.counts: are not what the pattern gives: {list(segment.counts)}")
    return segment


def _list(data: Any, key: str, kind: type, where: str) -> list[Any]:
    values = _get(data, key, list, where)
    for n, value in enumerate(values):
        _check(value, kind, f"{where}.{key}[{n}]")
    return list(values)


def _get(data: Any, key: str, kind: type, where: str) -> Any:
    if not isinstance(data, dict):
        raise DataError(f"{where}: expected an object, found {type(data).__name__}")
    if key not in data:
        raise DataError(f"{where}.{key}: missing")
    _check(data[key], kind, f"{where}.{key}")
    return data[key]


def _check(value: Any, kind: type, where: str) -> None:
    right = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    if not right or (isinstance(value, bool) and kind is not bool):
        raise DataError(f"{where}: expected {kind.__name__}, found {value!r}")
    if kind in (int, float) and not (value >= 0 and math.isfinite(value)):
        raise DataError(f"{where}: expected a number of at least 0, found {value!r}")
