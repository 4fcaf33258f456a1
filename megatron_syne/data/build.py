"""The datasets of a run from its configuration: files opened, checked against the vocabulary, mixed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from megatron_syne.config.schema import RunConfig, SourceConfig
from megatron_syne.data.dataset import (
    MockDataset,
    StagedDataset,
    ValidationSource,
    make_stream,
    used_sources,
)
from megatron_syne.data.mixture.planning import MixturePlan, check_supply
from megatron_syne.data.tokenizer import tokenizer_fingerprint
from megatron_syne.data.tokens.index_cache import IndexCache
from megatron_syne.data.tokens.reader import IndexedReader
from megatron_syne.data.tokens.streams import SourceDocuments
from megatron_syne.errors import DataError, MissingInput

logger = logging.getLogger(__name__)


def index_cache(config: RunConfig) -> Path:
    """Folder of the orders of documents that all ranks share."""
    return Path(config.data.index_cache or Path(config.run_dir) / "index_cache")


def training_dataset(
    config: RunConfig, plan: MixturePlan, vocab_size: int, cache_dir: str | Path | None = None
) -> StagedDataset | MockDataset:
    """The training samples; ``vocab_size`` = rows of the embedding. Sources without a share are not opened.

    ``cache_dir``: folder where orders are kept for all ranks; without one they are made in memory. Raises
    MissingInput or DataError naming the field of the configuration and the file, ConfigError where a source
    is read more often than it allows, CannotCreate where the folder cannot be written.
    """
    data, seed = config.data, config.train.seed
    if data.mock:
        return MockDataset(vocab_size, data.seq_length, plan.num_samples, seed, plan)
    used = {name: data.sources[name] for name in used_sources(plan)}
    documents = open_sources(
        used, "data.sources", vocab_size, data.tokenizer_path, seed, IndexCache(cache_dir)
    )
    dataset = StagedDataset(plan, {name: make_stream(each, data.packing) for name, each in documents.items()})
    check_supply(plan, dataset.epoch_tokens(), config)
    return dataset


def validation_datasets(
    config: RunConfig, vocab_size: int, cache_dir: str | Path | None = None
) -> dict[str, ValidationSource]:
    """Validation sources by name; none with ``data.mock``. Raises as :func:`training_dataset`."""
    data = config.data
    if data.mock:
        return {}
    documents = open_sources(
        data.validation, "data.validation", vocab_size, data.tokenizer_path, 0, IndexCache(cache_dir)
    )
    return {name: ValidationSource(each, data.seq_length) for name, each in documents.items()}


def open_sources(
    sources: Mapping[str, SourceConfig],
    field: str,
    vocab_size: int,
    tokenizer_path: str | None,
    seed: int,
    cache: IndexCache,
) -> dict[str, SourceDocuments]:
    """Sources by name, held to the vocabulary and to the run's tokenizer (without one, to the first source's).

    Files of other tools, without a manifest, are held to the vocabulary alone: each is read once for that.
    """
    opened: dict[str, SourceDocuments] = {}
    for name, source in sources.items():
        try:
            reader = IndexedReader(source.path, require_manifest=False, cache=cache)
            reader.check_vocab(vocab_size)
            opened[name] = SourceDocuments(reader, name, seed, source, cache)
        except (MissingInput, DataError) as error:
            raise type(error)(f"{field}.{name}: {error}") from None
    expected, owner = None, ""
    if tokenizer_path is not None and opened:
        expected, owner = tokenizer_fingerprint(tokenizer_path), f"data.tokenizer_path {tokenizer_path}"
    for name, documents in opened.items():
        reader = documents.reader
        if reader.manifest is None:
            logger.warning(
                "%s.%s: %s has no manifest; its tokenizer is not known and not checked",
                field,
                name,
                reader.prefix,
            )
            continue
        found = reader.manifest["tokenizer"]["fingerprint"]
        if expected is None:
            expected, owner = found, f"{field}.{name}"
        if found != expected:
            raise DataError(
                f"{field}.{name}: {reader.prefix} was tokenised with another tokenizer (SHA-256 "
                f"{found[:12]}...) than that of {owner} ({expected[:12]}...); prepare it again with that one"
            )
    return opened
