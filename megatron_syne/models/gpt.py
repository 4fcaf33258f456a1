"""Build this rank's part of the model: one megatron-core ``GPTModel`` per model chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from megatron_syne.config.schema import DataConfig, ModelConfig, RunConfig
from megatron_syne.models.chunked_loss import install_chunked_loss
from megatron_syne.models.config import padded_vocab_size
from megatron_syne.models.embedding_noise import add_embedding_noise
from megatron_syne.models.engine_options import engine_config
from megatron_syne.models.family import completed
from megatron_syne.models.loss import install_loss
from megatron_syne.models.rope import rotary_frequencies
from megatron_syne.platform.base import Platform


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
    layer, final_norm = platform.layer_spec(config)
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
        install = install_chunked_loss if config.memory.loss_chunk_tokens else install_loss
        install(gpt, config, model)
        add_embedding_noise(gpt, config)
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


def keep_full_precision(parameter: nn.Parameter, values: torch.Tensor) -> None:
    """Renew what Transformer Engine keeps beside an FP8 weight (``fp8_param_gather``): the engine makes its master
    weight of that. Nothing for other weights."""
    kept = getattr(parameter, "_high_precision_init_val", None)
    if kept is not None:
        kept.copy_(values)


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
            keep_full_precision(parameter, tensor)
