"""Merging: against torch in float64, and the identities that must hold to the bit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from surgery_toys import Memory, logits, same_bits, save, values, whole

from megatron_syne.convert.formats.hf import open_hf
from megatron_syne.convert.streams import Weights
from megatron_syne.convert.surgery import derived
from megatron_syne.convert.surgery.merging import add_task_vectors, arc, merge_linear, slerp
from megatron_syne.errors import ConfigError, DataError

UP = "model.layers.1.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
DTYPES = ("F32", "BF16", "F16")
TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def in_format(exact: Any, dtype: str) -> Any:
    """float64 numbers as torch rounds them, in float64 again."""
    return torch.from_numpy(exact).to(torch.float32).to(TORCH[dtype]).to(torch.float64).numpy()


def model(seed: int, dtype: str) -> Memory:
    """With both zeros, the smallest numbers and a tensor of zeros among the random ones."""
    found = Memory(seed, dtype)
    some = values(found, UP)
    some[0, :4] = [-0.0, 0.0, 1e-7, -1e-7]
    found.fill(UP, some)
    found.fill("model.norm.weight", np.zeros(8) * -1)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "operation",
    [
        lambda a, b: merge_linear([a], [1.0]),
        lambda a, b: merge_linear([a], [3.0], normalize=True),
        lambda a, b: merge_linear([a, b], [1.0, 0.0]),
        lambda a, b: merge_linear([a, a], [0.5, 0.5]),
        lambda a, b: add_task_vectors(a, [a, a], [1.0, -2.5]),
        lambda a, b: add_task_vectors(a, [b], [0.0]),
        lambda a, b: slerp(a, b, 0.0),
        lambda a, b: slerp(b, a, 1.0),
        lambda a, b: slerp(a, a, 0.3),
    ],
)
def test_what_changes_nothing_changes_no_bit(
    operation: Callable[[Weights, Weights], Weights], dtype: str
) -> None:
    a, b = model(1, dtype), model(2, dtype)
    assert same_bits(operation(a, b), a)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_linear(dtype: str, normalize: bool) -> None:
    models, scales = [model(seed, dtype) for seed in range(3)], [0.5, -0.25, 1.5]
    found = merge_linear(models, scales, normalize=normalize)
    total = sum(scales) if normalize else 1.0
    for name in found.shapes:
        exact = sum(scale / total * values(m, name) for scale, m in zip(scales, models, strict=True))
        assert np.array_equal(values(found, name), in_format(exact, dtype)), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_task_vectors(dtype: str) -> None:
    base, trained, instruct = (model(seed, dtype) for seed in range(3))
    found = add_task_vectors(base, [trained, instruct], [1.0, 0.5])
    for name in found.shapes:
        b, t, i = (values(m, name) for m in (base, trained, instruct))
        assert np.array_equal(values(found, name), in_format(b + (t - b) + 0.5 * (i - b), dtype)), name


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-60000, 60000, width=16), min_size=2, max_size=2), st.sampled_from(DTYPES))
def test_a_whole_task_vector_arrives(pair: list[float], dtype: str) -> None:
    """base + (trained - base) is trained, however far apart the two are."""
    base, trained = Memory(0, dtype), Memory(0, dtype)
    base.fill(UP, np.full(base.shapes[UP], pair[0]))
    trained.fill(UP, np.full(base.shapes[UP], pair[1]))
    found = add_task_vectors(base, [trained], [1.0])
    assert np.array_equal(values(found, UP), values(trained, UP))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [0.25, 0.5, 0.9])
def test_slerp(dtype: str, t: float) -> None:
    first, second = model(1, dtype), model(2, dtype)
    found = slerp(first, second, t)
    for name in found.shapes:
        a, b = values(first, name).ravel(), values(second, name).ravel()
        if not a.any() or not b.any():
            exact = (1 - t) * a + t * b
        else:
            angle = math.acos(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
            exact = (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)
        expected = in_format(exact, dtype)
        # the two orders of addition may round a number to either neighbour
        assert np.allclose(values(found, name).ravel(), expected, rtol=2**-7 if dtype == "BF16" else 2**-10)
        assert (values(found, name).ravel() == expected).mean() > 0.99, name


@settings(deadline=None)
@given(st.floats(0.0, 1.0), st.floats(0.04, math.pi - 0.04), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_the_arc_keeps_its_length(t: float, angle: float, long: float, wide: float) -> None:
    """On the unit sphere the point stays on it, at the angle ``t`` of the way."""
    p, q = arc(long * wide * math.cos(angle), long * long, wide * wide, t)
    assert p**2 + q**2 + 2 * p * q * math.cos(angle) == pytest.approx(1.0, rel=1e-6)
    assert p + q * math.cos(angle) == pytest.approx(math.cos(t * angle), abs=1e-6)


@pytest.mark.parametrize("products", [(1.0, 1.0, 1.0), (-1.0, 1.0, 1.0), (0.0, 0.0, 4.0), (0.0, 0.0, 0.0)])
def test_on_one_line_the_line_is_taken(products: tuple[float, float, float]) -> None:
    assert arc(*products, 0.25) == [0.75, 0.25]


@pytest.mark.parametrize("elements", [1, 13, 2**18])
def test_bytes_do_not_depend_on_the_tiles(elements: int, monkeypatch: Any) -> None:
    a, b = model(1, "BF16"), model(2, "BF16")

    def merged() -> list[Weights]:
        return [merge_linear([a, b], [0.3, 0.7]), add_task_vectors(a, [b], [0.3]), slerp(a, b, 0.3)]

    expected = [whole(one, UP) for one in merged()]
    monkeypatch.setattr(derived, "BLOCK_ELEMENTS", elements)
    for one, whole_at_once in zip(merged(), expected, strict=True):
        for rows in (1, 5, None):
            assert np.array_equal(whole(one, UP, rows), whole_at_once)


def test_formats_may_differ() -> None:
    """The first model's counts."""
    first, second = model(1, "BF16"), model(2, "F32")
    found = merge_linear([first, second], [1.0, 1.0])
    assert found.dtypes == first.dtypes
    exact = (values(first, UP) + values(second, UP)) / 2
    assert np.array_equal(values(found, UP), in_format(exact, "BF16"))
    other = slerp(first, second, 1.0)
    assert np.array_equal(values(other, UP), in_format(values(second, UP), "BF16"))


def test_all_differences_are_listed() -> None:
    first = Memory(0)
    others = [Memory(0, vocab_size=13, rotary_base=500000.0), Memory(0, num_layers=3)]
    with pytest.raises(DataError) as caught:
        merge_linear([first, *others], [1.0, 1.0, 1.0])
    text = str(caught.value)
    for part in ("2 (Memory) against 1", "rotary_base: 500000.0 against 10000.0", "[13, 8] against [11, 8]"):
        assert part in text
    for part in (
        "3 (Memory)",
        "num_layers: 3 against 2",
        "model.layers.2.mlp.up_proj.weight: [12, 8] against absent",
    ):
        assert part in text


def test_other_tokens_are_refused(tmp_path: Path, toy_maker: Any) -> None:
    from tokenizers import Tokenizer, models

    folders = []
    for name, words in (("a", ["x", "y", "z"]), ("b", ["x", "z", "y"])):
        folders.append(toy_maker(tmp_path / name))
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="x"))
        tokenizer.save(str(folders[-1] / "tokenizer.json"))
    with pytest.raises(
        DataError, match=r"2 tokens have other ids, for example 'y': 2 against 1; .*extend-vocab"
    ):
        slerp(*map(open_hf, folders), 0.5)
    merge_linear([open_hf(folders[0]), open_hf(folders[0])], [1, 1])


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_numbers_that_are_none_are_refused(bad: float) -> None:
    first, second = Memory(0), Memory(1)
    some = values(second, UP)
    some[7, 3] = bad
    second.fill(UP, some)
    for found in (
        merge_linear([first, second], [1, 1]),
        add_task_vectors(first, [second], [1]),
        slerp(first, second, 0.5),
    ):
        with pytest.raises(DataError, match=f"{UP}: rows .*not finite"):
            whole(found, UP)


def test_numbers_too_large_for_the_format_are_refused() -> None:
    models = [Memory(0, "F16", scale=20000.0), Memory(1, "F16", scale=20000.0)]
    with pytest.raises(DataError, match="not finite in F16"):
        whole(merge_linear(models, [9.0, 9.0], normalize=False), UP)


@pytest.mark.parametrize(
    "operation",
    [
        lambda a: merge_linear([], []),
        lambda a: merge_linear([a], [1.0, 2.0]),
        lambda a: merge_linear([a, a], [1.0, -1.0]),
        lambda a: merge_linear([a], [0.0], normalize=False),
        lambda a: merge_linear([a], [math.nan]),
        lambda a: add_task_vectors(a, [], []),
        lambda a: add_task_vectors(a, [a], [math.inf]),
        lambda a: slerp(a, a, 1.5),
        lambda a: slerp(a, a, math.nan),
    ],
)
def test_numbers_that_make_no_sense(operation: Callable[[Weights], Weights]) -> None:
    with pytest.raises(ConfigError):
        operation(Memory())


def test_merged_folders_run_and_tell_where_they_are_from(tmp_path: Path, toy_maker: Any) -> None:
    folders = [
        toy_maker(tmp_path / "a", torch.bfloat16),
        toy_maker(tmp_path / "b", torch.bfloat16, initializer_range=0.2),
    ]
    found = add_task_vectors(open_hf(folders[0]), [open_hf(folders[1])], [1.0])
    save(found, tmp_path / "out")
    tokens = torch.arange(30)[None]
    assert torch.equal(logits(tmp_path / "out", tokens), logits(folders[1], tokens))
    assert (tmp_path / "out" / "LICENSE").read_text() == "the licence\n"
    assert list(found.files()) == ["base/model.safetensors", "1/model.safetensors"]
    described = found.describe()
    assert described["inputs"]["1"]["folder"] == "b" and described["parameters"] == {"scales": [1.0]}
    assert str(tmp_path) not in json.dumps(described)
    before = found.identity()
    (folders[1] / "model.safetensors").touch()
    assert found.identity() != before, "every input counts"
