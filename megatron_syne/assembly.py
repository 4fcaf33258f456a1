"""Put a run together out of the rooms' parts: the only module, with its entry points, that knows them all."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_syne.config.learning_rate import LearningRate
from megatron_syne.config.loader import to_yaml
from megatron_syne.config.schema import LaunchConfig, ModelConfig, RunConfig
from megatron_syne.data.mixture.planning import MixturePlan, plan_mixture, resume_plan
from megatron_syne.parallel.ranks import RankInfo
from megatron_syne.parallel.topology import coordinates, data_parallel_size
from megatron_syne.platform.base import Platform

if TYPE_CHECKING:
    from megatron_syne.data.loader import DataLoader, TrainingLoader
    from megatron_syne.training.callback import Callback
    from megatron_syne.training.trainer import Trainer


def open_inputs(config: RunConfig, model: ModelConfig) -> None:
    """Open what a new run will read, so that a bad input is told before anything is written or started.

    A run that goes on opens the same when it has read from its checkpoint where it is. The index cache is used
    where its folder exists or was asked for by name: a bad input leaves no new run folder behind.
    """
    from megatron_syne.checkpoint.folder import checkpoint_folders, is_checkpoint, read_manifest
    from megatron_syne.convert.weights import open_source
    from megatron_syne.data.build import index_cache, training_dataset, validation_datasets

    if checkpoint_folders(Path(config.run_dir) / "checkpoints"):
        return
    vocab_size = model.vocab_size or 0
    cache = index_cache(config) if config.data.index_cache or index_cache(config).is_dir() else None
    training_dataset(config, plan_mixture(config), vocab_size, cache)
    validation_datasets(config, vocab_size, cache)
    start = config.checkpoint.initialize_from
    if start is None:
        return
    if is_checkpoint(Path(start)):
        read_manifest(Path(start))
    else:
        source = open_source(start)
        source.check_model(model)
        source.close()


def build_trainer(config: RunConfig, model: ModelConfig, platform: Platform, info: RankInfo) -> Trainer:
    """Build every part on this rank, load the newest checkpoint or the initial weights, and join them.

    All ranks must call. torch and the engine are imported here, after the platform was selected.
    """
    from megatron_syne.checkpoint import manager as checkpoints
    from megatron_syne.parallel.setup import start_distributed, start_model_parallel

    platform.start(info.local_rank, config.precision)
    start_distributed(platform, info, config.resilience.distributed_timeout_seconds)
    start_model_parallel(config.parallel, config.train.seed)

    from megatron_syne.checkpoint.callback import CheckpointCallback
    from megatron_syne.convert.artifacts import collect_artifacts
    from megatron_syne.curriculum.reweighting import Reweighting
    from megatron_syne.fp8.attach import attach_fp8
    from megatron_syne.fp8.guard import Fp8Guard
    from megatron_syne.models.gpt import build_model
    from megatron_syne.training.optimizer import build_optimizer, connect, wrap_ddp
    from megatron_syne.training.param_groups import set_trainable
    from megatron_syne.training.trainer import Trainer

    run_dir = Path(config.run_dir)
    saver = checkpoints.CheckpointManager(
        run_dir / "checkpoints", run_dir / "hf", config.checkpoint.keep_latest
    )
    newest = saver.newest()
    if newest is not None:
        checkpoints.check_same_model(newest, model)
    train_data, validation_data = build_data(config, model, info, newest, platform)
    chunks = build_model(config, model, platform)
    if newest is None and config.checkpoint.initialize_from is not None:
        initialize(config, model, chunks)
    fp8 = attach_fp8(chunks, config, platform)
    set_trainable(chunks, config)
    ddp_chunks = wrap_ddp(chunks, config)
    optimizer = build_optimizer(ddp_chunks, config)
    connect(ddp_chunks, optimizer, config)
    trainer = Trainer(
        config=config,
        model_config=model,
        platform=platform,
        chunks=ddp_chunks,
        optimizer=optimizer,
        learning_rate=LearningRate(config, train_data.plan).at,
        fp8=fp8,
        train_data=train_data,
        validation_data=validation_data,
        train_iters=train_data.plan.train_iters,
    )
    if newest is not None:
        trainer.state = checkpoints.load(newest, ddp_chunks, optimizer, fp8)
    if info.rank == 0:
        dtype, start = config.precision.params_dtype, config.checkpoint.initialize_from
        collect_artifacts(run_dir / "hf", model, dtype, start, config.data.tokenizer_path)
    trainer.callbacks = [
        Reweighting(config),
        *([Fp8Guard(config)] if fp8 is not None and config.precision.fp8_guard.interval else []),
        CheckpointCallback(saver, trainer.state.step if newest is not None else -1),
        *(watchers(config, model, run_dir, platform) if info.rank == 0 else []),
    ]
    return trainer


def build_data(
    config: RunConfig, model: ModelConfig, info: RankInfo, checkpoint: Path | None, platform: Platform
) -> tuple[TrainingLoader, dict[str, DataLoader]]:
    """Training and validation batches of this rank, from where ``checkpoint`` (None = the start) left off.

    Ranks that need no tokens (pipeline stages in the middle, unless attention is reset) read none.
    """
    from megatron_syne.data.loader import build_training_data, build_validation_data

    place = coordinates(info.rank, config.parallel, info.world_size)
    size = data_parallel_size(config.parallel, info.world_size)
    ends = (0, config.parallel.pipeline_model_parallel_size - 1)
    reads = place.pp in ends or config.data.reset_attention_mask
    plan, ledger, changes = plan_of(config, checkpoint, info.rank == 0)
    vocab_size = model.vocab_size or 0
    pin = platform.pins_memory
    train_data = build_training_data(
        config, plan, vocab_size, place.dp, size, reads, pin, platform.device, ledger, changes
    )
    return train_data, build_validation_data(config, vocab_size, place.dp, size, reads, pin)


def plan_of(
    config: RunConfig, checkpoint: Path | None, tell: bool
) -> tuple[MixturePlan, dict[str, Any] | None, list[dict[str, Any]]]:
    """(plan, ledger of the checkpoint, changes since the run began); what has changed is told where asked."""
    from megatron_syne.checkpoint.manager import read_ledger

    if checkpoint is None:
        return plan_mixture(config), None, []
    ledger, consumed, step = read_ledger(checkpoint)
    plan, words = resume_plan(config, ledger, consumed)
    new = [{"sample": consumed, "step": step, "reason": "configuration", "detail": word} for word in words]
    for word in words if tell else []:
        print(f"resuming at step {step}: {word}", file=sys.stderr)
    return plan, ledger, [*ledger["changes"], *new]


def initialize(config: RunConfig, model: ModelConfig, chunks: list[Any]) -> None:
    """Fill the weights from a Hugging Face folder, converted shards, or another run's checkpoint."""
    from megatron_syne.checkpoint import manager as checkpoints
    from megatron_syne.checkpoint.folder import is_checkpoint
    from megatron_syne.convert.weights import open_source
    from megatron_syne.models.gpt import load_weights

    path = Path(config.checkpoint.initialize_from or "")
    if is_checkpoint(path):
        checkpoints.check_same_model(path, model)
        checkpoints.load(path, chunks, optimizer=None)
        return
    source = open_source(path)
    source.check_model(model)
    load_weights(chunks, source.parameter)


def watchers(config: RunConfig, model: ModelConfig, run_dir: Path, platform: Platform) -> list[Callback]:
    """Console, tensorboard and metrics.jsonl, on rank 0."""
    from megatron_syne.monitor.console import ConsoleProgress
    from megatron_syne.monitor.events import MetricsLog, TensorboardEvents

    result: list[Callback] = [MetricsLog(run_dir / "metrics.jsonl")]
    if config.monitor.tensorboard:
        # without the launch section: its environment may hold keys that are nobody else's business
        shown = to_yaml(replace(config, model=model, launch=LaunchConfig()))
        text = f"{platform.describe()}\n\n{shown}"
        result.append(TensorboardEvents(run_dir / "tensorboard", text))
    if config.monitor.progress:
        result.append(ConsoleProgress())
    return result
