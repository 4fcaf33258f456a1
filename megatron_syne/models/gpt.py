"""Build this rank's part of the model: one megatron-core ``GPTModel`` per model chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from megatron_syne.config.arithmetic import resolved_deallocate_pipeline_outputs, resolved_overlap_p2p_comm
from megatron_syne.config.schema import DataConfig, ModelConfig, RunConfig
from megatron_syne.models.config import padded_vocab_size
from megatron_syne.models.family import completed
from megatron_syne.models.rope import rotary_frequencies
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
    return TransformerConfig(**options, **platform.engine_options(config))


def build_model(config: RunConfig, model: ModelConfig, platform: Platform) -> list[nn.Module]:
    """This rank's model chunks, randomly initialised, on its device (one, or VPP of them)."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )

    parallel, model = config.parallel, completed(model)
    engine = engine_config(config, model, platform)
    layer, final_norm = platform.layer_spec()
    chunks: list[nn.Module] = []
    for chunk in range(parallel.virtual_pipeline_model_parallel_size or 1):
        vp_stage = chunk if parallel.virtual_pipeline_model_parallel_size else None
        spec = layer
        if final_norm is not None:
            count = get_num_layers_to_build(engine, vp_stage=vp_stage)
            spec = TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=final_norm)
        gpt = GPTModel(
            config=engine,
            transformer_layer_spec=spec,
            vocab_size=padded_vocab_size(model, parallel.tensor_model_parallel_size),
            max_sequence_length=longest_sequence(config.data),
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            share_embeddings_and_output_weights=bool(model.share_embeddings_and_output_weights),
            position_embedding_type="rope",
            rotary_base=model.rotary_base,
            vp_stage=vp_stage,
        )
        rope = gpt.rotary_pos_emb
        rope.inv_freq = rotary_frequencies(model).to(rope.inv_freq.device)
        module: nn.Module = gpt.to(platform.device)
        if engine.bf16:
            module = Float16Module(engine, module)
        chunks.append(module)
    return chunks


def longest_sequence(data: DataConfig) -> int:
    """Tokens of the longest sample of any stage."""
    return max([data.seq_length, *(stage.seq_length or 0 for stage in data.stages)])


def unwrap(module: nn.Module) -> nn.Module:
    """The GPTModel inside DDP and the 16-bit wrapper."""
    while hasattr(module, "module"):
        module = module.module
    return module


def named_parameters(chunk: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """Parameters of one chunk under their *global* layer numbers (the engine numbers layers per chunk)."""
    model = unwrap(chunk)
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(model.decoder.layers[int(parts[2])].layer_number - 1)  # 1-based in the engine
        yield ".".join(parts), parameter


def load_weights(chunks: list[nn.Module], read: Callable[[str, int, int], torch.Tensor]) -> None:
    """Fill this rank's parameters: ``read(name, tp_rank, tp_size) -> local tensor``.

    Under tied embeddings the last stage's copy is ``output_layer.weight`` to the engine, and the embedding
    to ``read``.
    """
    from megatron.core import parallel_state

    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    for chunk in chunks:
        model = unwrap(chunk)
        for name, parameter in named_parameters(chunk):
            tied = name == "output_layer.weight" and model.share_embeddings_and_output_weights
            tensor = read("embedding.word_embeddings.weight" if tied else name, rank, size)
            if tensor.shape != parameter.shape:
                raise AssertionError(
                    f"{name}: the engine expects {tuple(parameter.shape)}, got {tuple(tensor.shape)}"
                )
            with torch.no_grad():
                parameter.copy_(tensor)
