"""Batch arithmetic, and the choices of pipeline options that are not given."""

from __future__ import annotations

import pytest

from megatron_syne.config.arithmetic import (
    batch_arithmetic,
    resolved_deallocate_pipeline_outputs,
    resolved_overlap_p2p_comm,
)
from megatron_syne.config.schema import DataConfig, ParallelConfig, RunConfig, TrainConfig


def test_batch_arithmetic():
    train = TrainConfig(global_batch_size=1024, micro_batch_size=2)
    batch = batch_arithmetic(RunConfig(run_dir="out", train=train, data=DataConfig(seq_length=8192)), 16)
    assert batch.num_microbatches == 32
    assert batch.tokens_per_step == 8_388_608


@pytest.mark.parametrize(
    ("vpp", "platform", "overlap", "deallocate"),
    [
        (None, "cpu", False, True),
        (None, "cuda", False, True),
        (2, "cpu", True, False),
        (2, "cuda", True, True),
    ],
)
def test_automatic_pipeline_choices(vpp, platform, overlap, deallocate):
    parallel = ParallelConfig(virtual_pipeline_model_parallel_size=vpp)
    assert resolved_overlap_p2p_comm(parallel) is overlap
    assert resolved_deallocate_pipeline_outputs(parallel, platform) is deallocate


@pytest.mark.parametrize("given", [True, False])
def test_given_pipeline_choices_are_kept(given):
    parallel = ParallelConfig(overlap_p2p_comm=given, deallocate_pipeline_outputs=given)
    assert resolved_overlap_p2p_comm(parallel) is given
    assert resolved_deallocate_pipeline_outputs(parallel, "cpu") is given
