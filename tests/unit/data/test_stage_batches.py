"""The training batches of every rank when global and micro-batch change from stage to stage and within one."""

from __future__ import annotations

import pytest
import torch

from megatron_syne.config.schema import DataConfig, RunConfig, TrainConfig
from megatron_syne.data.batches import BatchBuilder
from megatron_syne.data.loader import TrainingLoader, build_training_data
from megatron_syne.data.mixture.planning import plan_mixture
from megatron_syne.errors import ConfigError

SIZES = [4, 4, 4, 8, 8, 12]
"""Global batch of each step: 4 to 12 by 4, evenly over 24 samples."""


def run(**train: object) -> RunConfig:
    values = {
        "train_iters": 6,
        "micro_batch_size": 2,
        "global_batch_size": 12,
        "rampup_batch_size": [4, 4, 24],
    }
    return RunConfig(data=DataConfig(mock=True, seq_length=5), train=TrainConfig(**{**values, **train}))  # type: ignore[arg-type]


def loader(config: RunConfig, rank: int = 0, size: int = 1, reads: bool = True) -> TrainingLoader:
    return build_training_data(config, plan_mixture(config), 50, rank, size, reads=reads)


def starts(config: RunConfig) -> list[int]:
    plan = plan_mixture(config)
    return [plan.sample_at(n) for n in range(plan.train_iters)]


@pytest.mark.parametrize("size", [1, 2])
def test_every_sample_once_in_the_batches_of_its_segment(size: int) -> None:
    config = run(neftune_noise_alpha=5.0)
    ranks = [loader(config, rank, size) for rank in range(size)]
    assert list(ranks[0].batch_starts()) == starts(config)
    assert list(ranks[0].batch_starts(2, starts(config)[3])) == starts(config)[3:5]
    for start, batch in zip(starts(config), SIZES, strict=True):
        assert (ranks[0].global_batch_size_at(start), ranks[0].micro_batch_size_at(start)) == (batch, 2)
        parts = [each.global_batch(start) for each in ranks]
        assert {len(part) for part in parts} == {batch // (2 * size)}
        ids = torch.cat([micro["sample_ids"] for part in parts for micro in part])
        assert ids.dtype == torch.int64 and sorted(ids.tolist()) == list(range(start, start + batch))
        for micro in (micro for part in parts for micro in part):
            for row, index in zip(micro["tokens"].tolist(), micro["sample_ids"].tolist(), strict=True):
                assert row == ranks[0].dataset[index].tokens[:-1].tolist()
    for each in ranks:
        each.close()


def test_a_batch_does_not_depend_on_where_the_thread_began() -> None:
    config = run()
    in_order, anywhere = loader(config), loader(config)
    expected = {start: in_order.global_batch(start) for start in starts(config)}
    for start in (starts(config)[n] for n in (4, 5, 1, 2, 3, 0)):
        for mine, theirs in zip(anywhere.global_batch(start), expected[start], strict=True):
            assert "sample_ids" not in mine and torch.equal(mine["tokens"], theirs["tokens"])
    with pytest.raises(IndexError, match="no global batch at sample 40 of 40"):
        anywhere.global_batch(40)
    in_order.close()
    anywhere.close()


def test_a_rank_without_tokens_has_as_many_micro_batches() -> None:
    config = run()
    nothing = loader(config, reads=False)
    assert [nothing.global_batch(start) for start in starts(config)] == [
        [{}] * (batch // 2) for batch in SIZES
    ]


def test_a_batch_that_does_not_divide_is_told() -> None:
    config = run()
    dataset = loader(config).dataset
    builder = BatchBuilder(dataset, 2, 12, 0, 4, plan=plan_mixture(config))
    assert builder.count_at(starts(config)[3]) == 1
    with pytest.raises(ConfigError, match="4 is not a multiple of micro_batch_size 2 x data parallel 4"):
        builder.first_samples(0)


def test_a_batch_is_described_for_people() -> None:
    config = run()
    assert loader(config).described(12) == (
        "stage mock, samples 12 to 19 ("
        + "; ".join(f"{n}: mock, document 0 [{5 * n}:{5 * n + 5}]" for n in range(12, 20))
        + ")"
    )
    assert loader(config).described(28).endswith("; and 4 more)")
