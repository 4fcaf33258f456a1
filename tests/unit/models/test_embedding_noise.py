"""The noise of NEFTune is uniform, and a function of seed, sample, position and channel alone."""

from __future__ import annotations

import torch

from megatron_syne.models.embedding_noise import uniform_noise

SAMPLES, POSITIONS = torch.tensor([0, 1, 5_000_000_000]), torch.arange(96)


def test_uniform_and_independent() -> None:
    noise = uniform_noise(1234, SAMPLES, POSITIONS, 128).double()
    assert noise.shape == (96, 3, 128)
    count = noise.numel()
    assert noise.min() >= -1 and noise.max() <= 1
    assert abs(noise.mean()) < 4 / (3 * count) ** 0.5  # 4 standard errors
    assert abs(noise.square().mean() - 1 / 3) < 4 * (4 / 45 / count) ** 0.5
    counts = torch.histc(noise, 32, -1, 1)
    chi_square = ((counts - count / 32) ** 2 / (count / 32)).sum()
    assert chi_square < 70  # 31 degrees of freedom: p < 1e-4
    for a, b in ((noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1]), (noise[..., 1:], noise[..., :-1])):
        correlation = (a * b).mean() * 3
        assert abs(correlation) < 4 / a.numel() ** 0.5


def test_a_function_of_its_place_alone() -> None:
    whole = uniform_noise(1234, SAMPLES, POSITIONS, 128)
    assert uniform_noise(1234, SAMPLES[1:], POSITIONS[40:60], 128).equal(whole[40:60, 1:])
    assert uniform_noise(1234, SAMPLES, POSITIONS, 64).equal(whole[..., :64])
    for other in (
        uniform_noise(1235, SAMPLES, POSITIONS, 128),
        uniform_noise(1234, SAMPLES + 1, POSITIONS, 128),
        uniform_noise(1234, SAMPLES + 2**32, POSITIONS, 128),
        uniform_noise(1234, SAMPLES, POSITIONS + 1, 128),
    ):
        assert (other == whole).float().mean() < 1e-3


def test_known_values() -> None:
    """A resumed run must draw what it drew before, with whatever version of this file."""
    noise = uniform_noise(7, torch.tensor([3]), torch.tensor([11]), 3)
    assert [float(v).hex() for v in noise.flatten()] == KNOWN


KNOWN = ["-0x1.d1f21c0000000p-1", "-0x1.519c800000000p-6", "0x1.7b5aec0000000p-1"]
