from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from prepared import many_texts, random_documents
from token_sources import EOS, open_documents, write_source

from megatron_syne.config.schema import DataConfig, RunConfig, SourceConfig, StageConfig
from megatron_syne.data.build import training_dataset, validation_datasets
from megatron_syne.data.dataset import MockDataset, Sample, StagedDataset, ValidationSource, read_sample
from megatron_syne.data.mixture.planning import plan_mixture
from megatron_syne.data.preparation.prepare import Job, prepare
from megatron_syne.data.tokens.orders import permutation
from megatron_syne.data.tokens.streams import BestFit, Concatenated, Range, SourceDocuments
from megatron_syne.errors import ConfigError, DataError

SEQ = 16


def stream_of(documents: SourceDocuments, position: int, count: int, seq_length: int = SEQ) -> Sample:
    pieces = Concatenated(documents).pieces(position, count, seq_length)
    return read_sample(documents.reader, pieces, seq_length)


def configuration(tmp_path: Path, packing: str = "concatenated", **options: object) -> RunConfig:
    config = RunConfig()
    sources = {}
    for number, name in enumerate("ab"):
        prefix = write_source(tmp_path / name, random_documents(70, seed=number))
        sources[name] = SourceConfig(str(prefix), max_epochs=9.0, **options)  # type: ignore[arg-type]
    config.data = DataConfig(
        seq_length=SEQ,
        sources=sources,
        stages=[
            StageConfig("one", 60 * SEQ, {"a": 0.5, "b": 0.5}),
            StageConfig("two", 240 * SEQ, {"a": 1.0}, seq_length=4 * SEQ),
        ],
        packing=packing,  # type: ignore[arg-type]
    )
    config.train.global_batch_size = 4
    return config


def open_run(config: RunConfig, cache: Path | None = None) -> StagedDataset:
    dataset = training_dataset(config, plan_mixture(config), 10**6, cache)
    assert isinstance(dataset, StagedDataset)
    return dataset


@pytest.mark.parametrize("cached", [False, True])
def test_the_stream_is_every_epoch_in_its_order_without_a_gap(tmp_path: Path, cached: bool) -> None:
    prefix = write_source(tmp_path / "x", random_documents(200))
    documents = open_documents(prefix, cache=tmp_path / "cache" if cached else None)
    reader, stream = documents.reader, Concatenated(documents)
    expected, ends = [], []
    for epoch in range(3):
        for number in permutation(200, 3, "x", epoch).tolist():
            expected.append(reader.document(number))
            ends.append(sum(map(len, expected[-1:])))
    tokens = np.concatenate(expected)
    last = np.cumsum(ends) - 1
    for seq_length in (SEQ, 7, 300):
        samples = [
            read_sample(reader, stream.pieces(position, seq_length + 1, seq_length), seq_length)
            for position in range(0, tokens.size - seq_length, seq_length)
        ]
        for number, sample in enumerate(samples):
            begin = number * seq_length
            assert sample.tokens.dtype == np.int64 and sample.length == seq_length
            assert np.array_equal(sample.tokens, tokens[begin : begin + seq_length + 1])
            inside = last[(last >= begin) & (last < begin + seq_length)] - begin
            assert sample.document_ends.dtype == np.int32 and np.array_equal(sample.document_ends, inside)


def test_a_change_of_the_sequence_length_goes_on_at_the_very_token(tmp_path: Path) -> None:
    documents = open_documents(write_source(tmp_path / "x", random_documents(80)))
    long = stream_of(documents, 5, 101, 100).tokens
    parts = [stream_of(documents, 5 + begin, 21, 20).tokens[:-1] for begin in range(0, 100, 20)]
    assert np.array_equal(np.concatenate(parts), long[:-1])


def test_random_access_equals_the_sequence_and_survives_a_restart(tmp_path: Path) -> None:
    prefix = write_source(tmp_path / "x", random_documents(80))
    documents = open_documents(prefix)
    stream = Concatenated(documents)
    places = list(range(0, 4 * documents.tokens, SEQ))
    sequence = [stream.pieces(place, SEQ, SEQ) for place in places]
    for n in np.random.default_rng(0).permutation(len(places)).tolist():
        assert stream.pieces(places[n], SEQ, SEQ) == sequence[n]
    assert len(stream._orders) <= 2
    assert Concatenated(open_documents(prefix)).pieces(places[-1], SEQ, SEQ) == sequence[-1]


def test_documents_of_any_length_even_none_and_fewer_tokens_than_a_sample(tmp_path: Path) -> None:
    parts = [np.arange(0), np.arange(9), np.arange(0), np.arange(9, 10), np.arange(10, 13), np.arange(0)]
    documents = open_documents(write_source(tmp_path / "x", parts), order="ordered")
    sample = stream_of(documents, 0, SEQ + 1)
    assert sample.tokens.tolist() == [*range(13), 0, 1, 2, 3]
    assert sample.document_ends.tolist() == [8, 9, 12]
    assert stream_of(documents, 13 * 5 + 12, SEQ + 1).tokens.tolist() == [12, *range(13), 0, 1, 2]


def test_ordered_is_ordered_in_every_epoch(tmp_path: Path) -> None:
    scores = [10.0, 9.0, 100.0, 9.0, -1.0]
    prefix = write_source(tmp_path / "x", [np.full(3, n) for n in range(5)], {"perplexity": scores})
    file_order = open_documents(prefix, order="ordered")
    assert stream_of(file_order, 0, 30, 29).tokens.tolist() == 2 * [n for n in range(5) for _ in range(3)]
    by_number = open_documents(prefix, order="ordered", order_by="perplexity")
    expected = [4, 1, 3, 0, 2]
    assert stream_of(by_number, 0, 30, 29).tokens.tolist() == 2 * [n for n in expected for _ in range(3)]
    with pytest.raises(DataError, match=r"no number 'score' is kept .*\(kept: perplexity\).*--keep score"):
        open_documents(prefix, order="ordered", order_by="score")


@pytest.mark.parametrize(
    ("options", "documents"),
    [
        ({"first_tokens": 7}, [0, 1, 2]),
        ({"top_fraction": 0.4, "top_by": "quality"}, [2, 3]),
        ({"top_fraction": 0.4, "top_by": "quality", "top_is": "lowest"}, [0, 1]),
        ({"top_fraction": 0.4, "top_by": "quality", "order": "ordered", "order_by": "quality"}, [3, 2]),
    ],
)
@pytest.mark.parametrize("cached", [False, True])
def test_subsets(tmp_path: Path, options: dict[str, object], documents: list[int], cached: bool) -> None:
    quality = {"quality": [1.0, 1.0, 5.0, 4.0, 2.0]}
    prefix = write_source(tmp_path / "x", [np.full(3, n) for n in range(5)], quality)
    cache = tmp_path / "cache" if cached else None
    source = open_documents(prefix, cache=cache, **{"order": "ordered", **options})
    assert source.tokens == 3 * len(documents)
    tokens = stream_of(source, 0, source.tokens, source.tokens - 1).tokens
    assert tokens.tolist() == [n for n in documents for _ in range(3)]
    shuffled = open_documents(prefix, cache=cache, **{**options, "order": "shuffled"})  # type: ignore[arg-type]
    tokens = stream_of(shuffled, source.tokens, source.tokens, source.tokens - 1).tokens
    assert sorted(tokens.tolist()) == sorted(n for n in documents for _ in range(3))


@pytest.mark.parametrize("order", ["shuffled", "ordered"])
@pytest.mark.parametrize("cached", [False, True])
def test_best_fit_holds_every_token_once_an_epoch(tmp_path: Path, order: str, cached: bool) -> None:
    prefix = write_source(tmp_path / "x", random_documents(100, longest=50))
    documents = open_documents(prefix, cache=tmp_path / "cache" if cached else None, order=order)
    stream, reader = BestFit(documents), documents.reader
    bins = stream.epoch_tokens(SEQ) // SEQ
    epochs = []
    for epoch in range(2):
        places: list[Range] = []
        for number in range(epoch * bins, (epoch + 1) * bins):
            ranges = [piece.range for piece in stream.pieces(number * SEQ, SEQ, SEQ)]
            places += ranges
            sample = read_sample(reader, stream.pieces(number * SEQ, SEQ + 1, SEQ), SEQ)
            own = np.concatenate([reader.document(one.document)[one.start : one.stop] for one in ranges])
            assert np.array_equal(sample.tokens[: own.size], own)
            goes_on = ranges[0].stop - ranges[0].start == SEQ and ranges[0].stop < reader.document_length(
                ranges[0].document
            )
            if goes_on:  # a whole piece is followed by its document's next token
                assert sample.length == SEQ and sample.document_ends.size == 0
                assert sample.tokens[SEQ] == reader.document(ranges[0].document)[ranges[0].stop]
            else:
                assert sample.length == own.size - 1
                assert (
                    sample.document_ends.tolist()
                    == (np.cumsum([one.stop - one.start for one in ranges]) - 1).tolist()
                )
                assert (sample.tokens[own.size :] == EOS).all()
        covered = np.concatenate([reader.document(one.document)[one.start : one.stop] for one in places])
        assert np.array_equal(np.sort(covered), np.arange(reader.num_tokens))
        epochs.append(places)
    firsts = [place.document for place in epochs[0]]
    assert (epochs[0] == epochs[1]) == (order == "ordered")
    if order == "ordered":
        starts = [stream.pieces(n * SEQ, SEQ, SEQ)[0].range for n in range(bins)]
        assert starts == sorted(starts)
    else:
        assert firsts != sorted(firsts)


def test_the_mixture_reads_each_source_on_from_segment_to_segment(tmp_path: Path) -> None:
    dataset = open_run(configuration(tmp_path))
    places = [dataset.where(n) for n in range(len(dataset))]
    assert [place.stage for place in places] == ["one"] * 60 + ["two"] * 60
    assert [dataset.seq_length_at(n) for n in (0, 59, 60, 119)] == [SEQ, SEQ, 4 * SEQ, 4 * SEQ]
    for name, stream in dataset.streams.items():
        own = [n for n, place in enumerate(places) if place.source == name]
        counted = sum(dataset.seq_length_at(n) for n in own)
        tokens = np.concatenate([dataset[n].tokens[:-1] for n in own])
        assert np.array_equal(tokens, stream_of(stream.documents, 0, counted, counted - 1).tokens)
        ranges = np.concatenate(
            [
                stream.documents.reader.document(one.document)[one.start : one.stop]
                for n in own
                for one in places[n].ranges
            ]
        )
        assert np.array_equal(ranges, tokens)
        assert all(dataset[a].tokens[-1] == dataset[b].tokens[0] for a, b in pairwise(own))
        epochs = [places[n].epoch for n in own]
        assert epochs == sorted(epochs)
    assert max(place.epoch for place in places) >= 1
    with pytest.raises(IndexError):
        dataset[len(dataset)]


@pytest.mark.parametrize("packing", ["concatenated", "best_fit"])
def test_the_cache_changes_nothing_and_prepare_leaves_nothing_to_make(
    tmp_path: Path, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(tmp_path, packing)
    plain = open_run(config)
    samples = [plain[n] for n in range(len(plain))]
    open_run(config, tmp_path / "cache").prepare()
    made = {path.name for path in (tmp_path / "cache").iterdir()}
    assert made and not any(name.endswith(".building") for name in made)
    monkeypatch.setattr("megatron_syne.data.tokens.streams.permutation", lambda *_: pytest.fail("made again"))
    dataset = open_run(config, tmp_path / "cache")
    for n, sample in enumerate(samples):
        assert all(np.array_equal(a, b) for a, b in zip(dataset[n], sample, strict=True))
    assert {path.name for path in (tmp_path / "cache").iterdir()} == made
    assert dataset.source_facts() == plain.source_facts()


def test_facts_for_the_ledger_are_plain_and_change_with_what_decides_the_samples(tmp_path: Path) -> None:
    facts = open_run(configuration(tmp_path / "p")).source_facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts == open_run(configuration(tmp_path / "q")).source_facts()
    assert facts != open_run(configuration(tmp_path / "r", first_tokens=1000)).source_facts()
    assert facts["a"]["bin_sha256"] != facts["b"]["bin_sha256"]


def test_another_plan_over_the_same_sources(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    dataset = open_run(config)
    plan = dataset.plan.with_shares(8, {"a": 0.75, "b": 0.25}, "re-weighting")
    other = dataset.with_plan(plan)
    assert other.streams == dataset.streams and len(other) == len(dataset)
    assert [other.where(n) for n in range(8)] == [dataset.where(n) for n in range(8)]
    assert other.where(8).source == "a"
    only_a = dataclasses.replace(config.data, stages=config.data.stages[1:])
    with pytest.raises(ConfigError, match="uses b, which was not opened"):
        open_run(dataclasses.replace(config, data=only_a)).with_plan(plan)


def test_a_source_that_runs_dry_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    config.data.sources["a"].max_epochs = 0.5
    with pytest.raises(ConfigError, match=r"data\.sources\.a .*max_epochs is 0\.5"):
        open_run(config)


def test_files_of_another_tool_are_read_without_a_manifest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = configuration(tmp_path)
    known = open_run(config)
    for name in "ab":
        (tmp_path / f"{name}.json").unlink()
    dataset = open_run(config, tmp_path / "cache")
    assert "data.sources.a" in caplog.text and "no manifest" in caplog.text
    assert np.array_equal(dataset[5].tokens, known[5].tokens)
    facts, expected = dataset.source_facts(), known.source_facts()
    assert facts == expected
    with pytest.raises(DataError, match=r"data\.sources\.a: .*highest token id"):
        training_dataset(config, dataset.plan, 100, tmp_path / "cache")


def test_numbers_kept_by_the_preparation_order_the_documents(tmp_path: Path, tokenizer_dir: Path) -> None:
    scores = [float((7 * n) % 20) + 0.5 for n in range(20)]
    lines = [
        json.dumps({"text": text, "perplexity": score})
        for text, score in zip(many_texts(20), scores, strict=True)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    prepare(Job([tmp_path / "a.jsonl"], tokenizer_dir, tmp_path / "x", keep=["perplexity"]))
    documents = open_documents(tmp_path / "x", order="ordered", order_by="perplexity")
    read = Concatenated(documents).pieces(0, documents.tokens, documents.tokens)
    assert [scores[piece.range.document] for piece in read] == sorted(scores)
    assert documents.reader.eos_id == 0 and all(piece.ends for piece in read)


def test_validation_is_one_pass_over_every_token(tmp_path: Path) -> None:
    prefix = write_source(tmp_path / "x", [np.arange(100), np.arange(100, 130)])
    for tokens in (None, 100):
        source = ValidationSource(open_documents(prefix, order="shuffled", first_tokens=tokens), SEQ)
        total = tokens or 130
        samples = [source[n] for n in range(len(source))]
        assert sum(sample.length for sample in samples) == total - 1
        stream = np.concatenate([sample.tokens[: sample.length] for sample in samples])
        assert stream.tolist() == list(range(total - 1))
        assert samples[-1].tokens[samples[-1].length] == total - 1
        assert (samples[-1].tokens[samples[-1].length + 1 :] == EOS).all()
        for outside in (-1, len(source)):
            with pytest.raises(IndexError):
                source[outside]
    with pytest.raises(DataError, match="validation source x has one token"):
        ValidationSource(open_documents(write_source(tmp_path / "y", [np.arange(1)])), SEQ)
    config = configuration(tmp_path)
    config.data.validation = {"v": SourceConfig(str(prefix))}
    assert len(validation_datasets(config, 10**6)["v"]) == 9


def test_an_empty_validation_set_is_refused_by_its_name(tmp_path: Path) -> None:
    config, prefix = configuration(tmp_path), tmp_path / "none"
    with pytest.raises(DataError):
        write_source(prefix, [])  # its files are there, with nothing in them
    config.data.validation = {"held_out": SourceConfig(path=str(prefix))}
    with pytest.raises(DataError, match=r"data\.validation\.held_out: .*none\.bin: holds no token"):
        validation_datasets(config, 2560)


def test_mock_samples_are_a_function_of_seed_and_index() -> None:
    one, two, other = (MockDataset(100, SEQ, 50, seed) for seed in (1, 1, 2))
    assert np.array_equal(one[7].tokens, two[7].tokens) and not np.array_equal(one[7].tokens, other[7].tokens)
    assert not np.array_equal(one[7].tokens, one[8].tokens)
    tokens = np.stack([one[n].tokens for n in range(50)])
    assert tokens.shape == (50, SEQ + 1) and tokens.min() >= 0 and tokens.max() < 100
    assert len(np.unique(tokens)) > 90
    assert one[0].length == SEQ and one[0].document_ends.size == 0
    with pytest.raises(IndexError):
        one[50]
