"""Put a run together out of the rooms' parts: the only module, with its entry points, that knows them all."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_syne.checkpoint.folder import checkpoint_folders, is_checkpoint, read_manifest, read_run
from megatron_syne.checkpoint.stored import check_same_model, read_ledger
from megatron_syne.config.learning_rate import LearningRate
from megatron_syne.config.schema import ModelConfig, RunConfig
from megatron_syne.data.mixture.planning import MixturePlan, branch_plan, plan_mixture, resume_plan
from megatron_syne.evaluation.tasks import require_harness
from megatron_syne.legs import are_given, check_branch, fit_source, leg_at, model_changes, overrides
from megatron_syne.parallel.ranks import RankInfo
from megatron_syne.parallel.topology import coordinates, data_parallel_size
from megatron_syne.platform.base import Platform
from megatron_syne.training.state import TrainState

if TYPE_CHECKING:
    from megatron_syne.data.loader import DataLoader, TrainingLoader
    from megatron_syne.training.callback import Callback
    from megatron_syne.training.trainer import Trainer


def open_inputs(config: RunConfig, model: ModelConfig) -> None:
    """Open what a new run will read, so that a bad input is told before anything is written or started.

    A run that goes on opens the same when it has read from its checkpoint where it is. The index cache is used
    where its folder exists or was asked for by name: a bad input leaves no new run folder behind.
    """
    from megatron_syne.convert.weights import open_source
    from megatron_syne.data.build import index_cache, training_dataset, validation_datasets
    from megatron_syne.monitor.wandb import require_wandb

    require_harness(config)
    require_wandb(config)
    if checkpoint_folders(Path(config.run_dir) / "checkpoints"):
        return
    vocab_size = model.vocab_size or 0
    cache = index_cache(config) if config.data.index_cache or index_cache(config).is_dir() else None
    branch, start = config.checkpoint.branch_from, config.checkpoint.initialize_from
    if branch is not None:
        read_manifest(Path(branch))
        check_branch(config, Path(branch))
    plan = plan_mixture(config)
    training_dataset(config, plan, vocab_size, cache)
    validation_datasets(config, vocab_size, cache)
    if start is None:
        return
    if is_checkpoint(Path(start)):
        read_manifest(Path(start))
    else:
        source = open_source(start)
        first = leg_at(config, model, plan, TrainState())
        fit_source(source, first.config, first.model)
        source.close()


def each_leg(config: RunConfig, model: ModelConfig, platform: Platform, info: RankInfo) -> Iterator[Trainer]:
    """A trainer for each leg of the run in turn, to be fitted before the next is asked for; all ranks must call.

    The next is built from the checkpoint that the one before ended with, after that one's memory was freed.
    """
    while True:
        trainer = build_trainer(config, model, platform, info)
        yield trainer
        if trainer.stop_reason is not None or trainer.state.step >= trainer.train_iters:
            return
        release(trainer)


def release(trainer: Trainer) -> None:
    """Let go of a trainer's model, optimizer and data, whoever still holds the trainer."""
    trainer.train_data.close()
    for part in getattr(trainer.optimizer, "chained_optimizers", ()):
        # with fp32 weights its shards are views of them, whose autograd nodes hold DDP's hooks: a ring through C++,
        # which no garbage collection sees
        vars(part).clear()
    trainer.chunks.clear()
    trainer.optimizer = trainer.fp8 = trainer.fp8_record = None
    trainer.callbacks = ()
    gc.unfreeze()  # what ``fit`` set aside
    gc.collect()  # the engine's hooks point back at the model


def build_trainer(config: RunConfig, model: ModelConfig, platform: Platform, info: RankInfo) -> Trainer:
    """Build every part of the leg that is to be trained on this rank, load the newest checkpoint (or what a branch
    or a new run starts from), and join them.

    All ranks must call. torch and the engine are imported here, after the platform was selected.
    """
    from megatron_syne.checkpoint import manager as checkpoints
    from megatron_syne.parallel.setup import start_distributed, start_model_parallel

    platform.start(info.local_rank, config.precision, config.train.deterministic_mode)
    start_distributed(platform, info, config.resilience.distributed_timeout_seconds)
    start_model_parallel(config.parallel, config.train.seed)

    from megatron_syne.checkpoint.callback import CheckpointCallback
    from megatron_syne.convert.artifacts import collect_artifacts, refresh_config
    from megatron_syne.curriculum.reweighting import Reweighting
    from megatron_syne.fp8.attach import attach_fp8
    from megatron_syne.fp8.guard import Fp8Guard
    from megatron_syne.models.gpt import build_model
    from megatron_syne.monitor.speed import Speed
    from megatron_syne.training.optimizer import build_optimizer, changed_formats, connect, wrap_ddp
    from megatron_syne.training.param_groups import set_trainable
    from megatron_syne.training.trainer import Trainer

    run_dir = Path(config.run_dir)
    saver = checkpoints.CheckpointManager(
        run_dir / "checkpoints", run_dir / "hf", config.checkpoint.keep_latest
    )
    newest, branch = saver.newest(), config.checkpoint.branch_from
    start = newest or (Path(branch) if branch is not None else None)
    plan, ledger, changes = plan_of(config, newest, info.rank == 0)
    run = read_run(start) if start is not None else {}
    state = TrainState.from_dict(run["state"]) if run else TrainState()
    leg = leg_at(config, model, plan, state)
    if start is not None:
        meant = leg.begins and are_given(run["model"], leg.config, leg.model)
        check_same_model(start, leg.model, stage_begins=meant)
    train_data, validation_data = build_data(config, model, info, plan, ledger, changes, platform)
    chunks = build_model(leg.config, leg.model, platform)
    if start is not None:
        told = [overrides(run, leg), *changed_formats(run.get("optimizer"), leg.config)]
        words, origin = "; ".join(filter(None, told)), f"step {state.step}"
    else:
        words, origin = initialize(leg.config, leg.model, chunks), "start"
    if words:
        reason = "stage" if leg.begins else "configuration"
        record = {"sample": state.consumed_samples, "step": state.step, "reason": reason, "detail": words}
        train_data.changes.append(record)
        if info.rank == 0:
            print(f"{origin}: {words}", file=sys.stderr)
    fp8 = attach_fp8(chunks, leg.config, platform)
    set_trainable(chunks, leg.config)
    ddp_chunks = wrap_ddp(chunks, leg.config)
    optimizer = build_optimizer(ddp_chunks, leg.config)
    connect(ddp_chunks, optimizer, leg.config)
    guard = Fp8Guard(config) if fp8 is not None else None
    trainer = Trainer(
        config=leg.config,
        model_config=leg.model,
        platform=platform,
        chunks=ddp_chunks,
        optimizer=optimizer,
        learning_rate=LearningRate(config, plan).at,
        fp8=fp8,
        fp8_record=guard.record if guard is not None else None,
        train_data=train_data,
        validation_data=validation_data,
        train_iters=plan.train_iters,
        leg_end=leg.end,
    )
    if start is not None:
        trainer.state = checkpoints.load(start, ddp_chunks, optimizer, fp8, leg.reset_optimizer)
        if guard is not None:
            guard.restore(run.get("fp8"))
    if info.rank == 0:
        dtype, weights = config.precision.params_dtype, config.checkpoint.initialize_from
        collect_artifacts(run_dir / "hf", leg.model, dtype, weights or branch, config.data.tokenizer_path)
        refresh_config(run_dir / "hf", leg.model, dtype)
    trainer.callbacks = [
        Reweighting(config),
        *([guard] if guard is not None else []),
        Speed(leg.config, leg.model, platform.device_name, info.world_size),
        CheckpointCallback(saver, (state.step, state.evaluated_step) if newest is not None else None),
        *(watchers(leg.config, leg.model, run_dir, platform, info.world_size) if info.rank == 0 else []),
    ]
    return trainer


def build_data(
    config: RunConfig,
    model: ModelConfig,
    info: RankInfo,
    plan: MixturePlan,
    ledger: dict[str, Any] | None,
    changes: list[dict[str, Any]],
    platform: Platform,
) -> tuple[TrainingLoader, dict[str, DataLoader]]:
    """Training and validation batches of this rank; what :func:`plan_of` gives says where they go on.

    Ranks that need no tokens (pipeline stages in the middle, unless attention is reset) read none.
    """
    from megatron_syne.data.loader import build_training_data, build_validation_data

    place = coordinates(info.rank, config.parallel, info.world_size)
    size = data_parallel_size(config.parallel, info.world_size)
    ends = (0, config.parallel.pipeline_model_parallel_size - 1)
    reads = place.pp in ends or config.data.reset_attention_mask
    vocab_size = model.vocab_size or 0
    pin = platform.pins_memory
    train_data = build_training_data(
        config, plan, vocab_size, place.dp, size, reads, pin, platform.device, ledger, changes
    )
    return train_data, build_validation_data(config, vocab_size, place.dp, size, reads, pin)


def plan_of(
    config: RunConfig, checkpoint: Path | None, tell: bool
) -> tuple[MixturePlan, dict[str, Any] | None, list[dict[str, Any]]]:
    """(plan, ledger of the checkpoint, changes since the run began); what has changed is told where asked.

    ``checkpoint`` None = a new run, which may branch off another's.
    """
    branch = config.checkpoint.branch_from
    if checkpoint is None and branch is not None:
        ledger, consumed, step = read_ledger(Path(branch))
        if tell:
            print(f"branching off {branch} at step {step}", file=sys.stderr)
        change = {"sample": consumed, "step": step, "reason": "branch", "detail": f"off {branch}"}
        return branch_plan(config, ledger, consumed), ledger, [*ledger["changes"], change]
    if checkpoint is None:
        return plan_mixture(config), None, []
    ledger, consumed, step = read_ledger(checkpoint)
    plan, words = resume_plan(config, ledger, consumed)
    new = [{"sample": consumed, "step": step, "reason": "configuration", "detail": word} for word in words]
    for word in words if tell else []:
        print(f"resuming at step {step}: {word}", file=sys.stderr)
    return plan, ledger, [*ledger["changes"], *new]


def initialize(config: RunConfig, model: ModelConfig, chunks: list[Any]) -> str:
    """Fill the weights from a Hugging Face folder, converted shards, or another run's checkpoint; in words what
    of their model the configuration overrides. Nothing where they are random."""
    from megatron_syne.checkpoint import manager as checkpoints
    from megatron_syne.convert.weights import open_source
    from megatron_syne.models.gpt import load_weights

    if config.checkpoint.initialize_from is None:
        return ""
    path = Path(config.checkpoint.initialize_from)
    if is_checkpoint(path):
        before = read_run(path)["model"]
        check_same_model(path, model, stage_begins=are_given(before, config, model))
        checkpoints.load(path, chunks, optimizer=None)
        return "; ".join(model_changes(before, model))
    source = open_source(path)
    words = fit_source(source, config, model)
    load_weights(chunks, source.parameter)
    return words


def watchers(
    config: RunConfig, model: ModelConfig, run_dir: Path, platform: Platform, world_size: int
) -> list[Callback]:
    """Console, tensorboard, metrics.jsonl, Weights & Biases and the evaluation beside the training, on rank 0."""
    from megatron_syne.monitor.console import ConsoleProgress
    from megatron_syne.monitor.description import hyper_parameters, page
    from megatron_syne.monitor.events import TensorboardEvents
    from megatron_syne.monitor.metrics_log import MetricsLog

    result: list[Callback] = []
    if config.harness.tasks:
        from megatron_syne.evaluation.callback import HarnessEvaluation

        result.append(HarnessEvaluation(config))  # first: its last results come as training ends
    result.append(MetricsLog(run_dir / "metrics.jsonl"))
    options = hyper_parameters(config, model, world_size)
    if config.monitor.tensorboard:
        text = page(config, model, platform.describe(), world_size)
        result.append(TensorboardEvents(run_dir / "tensorboard", text, options, model.num_layers or 0))
    if config.monitor.wandb_project is not None:
        from megatron_syne.monitor.wandb import WandbRun

        result.append(WandbRun(config, run_dir, options))
    if config.monitor.progress:
        result.append(ConsoleProgress())
    return result
