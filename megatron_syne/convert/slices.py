"""What lies where in the files: the pieces of each parameter, its padding, and the bytes that no tensor covers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from blake3 import blake3

from megatron_syne.convert.numbers import ITEM_BYTES
from megatron_syne.convert.pieces import Span, matrix
from megatron_syne.convert.streams import Place, Target, TargetFile, Weights
from megatron_syne.errors import DataError

_ZEROS = memoryview(bytes(2**18))


def split_replicas(places: Iterable[Place]) -> tuple[list[Place], list[Place]]:
    """Of all places of a tensor those that make it up once, and those that hold the same rectangles again."""
    seen: set[tuple[Span, Span]] = set()
    first: list[Place] = []
    again: list[Place] = []
    for place in places:
        key = (place.piece.rows, place.piece.cols)
        (again if key in seen else first).append(place)
        seen.add(key)
    return first, again


def check_places(weights: Weights, target: Target) -> None:
    """Raises DataError where the places do not hold every element of every tensor."""
    problems = [f"{name}: no tensor of the source" for name in target.places if name not in weights.shapes]
    for name, shape in weights.shapes.items():
        rows, columns = matrix(shape)
        first, _ = split_replicas(target.places.get(name, []))
        held = sum((r[1] - r[0]) * (c[1] - c[0]) for r, c in ((p.piece.rows, p.piece.cols) for p in first))
        if held != rows * columns:
            problems.append(f"{name}: {held} of {rows * columns} elements have a place in the target")
    if problems:
        raise DataError(
            "\n  ".join([f"the plan does not hold the weights ({len(problems)}):", *problems[:100]])
        )


def places_by_file(places: Iterable[Place]) -> dict[str, list[Place]]:
    """Places of each file, in the order of their bytes."""
    found: dict[str, list[Place]] = {}
    for place in places:
        found.setdefault(place.file, []).append(place)
    for own in found.values():
        own.sort(key=lambda place: (place.offset, place.piece.at))
    return found


def free_spans(size: int, places: Iterable[Place]) -> list[Span]:
    """What of a file of ``size`` bytes no place covers, in order."""
    covered: list[Span] = []
    for place in places:
        start, stride = place.rows_at(place.piece.rows)
        (top, bottom), (left, right) = place.piece.rows, place.piece.cols
        segment = (right - left) * ITEM_BYTES[place.dtype]
        if segment == stride:
            covered.append((start, start + (bottom - top) * stride))
        else:
            covered += [(start + i * stride, start + i * stride + segment) for i in range(bottom - top)]
    free, at = [], 0
    for start, stop in sorted(covered):
        if start > at:
            free.append((at, start))
        at = max(at, stop)
    if at < size:
        free.append((at, size))
    return free


def rest_hash(file: TargetFile, gaps: Iterable[Span]) -> str:
    """BLAKE3 of the bytes of a planned file that no tensor covers: the fixed ones, and zeros."""
    digest = blake3()
    fixed = deque(sorted(file.fixed))
    for start, stop in gaps:
        at = start
        while at < stop:
            while fixed and fixed[0][0] + len(fixed[0][1]) <= at:
                fixed.popleft()
            offset, content = fixed[0] if fixed else (stop, b"")
            if offset <= at:
                end = min(stop, offset + len(content))
                digest.update(memoryview(content)[at - offset : end - offset])
            else:
                end = min(stop, at + len(_ZEROS), offset)
                digest.update(_ZEROS[: end - at])
            at = end
    return digest.hexdigest()


def slices(
    places: Iterable[Place], padding: Callable[[str, Place], list[int] | None]
) -> dict[str, dict[str, Any]]:
    """Of each file its parameters, their pieces as text, and their padding: ``padding(file, last place)``."""
    found: dict[str, dict[str, Any]] = {}
    for file, own in sorted(places_by_file(places).items()):
        parameters: dict[str, list[Place]] = {}
        for place in own:
            parameters.setdefault(place.parameter, []).append(place)
        found[file] = {
            parameter: {
                "pieces": [str(p.piece) for p in parts],
                "padding_rows": padding(file, parts[-1]),
            }
            for parameter, parts in parameters.items()
        }
    return found


def planned_padding(
    files: Iterable[TargetFile], gaps: Mapping[str, list[Span]]
) -> Callable[[str, Place], list[int] | None]:
    """Padding rows after a parameter's last place: what follows it in a planned file and is zero."""
    zeros: dict[str, dict[int, int]] = {}
    for file in files:
        starts = zeros[file.path] = {}
        for start, stop in gaps[file.path]:
            later = [at for at, content in file.fixed if start <= at < stop and content]
            starts[start] = min([stop, *later])

    def padding(file: str, last: Place) -> list[int] | None:
        filled, end = end_of(last)
        stride = last.columns * ITEM_BYTES[last.dtype]
        rows = (zeros[file].get(end, end) - end) // stride
        return [filled, filled + rows] if rows else None

    return padding


def end_of(place: Place) -> tuple[int, int]:
    """(row of the parameter, byte of the file) where a place ends, if it ends a row."""
    (top, bottom), (left, right) = place.piece.rows, place.piece.cols
    start, stride = place.rows_at((top, bottom))
    segment = (right - left) * ITEM_BYTES[place.dtype]
    return place.piece.at[0] + bottom - top, start + (bottom - top - 1) * stride + segment
