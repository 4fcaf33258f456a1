"""``merge``: models of one shape added, subtracted and interpolated, tensor by tensor.

Everything is computed in float64 and rounded to the first model's format (through fp32). Configuration,
tokenizer and licence are the first model's.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_syne.convert.formats.documents import VOCABULARY, carried
from megatron_syne.convert.formats.hf import listed
from megatron_syne.convert.pieces import Span, matrix
from megatron_syne.convert.streams import Bytes, Weights
from megatron_syne.convert.surgery.derived import Derived, Floats, blocks, load, rounded
from megatron_syne.convert.surgery.tokens import read_vocabulary
from megatron_syne.errors import ConfigError, DataError
from megatron_syne.models.config import model_differences

# Between vectors closer to one line than this the angle says nothing, and a straight line is taken (as mergekit).
_ON_ONE_LINE = 0.9995


def merge_linear(models: Sequence[Weights], scales: Sequence[float], *, normalize: bool = True) -> Weights:
    """The sum of ``scales[i] * models[i]``; ``normalize`` divides the scales by their sum first.

    Raises ConfigError for the scales, DataError listing all in which the models differ.
    """
    if len(scales) != len(models) or not models:
        raise ConfigError(f"scales: {len(scales)} for {len(models)} models; give one for each")
    _check_numbers("scales", scales)
    total = math.fsum(scales)
    if not any(scales) or (normalize and total == 0):
        raise ConfigError(f"scales: {list(scales)} add up to nothing")
    used = [scale / total for scale in scales] if normalize else list(scales)
    inputs = {str(number): model for number, model in enumerate(models, 1)}
    check_same_shape(inputs)
    parameters = {"scales": list(scales), "normalize": normalize}
    return _Combination("merge-linear", parameters, inputs, used)


def add_task_vectors(base: Weights, models: Sequence[Weights], scales: Sequence[float]) -> Weights:
    """``base`` plus the sum of ``scales[i] * (models[i] - base)`` (task arithmetic, arXiv 2212.04089).

    An instruct model's skills on a base trained further: ``add_task_vectors(base, [trained, instruct], [1, 1])``.
    Raises ConfigError for the scales, DataError listing all in which the models differ.
    """
    if len(scales) != len(models) or not models:
        raise ConfigError(f"scales: {len(scales)} for {len(models)} models; give one for each")
    _check_numbers("scales", scales)
    inputs = {"base": base} | {str(number): model for number, model in enumerate(models, 1)}
    check_same_shape(inputs)
    return _TaskVectors("merge-task-vectors", {"scales": list(scales)}, inputs, list(scales))


def slerp(first: Weights, second: Weights, t: float) -> Weights:
    """Each tensor on the arc from ``first`` (t = 0) to ``second`` (t = 1), as flattened vectors:
    ``(sin((1 - t) w) a + sin(t w) b) / sin(w)``, ``w`` the angle between them (Shoemake 1985).

    A straight line where the two are (nearly) on one line or one is zero. Raises ConfigError for ``t``,
    DataError listing all in which the models differ.
    """
    _check_numbers("t", [t])
    if not 0 <= t <= 1:
        raise ConfigError(f"t: {t} is not within 0 and 1")
    inputs = {"1": first, "2": second}
    check_same_shape(inputs)
    return _Slerp("merge-slerp", {"t": t}, inputs, t)


def check_same_shape(models: dict[str, Weights]) -> None:
    """Raises DataError that lists all in which models differ from the first: shape, tensors, tokens."""
    (first_name, first), *others = models.items()
    problems: list[str] = []
    for name, other in others:
        title = f"{name} ({_folder(other)}) against {first_name} ({_folder(first)})"
        problems += [f"{title}: {text}" for text in model_differences(other.model, first.model)]
        for tensor in {**first.shapes, **other.shapes}:
            ours, theirs = other.shapes.get(tensor), first.shapes.get(tensor)
            if ours != theirs:
                problems.append(f"{title}: {tensor}: {_shape(ours)} against {_shape(theirs)}")
        problems += [f"{title}: {text}" for text in _token_differences(other, first)]
    if problems:
        raise DataError(listed("the models cannot be merged", problems))


class _Combination(Derived):
    """A sum of the inputs with coefficients that each tensor may have of its own."""

    def __init__(
        self, operation: str, parameters: dict[str, Any], inputs: dict[str, Weights], scales: list[float]
    ) -> None:
        super().__init__(operation, parameters, inputs)
        self.scales = scales

    def coefficients(self, name: str) -> list[float]:
        """Of every input, in order."""
        return self.scales

    def read(self, name: str, rows: Span, out: Bytes) -> None:
        """See :class:`Weights`."""
        terms = [
            (scale, weights)
            for scale, weights in zip(self.coefficients(name), self.inputs.values(), strict=True)
            if scale
        ]
        if len(terms) == 1 and terms[0][0] == 1 and terms[0][1].dtypes[name] == self.dtypes[name]:
            terms[0][1].read(name, rows, out)
            return
        for block in blocks(rows, matrix(self.shapes[name])[1]):
            values = sum((scale * load(weights, name, block) for scale, weights in terms[1:]),
                         start=terms[0][0] * load(terms[0][1], name, block))  # fmt: skip
            out[block[0] - rows[0] : block[1] - rows[0]] = _finished(values, self.dtypes[name], name, block)


class _TaskVectors(_Combination):
    def read(self, name: str, rows: Span, out: Bytes) -> None:
        """See :class:`Weights`."""
        base, *models = self.inputs.values()
        for block in blocks(rows, matrix(self.shapes[name])[1]):
            start = load(base, name, block)
            delta = np.zeros_like(start)
            for scale, weights in zip(self.scales, models, strict=True):
                if scale:
                    delta += scale * (load(weights, name, block) - start)
            np.add(start, delta, out=start, where=delta != 0)  # -0.0 + 0.0 would lose its sign
            out[block[0] - rows[0] : block[1] - rows[0]] = _finished(start, self.dtypes[name], name, block)


class _Slerp(_Combination):
    def __init__(
        self, operation: str, parameters: dict[str, Any], inputs: dict[str, Weights], t: float
    ) -> None:
        super().__init__(operation, parameters, inputs, [1 - t, t])
        self.t = t
        self._known: dict[str, list[float]] = {}
        self._locks = {name: threading.Lock() for name in self.shapes}

    def coefficients(self, name: str) -> list[float]:
        """From one pass over the tensor, made when the first of its rows is asked for."""
        if self.t in (0, 1):
            return self.scales
        with self._locks[name]:
            if name not in self._known:
                first, second = self.inputs.values()
                self._known[name] = arc(*_products(first, second, name), self.t)
            return self._known[name]


def arc(product: float, first: float, second: float, t: float) -> list[float]:
    """Coefficients of two vectors on the arc between them, from ``a.b``, ``a.a`` and ``b.b``."""
    lengths = math.sqrt(first) * math.sqrt(second)
    cosine = product / lengths if lengths else 1.0
    if not abs(cosine) <= _ON_ONE_LINE:
        return [1 - t, t]
    angle = math.acos(cosine)
    return [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]


def _products(a: Weights, b: Weights, name: str) -> tuple[float, float, float]:
    """``a.b``, ``a.a``, ``b.b`` of a whole tensor. The order of addition is fixed: numpy's, block by block."""
    sums = [0.0, 0.0, 0.0]
    height, width = matrix(a.shapes[name])
    for block in blocks((0, height), width):
        x, y = load(a, name, block), load(b, name, block)
        for index, (p, q) in enumerate(((x, y), (x, x), (y, y))):
            sums[index] += float((p * q).sum())
    return sums[0], sums[1], sums[2]


def _finished(values: Floats, dtype: str, name: str, block: Span) -> Bytes:
    return rounded(values, dtype, f"{name}: rows {block[0]} to {block[1]}")


def _check_numbers(what: str, numbers: Sequence[float]) -> None:
    if not all(math.isfinite(number) for number in numbers):
        raise ConfigError(f"{what}: {list(numbers)}: expected finite numbers")


def _token_differences(other: Weights, first: Weights) -> list[str]:
    """Ids that mean different tokens; nothing where one of the two comes without a tokenizer."""
    files = [carried(weights) for weights in (other, first)]
    if not all({"tokenizer.json", "tokenizer.model"} & found.keys() for found in files):
        return []
    if all(files[0].get(name) == files[1].get(name) for name in (*VOCABULARY, "tokenizer_config.json")):
        return []
    ours, theirs = (read_vocabulary(f, _folder(w)).ids for f, w in zip(files, (other, first), strict=True))
    if ours == theirs:
        return []
    differ = [token for token in {**ours, **theirs} if ours.get(token) != theirs.get(token)]
    example = min(differ)
    return [
        f"tokenizer: {len(differ)} tokens have other ids, for example {example!r}: {ours.get(example)} against "
        f"{theirs.get(example)}; bring both to one tokenizer with extend-vocab first"
    ]


def _folder(weights: Weights) -> str:
    folder = getattr(weights, "folder", None)
    return folder.name if folder is not None else str(getattr(weights, "operation", type(weights).__name__))


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))
