"""NVIDIA's DALI, where it is installed, feeds the very batches of the thread."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from test_batches import BATCH, Numbered, first_tokens, threads

from megatron_syne.data.batches import BatchForm
from megatron_syne.data.dataset import Sample
from megatron_syne.data.loader import DataLoader
from megatron_syne.errors import DataError

installed = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali")
pytestmark = pytest.mark.skipif(
    not installed, reason="nvidia-dali is not installed: pip install nvidia-dali-cuda130"
)


class Documents:
    """Random samples with boundaries and padding; from sample 48 on half as long."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        rng = np.random.default_rng(index)
        length = self.seq_length_at(index)
        ends = np.unique(rng.integers(0, length, 3)).astype(np.int32)
        return Sample(rng.integers(0, 2**40, length + 1), ends, int(rng.integers(1, length + 1)))

    def seq_length_at(self, index: int) -> int:
        return 64 if index < 48 else 32


@pytest.mark.parametrize("form", [BatchForm(), BatchForm(True, True, True), BatchForm(sample_ids=True)])
@pytest.mark.parametrize(("rank", "dp", "micro"), [(0, 1, 4), (1, 2, 3), (1, 3, 1)])
def test_same_batches_from_anywhere(form: BatchForm, rank: int, dp: int, micro: int) -> None:
    dataset = Documents(96)
    dali = DataLoader(dataset, micro, BATCH, rank, dp, form=form, backend="dali")
    thread = DataLoader(dataset, micro, BATCH, rank, dp, prefetch=0, form=form)
    kept = []
    for start in [*range(0, 96, 12), 24, 36, 0, 84, 12]:  # to the end, and begun again elsewhere
        found, expected = dali.global_batch(start), thread.global_batch(start)
        kept.append((found, expected))
        assert len(found) == len(expected) == BATCH // (micro * dp)
    for found, expected in kept:  # compared at the end: nothing that was handed out is written over later
        for a, b in zip(found, expected, strict=True):
            assert list(a) == list(b)
            for name in a:
                assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name
    assert threads() == 1
    dali.close()
    assert threads() == 0


def test_an_error_comes_in_its_turn() -> None:
    loader = DataLoader(Numbered(96, broken=30), 4, BATCH, backend="dali")
    for start in (0, 12):
        assert first_tokens(loader.global_batch(start)) == list(range(start, start + 12))
    for _ in range(2):
        with pytest.raises(DataError, match="sample is broken"):
            loader.global_batch(24)
    assert first_tokens(loader.global_batch(36)) == list(range(36, 48))
    loader.close()
