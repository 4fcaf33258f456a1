from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from prepared import random_documents, write_tokens

from megatron_syne.config.schema import DataConfig, SourceConfig, StageConfig
from megatron_syne.data.dataset import MockDataset, PackedSource, StagedDataset, ValidationSource, permutation
from megatron_syne.data.indexed import IndexedReader
from megatron_syne.data.mixture import build_plan
from megatron_syne.errors import ConfigError, DataError

SEQ = 16


@pytest.fixture
def reader(tmp_path: Path) -> IndexedReader:
    return write_tokens(tmp_path / "x", random_documents(80))


def staged(tmp_path: Path, seed: int = 1, tokens: int = 60 * SEQ, changed: bool = False) -> StagedDataset:
    data = DataConfig(
        seq_length=SEQ,
        sources={"a": SourceConfig("a"), "b": SourceConfig("b")},
        stages=[StageConfig("one", tokens, {"a": 0.5, "b": 0.5}), StageConfig("two", 20 * SEQ, {"a": 1.0})],
    )
    sources = {}
    for number, name in enumerate("ab"):
        documents = random_documents(20, seed=number + 10 * changed)
        reader = write_tokens(tmp_path / f"{seed}{tokens}{changed}" / name, documents)
        sources[name] = PackedSource(reader, SEQ, seed, name)
    return StagedDataset(build_plan(data, 4), sources)


def test_an_epoch_predicts_every_token_once(reader: IndexedReader) -> None:
    source = PackedSource(reader, SEQ, seed=3, name="x")
    per_epoch = source.samples_per_epoch
    assert per_epoch == (reader.num_tokens - 1) // SEQ
    for epoch in range(3):
        samples = [source[epoch * per_epoch + n] for n in range(per_epoch)]
        assert all(sample.dtype == np.int64 and sample.shape == (SEQ + 1,) for sample in samples)
        assert all(a[-1] == b[0] for a, b in pairwise(samples))
        stream = np.concatenate([sample[:-1] for sample in samples] + [samples[-1][-1:]])
        order = permutation(reader.num_documents, 3, "x", epoch)
        expected = np.concatenate([reader.document(int(n)) for n in order])
        assert np.array_equal(stream, expected[: stream.size])
        assert 0 <= expected.size - stream.size < SEQ
        assert len(set(stream.tolist())) == stream.size


def test_random_access_equals_the_sequence_and_survives_a_restart(reader: IndexedReader) -> None:
    source = PackedSource(reader, SEQ, seed=3, name="x")
    sequence = [source[n] for n in range(4 * source.samples_per_epoch)]
    for n in np.random.default_rng(0).permutation(len(sequence)).tolist():
        assert np.array_equal(source[n], sequence[n])
    assert len(source._epochs) <= 2
    assert np.array_equal(PackedSource(reader, SEQ, 3, "x")[len(sequence) - 1], sequence[-1])


def test_epochs_seeds_and_names_shuffle_differently(reader: IndexedReader) -> None:
    count = reader.num_documents
    orders = [permutation(count, *key) for key in ((1, "x", 0), (1, "x", 1), (2, "x", 0), (1, "y", 0))]
    assert len({order.tobytes() for order in orders}) == 4
    assert all(sorted(order.tolist()) == list(range(count)) for order in orders)


def test_the_shuffle_is_the_same_on_every_machine() -> None:
    order = permutation(1000, 1234, "zh_web", 2)
    assert order[:8].tolist() == [764, 310, 68, 786, 342, 492, 733, 530]
    assert hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()[:16] == "cea6f606b48f09a5"


def test_documents_of_any_length_even_none(tmp_path: Path) -> None:
    documents = [
        np.arange(0),
        np.arange(100),
        np.arange(0),
        np.arange(100, 101),
        np.arange(101, 140),
        np.arange(0),
    ]
    reader = write_tokens(tmp_path / "x", documents)
    source = ValidationSource(reader, 10, "x")
    stream = np.concatenate([source[n][:-1] for n in range(len(source))])
    assert stream.tolist() == list(range(130))
    for outside in (-1, len(source)):
        with pytest.raises(IndexError):
            source[outside]


def test_too_little_text_for_one_sample(tmp_path: Path) -> None:
    reader = write_tokens(tmp_path / "x", [np.arange(SEQ)])
    with pytest.raises(DataError, match=r"source x has 16 tokens, fewer than .* 17"):
        PackedSource(reader, SEQ, 0, "x")
    assert len(ValidationSource(write_tokens(tmp_path / "y", [np.arange(SEQ + 1)]), SEQ, "y")) == 1


def test_the_mixture_reads_each_source_on_from_stage_to_stage(tmp_path: Path) -> None:
    dataset = staged(tmp_path)
    assert len(dataset) == 80
    places = [dataset.where(n) for n in range(len(dataset))]
    assert [place.stage for place in places] == ["one"] * 60 + ["two"] * 20
    for name, source in dataset.sources.items():
        mine = [(n, place) for n, place in enumerate(places) if place.source == name]
        assert [place.sample for _, place in mine] == list(range(len(mine)))
        assert all(place.epoch == place.sample // source.samples_per_epoch for _, place in mine)
        assert all(np.array_equal(dataset[n], source[place.sample]) for n, place in mine)
    assert max(place.epoch for place in places) >= 1
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_fingerprint_is_of_plan_seed_and_data(tmp_path: Path) -> None:
    same = staged(tmp_path / "p").fingerprint
    assert same == staged(tmp_path / "q").fingerprint
    others = [
        staged(tmp_path, seed=2),
        staged(tmp_path, tokens=64 * SEQ),
        staged(tmp_path, changed=True),
    ]
    assert len({same, *(other.fingerprint for other in others)}) == 4


def test_a_source_that_was_not_opened(tmp_path: Path) -> None:
    dataset = staged(tmp_path)
    with pytest.raises(ConfigError, match="uses b, which was not opened"):
        StagedDataset(dataset.plan, {"a": dataset.sources["a"]})


def test_mock_samples_are_a_function_of_seed_and_index() -> None:
    one, two, other = (MockDataset(100, SEQ, 50, seed) for seed in (1, 1, 2))
    assert np.array_equal(one[7], two[7]) and not np.array_equal(one[7], other[7])
    assert not np.array_equal(one[7], one[8])
    tokens = np.stack([one[n] for n in range(50)])
    assert tokens.shape == (50, SEQ + 1) and tokens.min() >= 0 and tokens.max() < 100
    assert len(np.unique(tokens)) > 90
    assert one.fingerprint == two.fingerprint != other.fingerprint
    with pytest.raises(IndexError):
        one[50]
