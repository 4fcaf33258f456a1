"""The arithmetic of FP8 recipes: largest value, scale, rounding, tiles. Pure functions of tensors.

Each rule is Transformer Engine 2.11's (``common/recipe``, ``pytorch/quantization.py``), named where it stands.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FLOAT32_MAX = torch.finfo(torch.float32).max

TILE = 128
ROW_TILE, COLUMN_TILE, SQUARE_TILE = (1, TILE), (TILE, 1), (TILE, TILE)
"""Tiles of blockwise scaling: along the features, along the tokens, and of the weights."""


def formats(fp8_format: str) -> tuple[torch.dtype, torch.dtype]:
    """(forward, gradients): ``hybrid`` = E4M3 and E5M2, ``e4m3`` = E4M3 for both (``recipe.Format``)."""
    return (E4M3, E5M2) if fp8_format == "hybrid" else (E4M3, E4M3)


def largest(dtype: torch.dtype) -> float:
    """Largest finite value of an FP8 format: 448 (E4M3), 57344 (E5M2)."""
    return torch.finfo(dtype).max


def amax_of(x: torch.Tensor) -> torch.Tensor:
    """Largest absolute value, float32 []; 0 for an empty tensor, nan where one is among the values."""
    if x.numel() == 0:
        return torch.zeros((), device=x.device)
    low, high = torch.aminmax(x.detach())
    return torch.maximum(high.float(), -low.float())


def current_scale(
    amax: torch.Tensor, dtype: torch.dtype, power_of_two: bool, if_infinite: float = FLOAT32_MAX
) -> torch.Tensor:
    """Scale of values whose largest is ``amax`` (any shape, float32): format's largest / amax.

    1 where amax is 0, inf or nan; ``if_infinite`` where the quotient overflows; rounded down to a power of
    two where asked for (``recipe_common.cuh: compute_scale_from_amax``).
    """
    scale = _quotient(largest(dtype), amax)
    scale = torch.where(torch.isinf(scale), torch.full_like(scale, if_infinite), scale)
    if power_of_two:
        exponent = torch.frexp(scale).exponent
        scale = torch.ldexp(torch.ones_like(scale), exponent - 1)  # frexp's mantissa lies in [0.5, 1)
    return torch.where((amax > 0) & torch.isfinite(amax), scale, torch.ones_like(scale))


def _quotient(number: float, amax: torch.Tensor) -> torch.Tensor:
    """number / amax, rounded once as the kernels do; torch makes ``float / tensor`` a reciprocal and a product."""
    return torch.full_like(amax, number) / amax


def delayed_scale(amax: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, margin: int) -> torch.Tensor:
    """Next scale of delayed scaling: format's largest / amax / 2 ** margin.

    The scale stays where amax is 0, inf or nan, and is float32's largest where the quotient overflows
    (``quantization.py: _default_sf_compute``).
    """
    found = _quotient(largest(dtype) / 2.0**margin, amax)
    found = torch.where((amax > 0) & torch.isfinite(amax), found, scale)
    return torch.where(torch.isinf(found), torch.full_like(found, FLOAT32_MAX), found)


def roll_history(history: torch.Tensor, algo: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(history for the next round, amax that decides the scale) of ``history`` [length, tensors].

    Row 0 holds the round just done. ``max``: the largest of all rows; ``most_recent``: row 0. Then all rows
    move up by one, row 0 to the end, and row 0 is emptied: with length n the maximum is that of the current
    round and of the n - 1 before (``quantization.py: _default_get_amax_and_update_history``).
    """
    amax = history.amax(dim=0) if algo == "max" else history[0].clone()
    rolled = torch.roll(history, -1, 0)
    rolled[0] = 0.0
    return rolled, amax


def fit_history(history: torch.Tensor, length: int) -> torch.Tensor:
    """A history [n] made ``length`` long: its first rows, or zeros added (``adjust_amax_history_length``)."""
    return F.pad(history[:length], (0, max(0, length - history.shape[0])))


def tile_amax(x: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
    """Largest absolute value of each tile of ``x`` [rows, columns], float32 [row tiles, column tiles].

    Tiles at the edges are smaller; missing values count as zeros (``Float8BlockQuantizer``).
    """
    rows, columns = (-(-size // step) for size, step in zip(x.shape, tile, strict=True))
    padded = F.pad(x.detach(), (0, columns * tile[1] - x.shape[1], 0, rows * tile[0] - x.shape[0]))
    return padded.view(rows, tile[0], columns, tile[1]).abs().amax(dim=(1, 3)).float()


def spread(scales: torch.Tensor, tile: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    """One scale per value from one per tile: [row tiles, column tiles] -> ``shape``."""
    wide = scales.repeat_interleave(tile[0], 0) if tile[0] > 1 else scales
    wide = wide.repeat_interleave(tile[1], 1) if tile[1] > 1 else wide
    return wide[: shape[0], : shape[1]]


def block_scales(x: torch.Tensor, dtype: torch.dtype, tile: tuple[int, int]) -> torch.Tensor:
    """Scales of blockwise scaling, one per value of ``x`` [rows, columns].

    Powers of two in float32, Transformer Engine's default (``Float8BlockScaling``, QParams.power_2_scale);
    a quotient that overflows becomes the largest value of ``x``'s own format.
    """
    scales = current_scale(tile_amax(x, tile), dtype, True, if_infinite=torch.finfo(x.dtype).max)
    return spread(scales, tile, x.shape)


def to_fp8(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x`` times ``scale`` (one, or one per value) in FP8, saturating; torch's own cast gives nan instead."""
    top = largest(dtype)
    return (x.detach().float() * scale).clamp_(-top, top).to(dtype)


def from_fp8(q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values that ``q`` stands for: divided by ``scale`` in float32 (times its reciprocal), in ``dtype``."""
    return (q.float() * scale.reciprocal()).to(dtype)


def losses_of(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(values beyond the format's range, values not zero that became zero) of ``q = to_fp8(x, scale)``."""
    scaled = x.detach().float() * scale
    overflow = (scaled.abs() > largest(q.dtype)).sum()
    return overflow, ((x.detach() != 0) & (q.float() == 0)).sum()
