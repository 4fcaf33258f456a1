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
from megatron_syne.data.batches import BatchBuilder, BatchForm
from megatron_syne.data.dataset import MockDataset, Sample, StagedDataset
from megatron_syne.data.loader import DataLoader, build_training_data, build_validation_data
from megatron_syne.data.mixture.planning import plan_mixture
from megatron_syne.data.preparation.prepare import Job, prepare
from megatron_syne.data.tokens.reader import IndexedReader
from megatron_syne.errors import ConfigError, DataError, MissingInput

BATCH = 12


class Numbered:
    """Sample ``i`` is ``i`` repeated; reading ``broken`` raises."""

    def __init__(self, count: int, broken: int = -1) -> None:
        self.count, self.broken = count, broken
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if index == self.broken:
            raise DataError("sample is broken")
        self.read.append(index)
        return Sample(np.full(5, index, dtype=np.int64), np.zeros(0, dtype=np.int32), 4)

    def seq_length_at(self, index: int) -> int:
        return 4


class Given:
    """Samples as they are given."""

    def __init__(self, *samples: tuple[list[int], list[int], int]) -> None:
        self.samples = [
            Sample(np.array(tokens), np.array(ends, dtype=np.int32), length)
            for tokens, ends, length in samples
        ]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def seq_length_at(self, index: int) -> int:
        return len(self.samples[0].tokens) - 1


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
            rows = np.stack([dataset[start + 3 * number + j].tokens for j in range(3)])
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
        run_dir=str(tmp_path / "run"),
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
        start: sorted(dataset[n].tokens.tobytes() for n in range(start, start + BATCH)) for start in with_one
    }
    assert with_one == expected
    for dp, micro in ((2, 1), (2, 3), (3, 2), (4, 3), (12, 1)):
        assert all_samples(config, dp, micro) == expected


def test_validation_batches_cover_the_source_once(config: RunConfig) -> None:
    ranks = [build_validation_data(config, 320, rank, 3)["v"] for rank in range(3)]
    tokens = 0
    for start in ranks[0].batch_starts():
        tokens += sum(int(b["loss_mask"].sum()) for rank in ranks for b in rank.global_batch(start))
    assert tokens == IndexedReader(config.data.validation["v"].path).num_tokens - 1
    assert ranks[0].num_samples % BATCH  # the case in point: a last batch that is not full


def test_a_new_plan_takes_over_at_its_sample(config: RunConfig) -> None:
    plan = plan_mixture(config)
    loader = build_training_data(config, plan, 320, 0, 1)
    before = [first_tokens(loader.global_batch(start)) for start in (0, 12)]
    loader.replace_plan(plan.with_shares(12, {"a": 0.25, "b": 0.75}, "a test"))
    assert loader.plan.segment_at(12).reason == "a test"
    after = [first_tokens(loader.global_batch(start)) for start in (0, 12)]
    assert after[0] == before[0] and after[1] != before[1]  # also the batch that was made ahead is made again
    assert loader.consumed(24) == {"a": (9 + 3) * 32, "b": (3 + 9) * 32, "unused": 0}
    assert loader.ledger(24)["counters"]["one"]["b"]["samples"] == 12
    loader.close()


def test_a_stage_with_another_sequence_length(config: RunConfig) -> None:
    config.data.stages[1].seq_length = 16
    loader = build_training_data(config, plan_mixture(config), 320, 0, 2)
    for start in loader.batch_starts():
        expected = 32 if start < 48 else 16
        assert loader.seq_length_at(start) == expected
        assert {b["labels"].shape for b in loader.global_batch(start)} == {(2, expected)}
    loader.close()


# --- boundaries of documents -------------------------------------------------------------------------------

EOD = 99


@pytest.mark.parametrize("position", [False, True])
@pytest.mark.parametrize("loss", [False, True])
def test_boundaries_as_megatron_core_has_them(position: bool, loss: bool) -> None:
    """Judged by what the engine's own data set makes of the same tokens."""
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    rng = np.random.default_rng(3)
    for _ in range(20):
        tokens = rng.integers(0, 9, 25)
        tokens[rng.integers(0, 25, 4)] = EOD
        if rng.random() < 0.5:
            tokens[[0, 23]] = EOD  # at the very begin, and where only the next sample goes on
        dataset = Given((tokens.tolist(), np.flatnonzero(tokens[:-1] == EOD).tolist(), 24))
        found = BatchBuilder(dataset, 1, 1, form=BatchForm(True, position, loss)).micro_batch(0)
        attention, loss_mask, positions = _get_ltor_masks_and_position_ids(
            torch.from_numpy(tokens[:-1]), EOD, position, True, loss, True
        )
        assert torch.equal(torch.from_numpy(found["position_ids"][0]), positions)
        assert torch.equal(torch.from_numpy(found["loss_mask"][0]), loss_mask)
        ids = torch.from_numpy(found["document_ids"][0])
        later = torch.ones(24, 24, dtype=torch.bool).triu(1)
        assert torch.equal((ids[:, None] != ids[None, :]) | later, attention[0])


def test_padding_and_cut_pieces() -> None:
    """Two pieces of 3 and 2 tokens in a sample of 8: the rest is of no document and weighs nothing."""
    dataset = Given(([1, 2, 3, 4, 5, 0, 0, 0, 0], [2, 4], 4))
    batch = BatchBuilder(dataset, 1, 1, form=BatchForm(True, True, True)).micro_batch(0)
    assert batch["document_ids"].tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]]
    assert batch["loss_mask"].tolist() == [[1, 1, 0, 1, 0, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    plain = BatchBuilder(dataset, 1, 1).micro_batch(0)
    assert plain["loss_mask"].tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]] and "document_ids" not in plain


def test_a_rank_that_needs_no_tokens_reads_none() -> None:
    dataset = Numbered(48)
    loader = DataLoader(dataset, 2, BATCH, 1, 2, reads=False)
    assert loader.global_batch(12) == [{}, {}, {}] and loader.seq_length_at(12) == 4
    assert dataset.read == [] and threads() == 0


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


def test_best_fit_weighs_what_has_a_next_token_in_its_document(config: RunConfig) -> None:
    """Whole documents in padded samples: padding and a document's last token predict nothing."""
    config.data.packing, config.data.stages = "best_fit", [StageConfig("one", 1536, {"a": 1.0})]
    config.data.reset_attention_mask = config.data.eod_mask_loss = True
    loader = build_training_data(config, plan_mixture(config), 320, 0, 1)
    dataset = loader.dataset
    assert isinstance(dataset, StagedDataset)
    length_of = dataset.streams["a"].documents.reader.document_length
    for start in loader.batch_starts():
        batches = loader.global_batch(start)
        rows = [(batch, row) for batch in batches for row in range(2)]
        for index, (batch, row) in enumerate(rows, start):
            ranges = dataset.where(index).ranges
            used = sum(stop - first for _, first, stop in ranges)
            ids = batch["document_ids"][row]
            assert len(set(ids[:used].tolist())) == len(ranges)  # one id for each document or piece
            finished = sum(stop == length_of(document) for document, _, stop in ranges)
            assert int(batch["loss_mask"][row].sum()) == used - finished
            assert not batch["loss_mask"][row, used:].any()
    loader.close()
