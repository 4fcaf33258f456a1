"""A training loop on megatron-core written out by hand: what a step costs with nothing round it.

The parts and their order are those of megatron-core's own example of a simple loop: ``GPTModel``, its DDP,
distributed optimizer, learning-rate scheduler, the schedule's forward and backward over the micro-batches, the
optimizer's step, the loss read out. No configuration file, no data to read (batches are made before the clock
runs), no log, no check. On a CPU it needs the same bridge to the engine, and stands on the platform's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from megatron_syne.platform.cpu_attention import LocalAttention
from megatron_syne.platform.cpu_norm import LocalNorm

Batch = dict[str, torch.Tensor]


class BareLoop:
    """Model, optimizer and schedule of one rank; the process groups are there already."""

    def __init__(
        self, hf: dict[str, Any], tp: int, pp: int, seq_length: int, micro_batch: int, count: int, bf16: bool
    ) -> None:
        """``hf``: a Llama ``config.json``; ``count``: micro-batches of a step. SP wherever TP is above 1."""
        dtype = torch.bfloat16 if bf16 else torch.float32
        self.seq_length, self.micro_batch, self.count = seq_length, micro_batch, count
        self.vocab = hf["vocab_size"]
        config = TransformerConfig(
            num_layers=hf["num_hidden_layers"],
            hidden_size=hf["hidden_size"],
            ffn_hidden_size=hf["intermediate_size"],
            num_attention_heads=hf["num_attention_heads"],
            num_query_groups=hf["num_key_value_heads"],
            layernorm_epsilon=hf["rms_norm_eps"],
            normalization="RMSNorm",
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            sequence_parallel=tp > 1,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            bf16=bf16,
            calculate_per_token_loss=True,
            use_cpu_initialization=True,
            gradient_accumulation_fusion=False,
            persist_layer_norm=False,
            masked_softmax_fusion=False,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            apply_rope_fusion=False,
            cross_entropy_loss_fusion=False,
            deallocate_pipeline_outputs=True,
        )
        layer = get_gpt_layer_local_spec()
        layer.submodules.self_attention.submodules.core_attention = LocalAttention
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = LocalNorm
        gpt: torch.nn.Module = GPTModel(
            config=config,
            transformer_layer_spec=TransformerBlockSubmodules(
                layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=LocalNorm
            ),
            vocab_size=self.vocab,
            max_sequence_length=seq_length,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            position_embedding_type="rope",
            rotary_base=hf["rope_theta"],
        )
        self.model = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True),
            Float16Module(config, gpt) if bf16 else gpt,
        )
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                lr=1e-4,
                min_lr=0.0,
                weight_decay=0.1,
                clip_grad=1.0,
                bf16=bf16,
                params_dtype=dtype,
                use_distributed_optimizer=True,
            ),
            [self.model],
            use_gloo_process_groups=False,
        )
        self.scheduler = OptimizerParamScheduler(
            self.optimizer, 0.0, 1e-4, 0.0, 10, 10_000, "cosine", 0.1, 0.1, 10_000, "constant"
        )
        config.grad_scale_func = self.optimizer.scale_loss
        config.finalize_model_grads_func = finalize_model_grads
        self.forward_backward = get_forward_backward_func()
        self.batches = [self._batch(number) for number in range(count)]

    def _batch(self, number: int) -> Batch:
        chance = torch.Generator().manual_seed(number)
        tokens = torch.randint(self.vocab, (self.micro_batch, self.seq_length + 1), generator=chance)
        return {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "position_ids": torch.arange(self.seq_length).repeat(self.micro_batch, 1),
            "loss_mask": torch.ones(self.micro_batch, self.seq_length),
        }

    def _forward(self, batches: Iterator[Batch], model: Any) -> tuple[torch.Tensor, Any]:
        batch = next(batches)
        output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

        def loss(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            mask = batch["loss_mask"].view(-1)
            total = torch.sum(losses.view(-1).float() * mask)
            return total, mask.sum().to(torch.int), torch.stack([total.detach(), mask.sum()])

        return output, loss

    def step(self) -> float:
        """One optimizer step; returns its seconds."""
        started = time.perf_counter()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = self.forward_backward(
            forward_step_func=self._forward,
            data_iterator=iter(self.batches),
            model=self.model,
            num_microbatches=self.count,
            seq_length=self.seq_length,
            micro_batch_size=self.micro_batch,
            forward_only=False,
        )
        self.optimizer.step()
        self.scheduler.step(increment=self.count * self.micro_batch)
        if sums:  # the loss is read, as every loop does
            values = torch.stack(sums).sum(dim=0)
            dist.all_reduce(values, group=parallel_state.get_data_parallel_group())
            (values[0] / values[1]).item()
        return time.perf_counter() - started
