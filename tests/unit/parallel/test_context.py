"""Which positions a context-parallel rank holds, by hand and by their properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_syne.parallel.context import held_positions, own_batch, own_part


def test_each_rank_holds_two_opposite_parts() -> None:
    assert held_positions(0, 2, 8).tolist() == [0, 1, 6, 7]
    assert held_positions(1, 2, 8).tolist() == [2, 3, 4, 5]
    assert held_positions(2, 3, 6).tolist() == [2, 3]
    assert held_positions(0, 1, 3).tolist() == [0, 1, 2]


@given(st.integers(1, 9), st.integers(1, 5))
def test_ranks_hold_every_position_once_and_equal_causal_work(size: int, part: int) -> None:
    length = 2 * size * part
    held = [held_positions(rank, size, length) for rank in range(size)]
    assert sorted(torch.cat(held).tolist()) == list(range(length))
    work = {int((positions + 1).sum()) for positions in held}
    assert len(work) == 1


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_the_part_is_cut_along_the_dimension(dim: int) -> None:
    whole = torch.arange(8 * 8 * 8).reshape(8, 8, 8)
    for rank in range(2):
        expected = whole.index_select(dim, held_positions(rank, 2, 8))
        assert torch.equal(own_part(whole, rank, 2, dim=dim), expected)


def test_a_batch_is_cut_but_for_document_and_sample_numbers() -> None:
    cut = ("tokens", "labels", "position_ids", "loss_mask")
    batch = {name: torch.arange(16).reshape(2, 8) for name in (*cut, "document_ids")}
    batch["sample_ids"] = torch.arange(2)
    found = own_batch(batch, 0, 2)
    for name in cut:
        assert found[name].tolist() == [[0, 1, 6, 7], [8, 9, 14, 15]]
    assert found["document_ids"] is batch["document_ids"] and found["sample_ids"] is batch["sample_ids"]
    assert own_batch({}, 1, 2) == {}  # a stage in the middle of the pipeline
    assert own_batch(batch, 0, 1)["tokens"] is batch["tokens"]
