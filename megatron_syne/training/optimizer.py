"""megatron-core's DDP, distributed optimizer and learning-rate schedule, from the configuration."""

from __future__ import annotations

from typing import Any

from torch import nn

from megatron_syne.config.arithmetic import RunLength, run_schedule
from megatron_syne.config.schema import RunConfig
from megatron_syne.models.gpt import DTYPES, unwrap


def wrap_ddp(chunks: list[nn.Module], config: RunConfig) -> list[Any]:
    """megatron-core's DistributedDataParallel round each chunk (also at DP = 1: it owns the fp32 gradients)."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    parallel, precision = config.parallel, config.precision
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=precision.accumulate_allreduce_grads_in_fp32,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        fp8_param_gather=precision.fp8_param_gather,
    )
    return [
        DistributedDataParallel(
            config=unwrap(chunk).config, ddp_config=ddp_config, module=chunk, disable_bucketing=index > 0
        )
        for index, chunk in enumerate(chunks)
    ]


def build_optimizer(chunks: list[Any], config: RunConfig) -> Any:
    """megatron-core's optimizer: AdamW, fp32 master weights under bf16, state sharded over DP.

    Weight decay is not applied to one-dimensional parameters (norms, biases), the engine's own rule.
    """
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    options, precision = config.optimizer, config.precision
    engine_options = OptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        min_lr=options.min_lr,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_eps=options.adam_eps,
        weight_decay=options.weight_decay,
        clip_grad=options.clip_grad,
        bf16=precision.params_dtype == "bf16",
        params_dtype=DTYPES[precision.params_dtype],
        fp8_recipe=precision.fp8,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
    return get_megatron_optimizer(engine_options, chunks, use_gloo_process_groups=False)


def build_scheduler(optimizer: Any, config: RunConfig, run: RunLength) -> Any:
    """megatron-core's schedule over a plan of samples, counted in samples: the batch size may change on the way."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    schedule, samples = config.schedule, run_schedule(config, run)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=schedule.lr_warmup_init,
        max_lr=config.optimizer.lr,
        min_lr=config.optimizer.min_lr,
        lr_warmup_steps=samples.warmup,
        lr_decay_steps=samples.decay,
        lr_decay_style=schedule.lr_decay_style,
        start_wd=config.optimizer.weight_decay,
        end_wd=config.optimizer.weight_decay,
        wd_incr_steps=samples.decay,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=False,
        wsd_decay_steps=samples.wsd_decay,
        lr_wsd_decay_style=schedule.lr_wsd_decay_style,
    )


def set_learning_rate(scheduler: Any, consumed_samples: int) -> None:
    """Put the schedule where ``consumed_samples`` says.

    The rate is a function of the samples consumed and of nothing else: there is no scheduler state to save,
    to restore twice, or to lag by one step after a resume.
    """
    scheduler.num_steps = consumed_samples
    scheduler.step(increment=0)


def connect(chunks: list[Any], optimizer: Any, config: RunConfig) -> None:
    """Hand the engine the hooks that its schedules call, through its own configuration."""
    from megatron.core.distributed import finalize_model_grads

    engine = unwrap(chunks[0]).config
    engine.grad_scale_func = optimizer.scale_loss
    engine.finalize_model_grads_func = finalize_model_grads
    one = len(chunks) == 1
    if config.parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        start = [chunk.start_grad_sync for chunk in chunks]
        engine.no_sync_func = no_sync[0] if one else no_sync
        engine.grad_sync_func = start[0] if one else start
    if config.parallel.overlap_param_gather:
        gather = [chunk.start_param_sync for chunk in chunks]
        engine.param_sync_func = gather[0] if one else gather
