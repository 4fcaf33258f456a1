"""megatron-core's ``TransformerConfig`` for a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megatron_syne.config.arithmetic import resolved_deallocate_pipeline_outputs, resolved_overlap_p2p_comm
from megatron_syne.config.schema import ModelConfig, RunConfig
from megatron_syne.models.family import completed
from megatron_syne.platform.base import Platform

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def engine_config(config: RunConfig, model: ModelConfig, platform: Platform) -> Any:
    """megatron-core's ``TransformerConfig`` for a resolved model.

    ``calculate_per_token_loss`` is set here, as it must be before DDP is built: then neither DDP nor the
    schedule divides by the number of replicas or micro-batches, and the loss is the same in every layout.
    """
    from megatron.core.transformer import TransformerConfig

    model = completed(model)
    parallel, precision = config.parallel, config.precision
    vpp = parallel.virtual_pipeline_model_parallel_size
    dtype = DTYPES[precision.params_dtype]
    overlap = resolved_overlap_p2p_comm(parallel)
    options: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.kv_channels,
        "layernorm_epsilon": model.layernorm_epsilon,
        "init_method_std": model.init_method_std,
        "normalization": model.normalization,
        "layernorm_zero_centered_gamma": model.layernorm_zero_centered_gamma,
        "add_qkv_bias": model.add_qkv_bias,
        # tokens before and after; the window of Hugging Face counts the token itself
        "window_size": None if model.window_size is None else (model.window_size - 1, 0),
        "gated_linear_unit": True,
        "activation_func": nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": vpp,
        "context_parallel_size": parallel.context_parallel_size,
        "cp_comm_type": parallel.cp_comm_type or "p2p",
        "sequence_parallel": parallel.sequence_parallel,
        "num_layers_in_first_pipeline_stage": parallel.num_layers_in_first_pipeline_stage,
        "num_layers_in_last_pipeline_stage": parallel.num_layers_in_last_pipeline_stage,
        "pipeline_model_parallel_layout": parallel.pipeline_model_parallel_layout,
        "overlap_p2p_comm": overlap,
        "batch_p2p_comm": not overlap,
        "deallocate_pipeline_outputs": resolved_deallocate_pipeline_outputs(parallel, platform.name),
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "calculate_per_token_loss": True,
    }
    return TransformerConfig(**options, **memory_options(config, model), **platform.engine_options(config))


def memory_options(config: RunConfig, model: ModelConfig) -> dict[str, Any]:
    """megatron-core's fields for ``memory`` and the overlap of TP; empty where nothing is asked for.

    What of the engine's is filled in where the schema allows nothing: ``block`` recomputes every layer of a chunk
    that it is not told otherwise of, ``uniform`` one layer at a time, and offloading leaves out the last layer,
    which the backward pass needs first (the engine wants fewer than all).
    """
    memory, layers = config.memory, model.num_layers or 1
    options: dict[str, Any] = {}
    if memory.recompute_granularity == "selective":
        options["recompute_modules"] = memory.recompute_modules or ["core_attn"]
    elif memory.recompute_granularity == "full":
        options |= {
            "recompute_method": memory.recompute_method,
            "recompute_num_layers": memory.recompute_num_layers
            or (1 if memory.recompute_method == "uniform" else layers),
            "distribute_saved_activations": memory.distribute_saved_activations,
        }
    if memory.recompute_granularity is not None:
        options["recompute_granularity"] = memory.recompute_granularity
    if memory.cpu_offloading:
        options |= {
            "cpu_offloading": True,
            "cpu_offloading_num_layers": memory.cpu_offloading_num_layers or layers - 1,
        }
    if config.parallel.tp_comm_overlap:
        options["tp_comm_overlap"] = True
    return options
