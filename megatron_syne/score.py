"""Perplexity of documents under our own model, in any layout, started like training, one process per rank:

    torchrun --nproc-per-node 4 -m megatron_syne.score --config run.yaml [section.option=value ...] \\
        --input zh.jsonl --output zh.scored.jsonl

Model, layout and number format are the configuration's (but FP8: products are bf16's here), the weights those of
``checkpoint.initialize_from``: a Hugging Face folder, converted shards, or a training checkpoint. Its data, batch
sizes and schedule do not count.
Rank 0 reads, tokenises and writes; the others compute. The numbers are those of
``tools/curate_data.py score-perplexity`` with the same weights.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from megatron_syne.command_line import Parser, ProgressLine
from megatron_syne.config.loader import load_config
from megatron_syne.config.schema import (
    DataConfig,
    ModelConfig,
    PrecisionConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from megatron_syne.curation.perplexity_options import (
    Task,
    add_scoring_arguments,
    task_of,
    weights_identity,
)
from megatron_syne.curation.perplexity_scoring import PART_BYTES, score_files
from megatron_syne.curation.perplexity_windows import micro_batches, padded_length
from megatron_syne.data.tokenizer import Tokenizer, load_tokenizer
from megatron_syne.errors import ConfigError, run_cli
from megatron_syne.models.config import resolve_model
from megatron_syne.parallel.ranks import RankInfo, rank_info
from megatron_syne.parallel.topology import data_parallel_size
from megatron_syne.platform.base import Platform, resolve_name, select
from megatron_syne.preflight.rules import check

if TYPE_CHECKING:
    from megatron_syne.curation.perplexity_parallel import ParallelScorer
    from megatron_syne.preflight.facts import PlatformName


def main(argv: list[str] | None = None) -> int:
    """Parse, check, build the model on this rank and score. Returns the exit code."""
    parser = Parser(prog="megatron_syne.score", description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", help="section.option=value")
    add_scoring_arguments(parser)
    options = parser.parse_args(argv)
    config = load_config(options.config, options.overrides)
    if config.checkpoint.initialize_from is None:
        raise ConfigError("checkpoint.initialize_from: not given; it names the weights to score with")
    model, info = resolve_model(config.model), rank_info()
    task = task_of(options, model.max_position_embeddings)
    # all ranks, so that where it fails it does so on all of them, before they have met
    tokenizer = load_tokenizer(options.tokenizer or tokenizer_folder(config))
    config = scoring_config(config, task, info.world_size)
    check(config, model, info.world_size, cast("PlatformName", resolve_name(config.platform)))
    scorer = build_scorer(config, model, select(config.platform), info, options.batch_tokens)
    if info.rank:
        scorer.serve()
    else:
        replicas = data_parallel_size(config.parallel, info.world_size)
        lead(scorer, task, tokenizer, config, model.vocab_size or 0, PART_BYTES * replicas)
    from megatron_syne.parallel.setup import stop_distributed

    stop_distributed()
    return 0


def scoring_config(config: RunConfig, task: Task, world_size: int) -> RunConfig:
    """The configuration with what scoring does not use (data, batches, schedule) put out of the way."""
    replicas, passes = data_parallel_size(config.parallel, world_size), micro_batches(config.parallel)
    multiple = padded_length(1, config.parallel)
    return replace(
        config,
        run_dir=task.output,
        data=DataConfig(seq_length=max(1, task.context // multiple) * multiple, mock=True),
        train=TrainConfig(
            1,
            replicas * passes,
            train_iters=1,
            seed=config.train.seed,
            deterministic_mode=config.train.deterministic_mode,
        ),
        schedule=ScheduleConfig(),
        precision=PrecisionConfig(params_dtype=config.precision.params_dtype),
    )


def tokenizer_folder(config: RunConfig) -> str:
    """The tokenizer of the configuration, or the one that lies with the weights or the model's shape."""
    if config.data.tokenizer_path is not None:
        return config.data.tokenizer_path
    for place in filter(None, (config.checkpoint.initialize_from, config.model.hf_path)):
        if any((Path(place) / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
            return place
    raise ConfigError(
        "data.tokenizer_path: not given, and no tokenizer lies with the weights; pass --tokenizer"
    )


def build_scorer(
    config: RunConfig, model: ModelConfig, platform: Platform, info: RankInfo, batch_tokens: int
) -> ParallelScorer:
    """This rank's part of the model with its weights; all ranks must call."""
    platform.start(info.local_rank, config.precision, config.train.deterministic_mode)
    from megatron_syne.parallel.setup import start_distributed, start_model_parallel

    start_distributed(platform, info, config.resilience.distributed_timeout_seconds)
    start_model_parallel(config.parallel, config.train.seed)
    from megatron_syne.assembly import initialize
    from megatron_syne.curation.perplexity_parallel import ParallelScorer
    from megatron_syne.models.gpt import build_model

    chunks = build_model(config, model, platform)
    initialize(config, model, chunks)
    return ParallelScorer(config.parallel, model.vocab_size or 0, chunks, platform.device, batch_tokens)


def lead(
    scorer: ParallelScorer,
    task: Task,
    tokenizer: Tokenizer,
    config: RunConfig,
    vocab_size: int,
    part_bytes: int,
) -> None:
    """Rank 0's part: read, tokenise, hand out, write; in the end tell the others, if they are still there."""
    from megatron_syne.curation.perplexity_parallel import END, FAILED

    line = ProgressLine(at_once=True)
    identity = {
        "kind": "megatron_syne",
        "dtype": config.precision.params_dtype,
        "files": weights_identity(config.checkpoint.initialize_from or ""),
    }
    ended = FAILED
    try:
        counts = score_files(task, tokenizer, scorer, vocab_size, identity, part_bytes, line.show)
        ended = END
    finally:
        line.end()
        if not scorer.broken:
            scorer.announce(ended)
    print(f"{task.output}: {counts.describe()}", flush=True)


if __name__ == "__main__":
    sys.exit(run_cli(main))
