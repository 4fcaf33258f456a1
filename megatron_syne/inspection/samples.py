"""``samples``: what sample N of a run is, and what a step reads."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from megatron_syne.config.loader import load_config
from megatron_syne.config.schema import RunConfig
from megatron_syne.data.batches import BatchBuilder, BatchForm
from megatron_syne.data.build import index_cache, training_dataset
from megatron_syne.data.dataset import MockDataset, StagedDataset
from megatron_syne.data.mixture.plan import MixturePlan
from megatron_syne.data.mixture.planning import plan_mixture, resume_plan
from megatron_syne.data.tokenizer import Tokenizer, load_tokenizer
from megatron_syne.errors import ConfigError
from megatron_syne.inspection.consumed import ledger_of
from megatron_syne.inspection.text import NOT_PREDICTED, cut, marked, say
from megatron_syne.models.config import resolve_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "--config", help="YAML file of the run (default: the one that --run was started with)"
    )
    parser.add_argument("overrides", nargs="*", help="section.option=value")
    parser.add_argument(
        "--run",
        dest="run_dir",
        metavar="RUN_DIR",
        help="a run that is under way: with what its newest checkpoint says has changed",
    )
    parser.add_argument("--index", type=int, nargs="+", metavar="N", help="these samples, from 0 (the first)")
    parser.add_argument("--step", type=int, help="all samples of this iteration, from 1, a line each")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="default: data.tokenizer_path, or the model's")
    parser.add_argument("--characters", type=int, default=0, help="at most so many of a document; 0 = all")


def run(options: argparse.Namespace) -> int:
    """Print; returns the exit code."""
    if options.config is None and options.run_dir is None:
        raise ConfigError("give --config, or --run for a run that is under way")
    config = load_config(options.config or Path(options.run_dir) / "config.yaml", options.overrides)
    dataset = opened(config, options.run_dir)
    tokenizer = None if config.data.mock else tokenizer_of(config, options.tokenizer)
    if options.step is not None:
        for line in step_lines(dataset, options.step, tokenizer):
            say(line)
    for index in options.index or ([0] if options.step is None else []):
        if not 0 <= index < len(dataset):
            raise ConfigError(f"--index: {index} of {len(dataset)} samples (from 0)")
        say("\n".join(sample_lines(dataset, index, config, tokenizer, options.characters or None)))
    return 0


def opened(config: RunConfig, run_dir: str | None) -> StagedDataset | MockDataset:
    """The run's samples, as a configuration plans them or as a run that is under way has read and will read them."""
    if run_dir is None:
        plan = plan_mixture(config)
    else:
        _, ledger, _ = ledger_of(run_dir)
        plan, changes = resume_plan(config, ledger, ledger["consumed_samples"])
        for change in changes:
            say(f"changed since the newest checkpoint: {change}")
    cache = index_cache(config)
    vocab_size = resolve_model(config.model).vocab_size or 0
    return training_dataset(config, plan, vocab_size, cache if cache.is_dir() else None)


def tokenizer_of(config: RunConfig, given: str | None) -> Tokenizer | None:
    """The tokenizer of the run; None (token ids are shown) where the configuration names none."""
    places = (given, config.data.tokenizer_path, config.model.hf_path)
    for place in filter(None, places):
        if place in places[:2] or any(
            (Path(place) / f"tokenizer.{kind}").is_file() for kind in ("json", "model")
        ):
            return load_tokenizer(place)
    return None


def plan_of(dataset: StagedDataset | MockDataset) -> MixturePlan:
    """The plan behind the samples."""
    assert dataset.plan is not None
    return dataset.plan


def sample_lines(
    dataset: StagedDataset | MockDataset,
    index: int,
    config: RunConfig,
    tokenizer: Tokenizer | None,
    characters: int | None,
) -> list[str]:
    """One sample: where it is from, its documents as text, what of it is predicted."""
    sample, where, plan = dataset[index], dataset.where(index), plan_of(dataset)
    length = len(sample.tokens) - 1
    mask = BatchBuilder(dataset, 1, 1, form=BatchForm.of(config.data)).micro_batch(index)["loss_mask"][0]
    # Position i predicts token i + 1. Token 0 is there to predict from; the sample before it predicts it.
    predicted = np.append(True, mask > 0)
    lines = [
        f"── sample {index:,} of {len(dataset):,}: step {plan.iteration_at(index) + 1:,}, stage {where.stage}, "
        f"source {where.source}, epoch {where.epoch}; {length:,} tokens, {int(mask.sum()):,} predicted "
        f"(the rest between {' and '.join(NOT_PREDICTED)})"
    ]
    at = 0
    for document, start, stop in where.ranges:
        ends = bool(np.isin(at + stop - start - 1, sample.document_ends))
        span = f"tokens {start:,} to {stop:,}"
        begin = "from its begin" if start == 0 else "goes on"
        lines.append(f"── document {document}, {span}, {begin}{', to its end' if ends else ''}")
        here = slice(at, at + stop - start)
        lines.append(cut(marked(tokenizer, sample.tokens[here], predicted[here]), characters))
        at += stop - start
    if at < length:
        lines.append(f"── padding: {length - at:,} tokens")
    elif sample.length == length:
        last = marked(tokenizer, sample.tokens[length:], predicted[length:])
        lines.append(f"── and to be predicted last: {last}")
    return lines


def step_lines(dataset: StagedDataset | MockDataset, step: int, tokenizer: Tokenizer | None) -> list[str]:
    """One line for each sample of an iteration (from 1)."""
    plan = plan_of(dataset)
    if not 1 <= step <= plan.train_iters:
        raise ConfigError(f"--step: {step} of {plan.train_iters} iterations (from 1)")
    first = plan.sample_at(step - 1)
    batch = plan.segment_at(first).global_batch_size
    lines = [f"step {step:,}: samples {first:,} to {first + batch - 1:,}, stage {plan.stage_at(first)}"]
    for index in range(first, first + batch):
        where = dataset.where(index)
        documents = (
            f"{len(where.ranges)} document{'s' * (len(where.ranges) != 1)} from {where.ranges[0].document}"
        )
        text = marked(
            tokenizer, dataset[index].tokens[:24], np.ones(24, dtype=bool)[: plan.seq_length_at(index)]
        )
        lines.append(
            f"{index:>12,}  {where.source}, epoch {where.epoch}, {documents}: {' '.join(text.split())[:60]}"
        )
    return lines
