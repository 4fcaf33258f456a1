"""FP8 arithmetic against values worked out by hand, Transformer Engine's rules, and torch's own products."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_syne.fp8 import recipes
from megatron_syne.fp8.recipes import (
    COLUMN_TILE,
    E4M3,
    E5M2,
    FLOAT32_MAX,
    ROW_TILE,
    SQUARE_TILE,
    amax_of,
    block_scales,
    current_scale,
    delayed_scale,
    fit_history,
    formats,
    from_fp8,
    losses_of,
    roll_history,
    tile_amax,
    to_fp8,
)

INF, NAN = math.inf, math.nan


def rounded(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return from_fp8(to_fp8(x, scale, dtype), scale, torch.float32)


def test_formats():
    assert formats("hybrid") == (E4M3, E5M2) and formats("e4m3") == (E4M3, E4M3)
    assert (recipes.largest(E4M3), recipes.largest(E5M2)) == (448.0, 57344.0)


@pytest.mark.parametrize(
    ("amax", "e4m3", "e5m2"),
    [
        (1.0, 448.0, 57344.0),
        (448.0, 1.0, 128.0),
        (3.0, 448 / 3, 57344 / 3),
        (0.0, 1.0, 1.0),
        (INF, 1.0, 1.0),
        (NAN, 1.0, 1.0),
        (1e-40, FLOAT32_MAX, FLOAT32_MAX),  # the quotient overflows
    ],
)
def test_current_scale(amax: float, e4m3: float, e5m2: float):
    for dtype, expected in ((E4M3, e4m3), (E5M2, e5m2)):
        got = current_scale(torch.tensor(amax), dtype, power_of_two=False)
        assert got.item() == torch.tensor(expected).item()


@pytest.mark.parametrize(
    ("amax", "expected"),
    [(448.0, 1.0), (449.0, 0.5), (3.0, 128.0), (1.0, 256.0), (0.0, 1.0), (INF, 1.0), (NAN, 1.0), (2.0**-120, 2.0**127)],
)  # fmt: skip
def test_scales_of_powers_of_two_are_rounded_down(amax: float, expected: float):
    assert current_scale(torch.tensor(amax), E4M3, power_of_two=True).item() == expected


def test_delayed_scale_keeps_the_last_one_where_there_is_nothing_to_go_by():
    amax = torch.tensor([2.0, 0.0, INF, NAN, 1e-44])
    got = delayed_scale(amax, torch.tensor([7.0, 7.0, 7.0, 7.0, 7.0]), E4M3, margin=0)
    assert got.tolist() == [224.0, 7.0, 7.0, 7.0, FLOAT32_MAX]
    assert delayed_scale(torch.tensor([2.0]), torch.ones(1), E4M3, margin=3).tolist() == [28.0]


def test_history_moves_on_as_transformer_engine_rolls_it():
    history = torch.tensor([[5.0], [1.0], [2.0], [3.0]])
    rolled, amax = roll_history(history, "max")
    assert rolled.flatten().tolist() == [0.0, 2.0, 3.0, 5.0] and amax.tolist() == [5.0]
    assert roll_history(torch.tensor([[4.0], [9.0]]), "most_recent")[1].tolist() == [4.0]
    assert history.flatten().tolist() == [5.0, 1.0, 2.0, 3.0], "the history given is not changed"


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.lists(st.floats(0, 100, width=32), min_size=1, max_size=20))
def test_the_maximum_is_of_the_last_n_rounds(length: int, amaxes: list[float]):
    history = torch.zeros(length, 1)
    for done, amax in enumerate(amaxes, 1):
        history[0] = amax
        history, found = roll_history(history, "max")
        assert found.item() == max(amaxes[max(0, done - length) : done])


def test_a_history_of_another_length():
    assert fit_history(torch.tensor([0.0, 2.0, 3.0]), 2).tolist() == [0.0, 2.0]
    assert fit_history(torch.tensor([0.0, 2.0]), 4).tolist() == [0.0, 2.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_rounding_saturates_and_keeps_nan(dtype: torch.dtype):
    top = recipes.largest(dtype)
    got = to_fp8(torch.tensor([2 * top, -2 * top, INF, -INF, 0.0, NAN]), torch.ones(()), dtype).float()
    assert got[:5].tolist() == [top, -top, top, -top, 0.0] and got[5].isnan()


def test_rounding_is_to_nearest_even():
    # E4M3 has steps of 1/8 in [1, 2)
    x = torch.tensor([1.0, 1.0625, 1.1, 1.1875, 2.0**-9, 2.0**-11])
    assert rounded(x, torch.ones(()), E4M3).tolist() == [1.0, 1.0, 1.125, 1.25, 2.0**-9, 0.0]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(-30, 30))
def test_relative_error_of_values_in_range(seed: int, power: float):
    """With current scaling, a normal value of E4M3 is off by at most 1/16, of E5M2 by 1/8."""
    x = torch.randn(257, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    for dtype, worst, smallest in ((E4M3, 1 / 16, 2.0**-6), (E5M2, 1 / 8, 2.0**-14)):
        scale = current_scale(amax_of(x), dtype, power_of_two=False)
        normal = (x * scale).abs() >= smallest
        error = ((rounded(x, scale, dtype) - x).abs() / x.abs())[normal]
        assert error.max() <= worst * (1 + 1e-5)


def test_amax():
    assert amax_of(torch.tensor([1.0, -3.0, 2.0])).item() == 3.0
    assert amax_of(torch.empty(0, 4)).item() == 0.0
    assert amax_of(torch.tensor([1.0, NAN])).isnan() and amax_of(torch.tensor([-INF, 0.0])).item() == INF
    assert amax_of(torch.tensor([1.0, -3.0], dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("tile", [ROW_TILE, COLUMN_TILE, SQUARE_TILE])
@pytest.mark.parametrize("shape", [(256, 128), (130, 257), (1, 5), (128, 129)])
def test_tiles_by_hand(shape: tuple[int, int], tile: tuple[int, int]):
    """Every tile alone, those at the edges too."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    amaxes, scales = tile_amax(x, tile), block_scales(x, E4M3, tile)
    assert scales.shape == x.shape
    for row in range(0, shape[0], tile[0]):
        for column in range(0, shape[1], tile[1]):
            part = x[row : row + tile[0], column : column + tile[1]]
            assert amaxes[row // tile[0], column // tile[1]] == part.abs().max()
            expected = 2.0 ** math.floor(math.log2(448 / part.abs().max().item()))
            assert (scales[row : row + tile[0], column : column + tile[1]] == expected).all()


def test_tiles_of_zeros_and_of_tiny_values():
    x = torch.zeros(2, 256, dtype=torch.bfloat16)
    x[1, 128:] = 1e-39
    scales = block_scales(x, E4M3, ROW_TILE)
    assert scales[0, 0] == 1 and scales[1, 0] == 1
    assert scales[1, 200] == 2.0**127, "bf16's largest, rounded down to a power of two"


def test_what_is_lost_is_counted():
    x = torch.tensor([500.0, 448.0, -1e9, 2.0**-11, -(2.0**-11), 0.0, 1.0])
    overflow, underflow = losses_of(x, to_fp8(x, torch.ones(()), E4M3), torch.ones(()))
    assert (int(overflow), int(underflow)) == (2, 2)


@pytest.mark.parametrize("left", [E4M3, E5M2])
@pytest.mark.parametrize("right", [E4M3, E5M2])
def test_products_are_those_of_torch_scaled_mm(left: torch.dtype, right: torch.dtype):
    """torch's own FP8 product (the kernels' semantics: FP8 in, fp32 sums, scales outside)."""
    if (left, right) == (E5M2, E5M2) and torch.cuda.is_available():
        pytest.skip("cuBLAS has no product of two E5M2 matrices")
    maker = torch.Generator().manual_seed(2)
    a, b = torch.randn(64, 32, generator=maker), torch.randn(48, 32, generator=maker)
    scale_a = current_scale(amax_of(a), left, power_of_two=False)
    scale_b = current_scale(amax_of(b), right, power_of_two=False)
    try:
        theirs = torch._scaled_mm(
            to_fp8(a, scale_a, left), to_fp8(b, scale_b, right).t(),
            scale_a=scale_a.reciprocal(), scale_b=scale_b.reciprocal(), out_dtype=torch.float32,
        )  # fmt: skip
    except (NotImplementedError, RuntimeError) as error:
        pytest.skip(f"torch._scaled_mm does not run here: {error}")
    ours = rounded(a, scale_a, left) @ rounded(b, scale_b, right).t()
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)
