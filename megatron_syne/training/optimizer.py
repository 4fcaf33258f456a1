"""megatron-core's DDP and distributed optimizer, from the configuration."""

from __future__ import annotations

from typing import Any

from torch import nn

from megatron_syne.config.schema import RunConfig
from megatron_syne.models.engine_options import DTYPES
from megatron_syne.models.gpt import unwrap
from megatron_syne.training.param_groups import group_overrides


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
    return get_megatron_optimizer(
        engine_options, chunks, config_overrides=group_overrides(config), use_gloo_process_groups=False
    )


def set_learning_rate(optimizer: Any, rate: float, weight_decay: float) -> None:
    """Give every parameter group its learning rate and weight decay of the next step.

    Both are functions of the samples consumed and of nothing else: there is no scheduler state to save, to
    restore twice, or to lag by one step after a resume.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)


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
