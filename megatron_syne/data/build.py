"""The datasets of a run from its configuration: files opened, checked against the vocabulary, mixed."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_syne.config.schema import DataConfig, RunConfig, SourceConfig
from megatron_syne.data.dataset import MockDataset, PackedSource, StagedDataset, ValidationSource
from megatron_syne.data.indexed import IndexedReader
from megatron_syne.data.mixture import MixturePlan
from megatron_syne.data.tokenizer import tokenizer_fingerprint
from megatron_syne.errors import DataError, MissingInput


def training_dataset(config: RunConfig, plan: MixturePlan, vocab_size: int) -> StagedDataset | MockDataset:
    """The training samples; ``vocab_size`` = rows of the embedding. Sources without a share are not opened.

    Raises MissingInput or DataError naming the field of the configuration and the file.
    """
    data, seed = config.data, config.train.seed
    if data.mock:
        return MockDataset(vocab_size, data.seq_length, plan.num_samples, seed)
    used = {name: data.sources[name] for name in plan.sources if plan.samples_of(name)}
    readers = open_readers(used, "data.sources", vocab_size, data.tokenizer_path)
    sources = {name: PackedSource(reader, data.seq_length, seed, name) for name, reader in readers.items()}
    return StagedDataset(plan, sources)


def validation_datasets(data: DataConfig, vocab_size: int) -> dict[str, ValidationSource]:
    """Validation sources by name; none with ``data.mock``. Raises as :func:`training_dataset`."""
    if data.mock:
        return {}
    readers = open_readers(data.validation, "data.validation", vocab_size, data.tokenizer_path)
    return {name: ValidationSource(reader, data.seq_length, name) for name, reader in readers.items()}


def open_readers(
    sources: Mapping[str, SourceConfig], field: str, vocab_size: int, tokenizer_path: str | None
) -> dict[str, IndexedReader]:
    """Readers by name, held to the vocabulary and to the run's tokenizer (without one, to the first source's)."""
    readers: dict[str, IndexedReader] = {}
    for name, source in sources.items():
        try:
            readers[name] = IndexedReader(source.path)
            readers[name].check_vocab(vocab_size)
        except (MissingInput, DataError) as error:
            raise type(error)(f"{field}.{name}: {error}") from None
    expected, owner = None, ""
    if tokenizer_path is not None and readers:
        expected, owner = tokenizer_fingerprint(tokenizer_path), f"data.tokenizer_path {tokenizer_path}"
    for name, reader in readers.items():
        assert reader.manifest is not None
        found = reader.manifest["tokenizer"]["fingerprint"]
        if expected is None:
            expected, owner = found, f"{field}.{name}"
        if found != expected:
            raise DataError(
                f"{field}.{name}: {reader.prefix} was tokenised with another tokenizer (SHA-256 "
                f"{found[:12]}...) than that of {owner} ({expected[:12]}...); prepare it again with that one"
            )
    return readers
