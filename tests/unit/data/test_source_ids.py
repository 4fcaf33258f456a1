"""Each sample of a batch says which source it is of, whatever the rank and the micro-batch."""

from __future__ import annotations

import pytest
import torch

from megatron_syne.config.schema import (
    DataConfig,
    MonitorConfig,
    RunConfig,
    SourceConfig,
    StageConfig,
    TrainConfig,
)
from megatron_syne.data.batches import BatchBuilder, BatchForm
from megatron_syne.data.dataset import MockDataset
from megatron_syne.data.loader import build_training_data
from megatron_syne.data.mixture.planning import MixturePlan, plan_mixture


def mixed_plan() -> MixturePlan:
    sources = {name: SourceConfig(path=name) for name in ("en", "zh", "code")}
    stages = [
        StageConfig(name="one", tokens=16 * 240, mixture={"en": 0.6, "zh": 0.3, "code": 0.1}),
        StageConfig(name="two", tokens=16 * 120, mixture={"zh": 1.0}),
    ]
    data = DataConfig(seq_length=16, sources=sources, stages=stages)
    return plan_mixture(RunConfig(data=data, train=TrainConfig(global_batch_size=24, micro_batch_size=4)))


def test_source_ids_are_the_plans() -> None:
    plan = mixed_plan()
    dataset = MockDataset(100, 16, plan.num_samples, seed=0, plan=plan)
    found: dict[int, int] = {}
    for rank in (0, 1):
        builder = BatchBuilder(dataset, 1, 1, rank, 2, BatchForm(source_ids=True), plan)
        for start in range(0, plan.num_samples, 24):
            for first in builder.first_samples(start):
                batch = builder.micro_batch(first)
                assert batch["source_ids"].shape == (4,) and batch["source_ids"].dtype.kind == "i"
                found |= {first + j: int(source) for j, source in enumerate(batch["source_ids"])}
    assert found == {n: plan.sources.index(plan.locate(n).source) for n in range(plan.num_samples)}
    assert set(found.values()) == {0, 1, 2}


def test_dali_feeds_them_too() -> None:
    pytest.importorskip("nvidia.dali")
    config = RunConfig(
        data=DataConfig(mock=True, seq_length=16),
        train=TrainConfig(global_batch_size=4, micro_batch_size=2, train_iters=3),
    )
    plan = plan_mixture(config)
    config.data.loader = "dali"
    loader = build_training_data(config, plan, 100, 0, 1)
    for start in (0, 4, 8):
        batches = loader.global_batch(start)
        assert [batch["source_ids"].tolist() for batch in batches] == [[0, 0], [0, 0]]
        assert all(batch["source_ids"].dtype == torch.int64 for batch in batches)
    loader.close()


def test_they_are_there_only_where_losses_are_told_apart() -> None:
    for wanted in (True, False):
        config = RunConfig(
            data=DataConfig(mock=True, seq_length=16),
            train=TrainConfig(global_batch_size=4, micro_batch_size=2, train_iters=2),
            monitor=MonitorConfig(loss_per_source=wanted),
        )
        loader = build_training_data(config, plan_mixture(config), 100, 0, 1)
        batches = loader.global_batch(0)
        loader.close()
        assert [batch["source_ids"].tolist() if wanted else "source_ids" in batch for batch in batches] == (
            [[0, 0], [0, 0]] if wanted else [False, False]
        )
