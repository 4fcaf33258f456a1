"""megatron-core's DDP and distributed optimizer, from the configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megatron_syne.config.schema import RunConfig
from megatron_syne.models.engine_options import DTYPES
from megatron_syne.models.gpt import unwrap
from megatron_syne.training.param_groups import group_overrides

STATE_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.uint8,  # Transformer Engine's name for it: E4M3 with one scale per tensor
}


def wrap_ddp(chunks: list[nn.Module], config: RunConfig) -> list[Any]:
    """megatron-core's DistributedDataParallel round each chunk (also at DP = 1: it owns the fp32 gradients)."""
    from megatron.core.distributed import DistributedDataParallel

    ddp_config = engine_ddp_config(config)
    engine: Any = unwrap(chunks[0]).config
    if engine.tp_comm_overlap:
        from megatron_syne.platform.cuda import start_tp_comm_overlap

        start_tp_comm_overlap(config, engine.hidden_size)
    for chunk in chunks:
        fuse_weight_gradients(chunk)
    return [
        DistributedDataParallel(
            config=unwrap(chunk).config, ddp_config=ddp_config, module=chunk, disable_bucketing=index > 0
        )
        for index, chunk in enumerate(chunks)
    ]


def fuse_weight_gradients(chunk: nn.Module) -> None:
    """Let Transformer Engine's linear layers add weight gradients into DDP's buffer in the product itself.

    Neither a gradient of its own nor a kernel that adds it is needed then; DDP's hook sees that it was added
    (``grad_added_to_main_grad``). megatron-core ties this to its ``gradient_accumulation_fusion``, which its own
    output layer refuses without apex; the layers read this attribute anew in each forward pass.
    """
    for module in chunk.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            layer: Any = module
            layer.fuse_wgrad_accumulation = True


def keep_values_of_weights(chunks: list[Any]) -> None:
    """See to it that master weights begin as the FP8 weights are, not as they were when their layers were built.

    Under ``fp8_param_gather`` Transformer Engine keeps the values that a weight was initialised with, and
    megatron-core makes master weights of those: weights that were loaded since would be lost in the first update.
    ``load_weights`` renews the kept values in full precision; where that was missed, the FP8 values are taken.
    """
    for chunk in chunks:
        for parameter in chunk.parameters():
            kept = getattr(parameter, "_high_precision_init_val", None)
            if kept is None:
                continue
            values = parameter.dequantize().detach().to("cpu", kept.dtype)
            # FP8 rounds by a sixteenth at most, and what is near nothing by half its smallest step (2^-9 in E4M3)
            if (values - kept).abs().max() > 0.125 * kept.abs().max() + 2.0**-9:
                kept.copy_(values)


def build_optimizer(chunks: list[Any], config: RunConfig) -> Any:
    """megatron-core's optimizer: AdamW, fp32 master weights under bf16, state sharded over DP.

    Weight decay is not applied to one-dimensional parameters (norms, biases), the engine's own rule, unless
    ``optimizer`` says otherwise.
    """
    from megatron.core.optimizer import get_megatron_optimizer

    keep_values_of_weights(chunks)
    fp8 = unwrap(chunks[0]).config.fp8 is not None  # emulated FP8 is nothing to the engine
    return get_megatron_optimizer(
        engine_optimizer_config(config, fp8),
        chunks,
        config_overrides=group_overrides(config),
        use_gloo_process_groups=False,
    )


def engine_ddp_config(config: RunConfig) -> Any:
    """megatron-core's ``DistributedDataParallelConfig``."""
    from megatron.core.distributed import DistributedDataParallelConfig

    parallel, precision = config.parallel, config.precision
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=precision.accumulate_allreduce_grads_in_fp32,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        bucket_size=parallel.ddp_bucket_size,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        fp8_param_gather=precision.fp8_param_gather,
    )


def engine_optimizer_config(config: RunConfig, fp8: bool) -> Any:
    """megatron-core's ``OptimizerConfig``; ``fp8``: whether the layers are Transformer Engine's FP8 ones."""
    from megatron.core.optimizer import OptimizerConfig

    options, precision = config.optimizer, config.precision
    return OptimizerConfig(
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
        # of the weights' format: told of a recipe the engine keeps masters itself, and fp32 copies of bf16 gradients
        fp8_recipe=precision.fp8 if fp8 and precision.fp8_param_gather else None,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
        **state_options(config),
    )


def state_options(config: RunConfig) -> dict[str, Any]:
    """megatron-core's ``OptimizerConfig`` fields for the formats and the place of the optimizer's state.

    ``store_param_remainders`` (fp32 master weights as bf16 weights and their missing 16 bits) is the engine's
    default and is put off: its checkpoints hold the 16 bits alone, which the engine then refuses to load
    from ``fully_reshardable``, and which no run with other formats could go on from.
    """
    options = config.optimizer
    result: dict[str, Any] = {}
    if options.use_precision_aware_optimizer:
        result |= {
            "use_precision_aware_optimizer": True,
            "store_param_remainders": False,
            "main_grads_dtype": STATE_DTYPES[options.main_grads_dtype],
            "main_params_dtype": STATE_DTYPES[options.main_params_dtype],
            "exp_avg_dtype": STATE_DTYPES[options.exp_avg_dtype],
            "exp_avg_sq_dtype": STATE_DTYPES[options.exp_avg_sq_dtype],
        }
    if options.optimizer_cpu_offload:
        result |= {
            "optimizer_cpu_offload": True,
            "optimizer_offload_fraction": options.optimizer_offload_fraction,
            "overlap_cpu_optimizer_d2h_h2d": options.overlap_cpu_optimizer_d2h_h2d,
        }
    return result


def changed_formats(stored: dict[str, Any] | None, config: RunConfig) -> list[str]:
    """What to tell of a run that goes on with other formats than those of its checkpoint.

    ``stored``: the ``optimizer`` section that the checkpoint was written under; None (from before it was kept) =
    all fp32. Checkpoints hold unscaled fp32 values of whatever format, so any change is possible; what the
    new format cannot hold is rounded away.
    """
    words = []
    for name in ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
        before, now = (stored or {}).get(name, "fp32"), getattr(config.optimizer, name)
        if before != now:
            words.append(
                f"optimizer.{name}: {before} -> {now}" + ("" if now == "fp32" else ", rounded to it")
            )
    return words


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
