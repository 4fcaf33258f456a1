from __future__ import annotations

import gc
import shutil
import threading
import time
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prepared import many_texts, write_jsonl

from megatron_syne.config.schema import DataConfig, RunConfig, SourceConfig, StageConfig, TrainConfig
from megatron_syne.data.dataset import MockDataset, StagedDataset
from megatron_syne.data.loader import DataLoader, build_training_data, build_validation_data
from megatron_syne.data.mixture import plan_mixture
from megatron_syne.data.prepare import Job, prepare
from megatron_syne.errors import ConfigError, DataError, MissingInput

BATCH = 12


class Numbered:
    """Sample ``i`` is ``i`` repeated; reading ``broken`` raises."""

    def __init__(self, count: int, broken: int = -1) -> None:
        self.count, self.broken = count, broken
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        if index == self.broken:
            raise DataError("sample is broken")
        self.read.append(index)
        return np.full(5, index, dtype=np.int64)


def threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def first_tokens(batches: list[dict[str, torch.Tensor]]) -> list[int]:
    return [int(row[0]) for batch in batches for row in batch["tokens"]]


@pytest.mark.parametrize("dp", [1, 2, 3, 4, 6, 12])
def test_ranks_together_read_exactly_the_global_batch(dp: int) -> None:
    for micro in [size for size in (1, 2, 3, 4) if BATCH % (size * dp) == 0]:
        loaders = [DataLoader(Numbered(60), micro, BATCH, rank, dp) for rank in range(dp)]
        for start in loaders[0].batch_starts():
            parts = [loader.global_batch(start) for loader in loaders]
            assert all(len(part) == BATCH // (micro * dp) for part in parts)
            assert all(batch["tokens"].shape == (micro, 4) for part in parts for batch in part)
            read = [first_tokens(part) for part in parts]
            assert sorted(chain.from_iterable(read)) == list(range(start, start + BATCH))
            for rank, indices in enumerate(read):
                assert indices == [
                    start + m * micro * dp + rank * micro + j
                    for m in range(BATCH // (micro * dp))
                    for j in range(micro)
                ]
        for loader in loaders:
            loader.close()


def test_what_a_micro_batch_holds() -> None:
    dataset = MockDataset(100, 8, 24, seed=1)
    with_thread, without = DataLoader(dataset, 3, BATCH), DataLoader(dataset, 3, BATCH, prefetch=0)
    for start in (0, 12):
        for a, b in zip(with_thread.global_batch(start), without.global_batch(start), strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)
        for number, batch in enumerate(without.global_batch(start)):
            rows = np.stack([dataset[start + 3 * number + j] for j in range(3)])
            assert torch.equal(batch["tokens"], torch.from_numpy(rows[:, :-1]))
            assert torch.equal(batch["labels"], torch.from_numpy(rows[:, 1:]))
            assert torch.equal(batch["position_ids"], torch.arange(8).expand(3, 8))
            assert torch.equal(batch["loss_mask"], torch.ones(3, 8))
            assert {key: value.dtype for key, value in batch.items()} == {
                "tokens": torch.int64,
                "labels": torch.int64,
                "position_ids": torch.int64,
                "loss_mask": torch.float32,
            }
            assert all(value.is_contiguous() for value in batch.values())
    with_thread.close()


def test_order_of_asking_changes_nothing_and_reading_runs_ahead() -> None:
    dataset = Numbered(96)
    loader = DataLoader(dataset, 4, BATCH, prefetch=2)
    assert first_tokens(loader.global_batch(0)) == list(range(12))
    deadline = time.monotonic() + 10
    while max(dataset.read) < 35 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert 35 <= max(dataset.read) < 60  # two batches ready, one more in the thread's hand
    for start in (12, 24, 60, 84, 0, 12):
        assert first_tokens(loader.global_batch(start)) == list(range(start, start + 12))
    assert threads() == 1
    loader.close()
    loader.close()
    assert threads() == 0
    assert first_tokens(loader.global_batch(24)) == list(range(24, 36))
    loader.close()


def test_past_the_end() -> None:
    loader = DataLoader(Numbered(30), 3, BATCH)
    assert list(loader.batch_starts()) == [0, 12]
    assert list(loader.batch_starts(1)) == [0]
    for start in (24, 30, 1000, -12):
        with pytest.raises(IndexError):
            loader.global_batch(start)
    loader.close()


@pytest.mark.parametrize("count", [1, 5, 12, 13, 30])
def test_a_padded_last_batch_counts_every_sample_once(count: int) -> None:
    for dp, micro in ((1, 4), (3, 2)):
        loaders = [
            DataLoader(Numbered(count), micro, BATCH, rank, dp, 0, pad_last=True) for rank in range(dp)
        ]
        weighed: list[int] = []
        for start in loaders[0].batch_starts(99):
            for loader in loaders:
                for batch in loader.global_batch(start):
                    assert batch["tokens"].shape == (micro, 4)
                    keep = batch["loss_mask"].all(dim=1)
                    assert torch.equal(keep, batch["loss_mask"].any(dim=1))
                    weighed += batch["tokens"][keep][:, 0].tolist()
        assert sorted(weighed) == list(range(count))


def test_an_error_in_the_thread_reaches_the_caller_in_its_turn() -> None:
    loader = DataLoader(Numbered(96, broken=30), 4, BATCH)
    assert first_tokens(loader.global_batch(0)) == list(range(12))
    assert first_tokens(loader.global_batch(12)) == list(range(12, 24))
    for _ in range(2):  # asking again is no way around it
        with pytest.raises(DataError, match="sample is broken"):
            loader.global_batch(24)
    assert threads() == 0
    assert first_tokens(loader.global_batch(36)) == list(range(36, 48))
    loader.close()


def test_an_abandoned_loader_stops_its_thread() -> None:
    loader = DataLoader(Numbered(1200), 4, BATCH)
    loader.global_batch(0)
    assert threads() == 1
    del loader
    gc.collect()
    assert threads() == 0


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="12 is not a multiple of micro_batch_size 5 x data parallel 1"):
        DataLoader(Numbered(20), 5, BATCH)
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        DataLoader(Numbered(20), 1, BATCH, 2, 2)


# --- from a configuration ----------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path, tokenizer_dir: Path) -> RunConfig:
    for name, count in (("a", 120), ("b", 60), ("v", 20), ("unused", 5)):
        source = write_jsonl(tmp_path / f"{name}.jsonl", [f"{name} {text}" for text in many_texts(count)])
        prepare(Job([source], tokenizer_dir, tmp_path / name))
    return RunConfig(
        data=DataConfig(
            seq_length=32,
            tokenizer_path=str(tokenizer_dir),
            sources={name: SourceConfig(str(tmp_path / name)) for name in ("a", "b", "unused")},
            validation={"v": SourceConfig(str(tmp_path / "v"))},
            stages=[
                StageConfig("one", 48 * 32, {"a": 0.75, "b": 0.25}),
                StageConfig("two", 24 * 32, {"a": 0.5, "b": 0.5}),
            ],
        ),
        train=TrainConfig(micro_batch_size=2, global_batch_size=BATCH, seed=7),
    )


def all_samples(config: RunConfig, dp: int, micro: int, vocab_size: int = 320) -> dict[int, list[bytes]]:
    config.train.micro_batch_size = micro
    plan = plan_mixture(config)
    batches: dict[int, list[bytes]] = {}
    for rank in range(dp):
        loader = build_training_data(config, plan, vocab_size, rank, dp)
        for start in loader.batch_starts():
            rows = torch.cat(
                [torch.cat([b["tokens"], b["labels"][:, -1:]], 1) for b in loader.global_batch(start)]
            )
            batches.setdefault(start, []).extend(row.numpy().tobytes() for row in rows)
        loader.close()
    return {start: sorted(rows) for start, rows in batches.items()}


def test_every_layout_reads_exactly_the_plan(config: RunConfig) -> None:
    plan = plan_mixture(config)
    with_one = all_samples(config, 1, 1)
    assert list(with_one) == list(range(0, 72, BATCH)) and plan.num_samples == 72
    loader = build_training_data(config, plan, 320, 0, 1)
    dataset = loader.dataset
    assert isinstance(dataset, StagedDataset)
    expected = {
        start: sorted(dataset[n].tobytes() for n in range(start, start + BATCH)) for start in with_one
    }
    assert with_one == expected
    for dp, micro in ((2, 1), (2, 3), (3, 2), (4, 3), (12, 1)):
        assert all_samples(config, dp, micro) == expected


def test_validation_batches_cover_the_source_once(config: RunConfig) -> None:
    ranks = [build_validation_data(config, 320, rank, 3)["v"] for rank in range(3)]
    tokens = 0
    for start in ranks[0].batch_starts():
        tokens += sum(int(b["loss_mask"].sum()) for rank in ranks for b in rank.global_batch(start))
    assert tokens == ranks[0].num_samples * 32
    assert ranks[0].num_samples % BATCH  # the case in point: a last batch that is not full


def test_fingerprint_follows_the_data(config: RunConfig, tmp_path: Path, tokenizer_dir: Path) -> None:
    plan = plan_mixture(config)
    before = build_training_data(config, plan, 320, 0, 1).fingerprint
    assert before == build_training_data(config, plan, 320, 1, 2).fingerprint
    source = write_jsonl(tmp_path / "b.jsonl", many_texts(61))
    prepare(Job([source], tokenizer_dir, tmp_path / "b", overwrite=True))
    assert build_training_data(config, plan, 320, 0, 1).fingerprint != before


def refused(config: RunConfig, vocab_size: int, error: type[Exception], *parts: str) -> None:
    with pytest.raises(error) as caught:
        build_training_data(config, plan_mixture(config), vocab_size, 0, 1)
    for part in parts:
        assert part in str(caught.value)


def test_bad_sources_name_the_field(config: RunConfig, tmp_path: Path, tokenizer_dir: Path) -> None:
    refused(config, 100, DataError, "data.sources.a: ", "a.bin", "100 rows")
    with pytest.raises(DataError, match=r"data\.validation\.v: .*100 rows"):
        build_validation_data(config, 100, 0, 1)
    other = tmp_path / "other"
    shutil.copytree(tokenizer_dir, other)
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + "\n")
    prepare(Job([tmp_path / "b.jsonl"], other, tmp_path / "b", overwrite=True))
    refused(config, 320, DataError, "data.sources.b: ", "another tokenizer", "data.tokenizer_path")
    config.data.tokenizer_path = None
    refused(config, 320, DataError, "data.sources.b: ", "data.sources.a")
    (tmp_path / "a.bin").unlink()
    refused(config, 320, MissingInput, "data.sources.a: ", "a.bin")


def test_mock(config: RunConfig) -> None:
    config.data.mock, config.train.train_iters = True, 3
    loader: Any = build_training_data(config, plan_mixture(config), 50, 0, 2)
    assert loader.num_samples == 3 * BATCH
    assert max(int(b["tokens"].max()) for b in loader.global_batch(24)) < 50
    assert build_validation_data(config, 50, 0, 2) == {}
    loader.close()
