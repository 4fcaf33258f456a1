"""Bytes that lie on a rank the whole time: weights, gradient buffers, the optimizer's state. No torch.

Per trained parameter, bf16 weights with fp32 gradients (as Megatron-Bridge counts): 2 + 4 + 12 = 18 bytes, or
6 + 12 / (DP x CP) with the distributed optimizer; fp32: 4 + 4 + 8. megatron-core keeps parameters and gradients in one
flat buffer for each model chunk (``distributed/param_and_grad_buffer.py``), whose padding is followed here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_syne.config.schema import ModelConfig, OptimizerConfig, RunConfig
from megatron_syne.fp8.choice import emulates_fp8
from megatron_syne.models import parameter_names as names
from megatron_syne.models.config import padded_vocab_size
from megatron_syne.models.family import completed
from megatron_syne.parallel.topology import chunk_layers

WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
"""Bytes of a number."""
LINEAR = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")
"""The matrices that FP8 recipes compute with."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a rank, under its name in ``models.parameter_names``."""

    name: str
    size: int
    """Numbers on this rank."""
    trains: bool
    own_bucket: bool = False
    """Whether it has a bucket of the gradient buffer to itself: a tied embedding's two copies, under PP."""

    @property
    def is_linear(self) -> bool:
        """Whether it is a matrix of a layer, which FP8 has."""
        return self.name.endswith(LINEAR)

    @property
    def layer(self) -> int:
        """Global number of its layer; only for those of layers."""
        return int(self.name.split(".")[2])


@dataclass(frozen=True)
class Buffers:
    """Numbers in the gradient buffers of a rank."""

    padded: int
    trained: int
    """Without padding."""


def rank_parameters(config: RunConfig, model: ModelConfig) -> list[list[list[Parameter]]]:
    """``result[pp_rank][chunk]`` = parameters of a rank in the engine's order; the same for its TP, CP and DP ranks."""
    parallel, options, model = config.parallel, config.optimizer, completed(model)
    patterns = [*options.freeze, *options.train_only]
    new_layers = names.new_layers_of(config) if names.ask_for_new_layers(patterns) else None
    sizes, stages = _sizes(model, parallel.tensor_model_parallel_size), []
    chunks = chunk_layers(parallel, model.num_layers or 0)
    tied = bool(model.share_embeddings_and_output_weights)
    for stage, own in enumerate(chunks):
        stages.append(
            [
                [
                    Parameter(
                        name,
                        sizes[_kind(name)],
                        names.trains(name, options.freeze, options.train_only, new_layers),
                        tied and name == names.EMBEDDING and len(chunks) > 1,
                    )
                    for name in _names(
                        model,
                        layers,
                        first=stage == 0 and chunk == 0,
                        last=stage == len(chunks) - 1 and chunk == len(own) - 1,
                        again=tied and len(chunks) > 1,
                    )
                ]
                for chunk, layers in enumerate(own)
            ]
        )
    return stages


def _kind(name: str) -> str:
    """Of a parameter's name, without the layer: all layers are alike."""
    return name.split(".", 3)[3] if name.startswith("decoder.layers.") else name


def _names(model: ModelConfig, layers: Sequence[int], first: bool, last: bool, again: bool) -> Iterator[str]:
    """Names of a chunk's parameters; ``again``: a tied embedding lies on the last stage too."""
    kinds = ("weight", "bias") if model.normalization == "LayerNorm" else ("weight",)
    if first:
        yield names.EMBEDDING
    for number in layers:
        start = f"decoder.layers.{number}"
        yield from (f"{start}.self_attention.linear_qkv.layer_norm_{kind}" for kind in kinds)
        yield f"{start}.self_attention.linear_proj.weight"
        yield f"{start}.self_attention.linear_qkv.weight"
        if model.add_qkv_bias:
            yield f"{start}.self_attention.linear_qkv.bias"
        yield from (f"{start}.mlp.linear_fc1.layer_norm_{kind}" for kind in kinds)
        yield f"{start}.mlp.linear_fc1.weight"
        yield f"{start}.mlp.linear_fc2.weight"
    if last:
        yield from (f"decoder.final_layernorm.{kind}" for kind in kinds)
        if again:
            yield names.EMBEDDING
        elif not model.share_embeddings_and_output_weights:
            yield names.OUTPUT


def _sizes(model: ModelConfig, tp: int) -> dict[str, int]:
    """Numbers of each kind of parameter on one TP rank."""
    hidden, ffn, width = model.hidden_size, model.ffn_hidden_size, model.kv_channels
    heads, groups = model.num_attention_heads, model.num_query_groups
    assert hidden and ffn and width and heads and groups, "resolve_model first"
    qkv, table = (heads + 2 * groups) * width // tp, padded_vocab_size(model, tp) // tp * hidden
    sizes = {
        names.EMBEDDING: table,
        names.OUTPUT: table,
        "self_attention.linear_qkv.weight": qkv * hidden,
        "self_attention.linear_qkv.bias": qkv,
        "self_attention.linear_proj.weight": heads * width * hidden // tp,
        "mlp.linear_fc1.weight": 2 * ffn * hidden // tp,
        "mlp.linear_fc2.weight": ffn * hidden // tp,
    }
    for norm in ("self_attention.linear_qkv.layer_norm", "mlp.linear_fc1.layer_norm"):
        sizes |= {f"{norm}_{kind}": hidden for kind in ("weight", "bias")}
    return sizes | {f"decoder.final_layernorm.{kind}": hidden for kind in ("weight", "bias")}


def buffer_numbers(
    chunks: Sequence[Sequence[Parameter]], config: RunConfig, stage: int, replicas: int
) -> Buffers:
    """Numbers in the gradient buffers of a rank's chunks, over whose ``replicas`` (DP x CP) they are reduced.

    With the distributed optimizer each parameter begins at a multiple of 64 and each bucket ends at one of 128 and of
    the replicas; buckets are many only on the first stage's first chunk, with ``overlap_grad_reduce``.
    """
    parallel = config.parallel
    padded = trained = 0
    for number, chunk in enumerate(chunks):
        sizes = [(p.size, p.own_bucket) for p in reversed(chunk) if p.trains]
        trained += sum(size for size, _ in sizes)
        limit = None
        if parallel.overlap_grad_reduce and stage == 0 and number == 0:
            limit = parallel.ddp_bucket_size or max(40_000_000, 1_000_000 * replicas)
        if parallel.use_distributed_optimizer:
            padded += _padded(sizes, limit, math.lcm(replicas, 128))
        else:
            padded += sum(size for size, _ in sizes)
    return Buffers(padded, trained)


def _padded(sizes: Sequence[tuple[int, bool]], limit: int | None, multiple: int) -> int:
    """End of a buffer that holds these parameters (size, whether in a bucket of its own)."""

    def up(number: int, to: int) -> int:
        return -(-number // to) * to

    end = begin = 0
    is_open = False
    for size, alone in sizes:
        start = up(end, 64)
        if alone and is_open:
            start = begin = up(start, multiple)
        end, is_open = start + size, True
        if alone or (limit is not None and end - begin >= limit):
            end = begin = up(end, multiple)
            is_open = False
    return up(end, multiple)


def weight_bytes(
    chunks: Sequence[Sequence[Parameter]], buffers: Buffers, config: RunConfig, fp8_weights: int
) -> int:
    """Bytes of the weights as they are computed with; the distributed optimizer gathers them in a padded buffer.

    ``fp8_weights``: how many of them are kept in FP8 alone (``fp8_param_gather``).
    """
    width = WIDTH[config.precision.params_dtype]
    frozen = sum(p.size for chunk in chunks for p in chunk if not p.trains)
    held = buffers.padded if config.parallel.use_distributed_optimizer else buffers.trained
    return width * (held + frozen) - (width - 1) * fp8_weights


def gradient_width(config: RunConfig) -> int:
    """Bytes of a number in the gradient buffers."""
    # fp32 weights have fp32 gradients either way
    whole = config.precision.accumulate_allreduce_grads_in_fp32 or WIDTH[config.precision.params_dtype] == 4
    return 4 if whole else 2


def shard(buffers: Buffers, config: RunConfig, replicas: int) -> int:
    """Numbers that one rank steps: its share of the buffers with the distributed optimizer, else all."""
    if not config.parallel.use_distributed_optimizer:
        return buffers.trained
    return min(buffers.trained, buffers.padded // replicas)


def state_width(options: OptimizerConfig, params_dtype: str) -> int:
    """Bytes of moments and master weight for each number; fp32 weights are their own masters."""
    if options.use_precision_aware_optimizer:
        master = WIDTH[options.main_params_dtype]
        return master + WIDTH[options.exp_avg_dtype] + WIDTH[options.exp_avg_sq_dtype]
    return 8 if WIDTH[params_dtype] == 4 else 12


def adam_reads_gradients(config: RunConfig, engine: bool) -> bool:
    """Whether Adam takes bf16 gradients as they are and keeps the master weights itself.

    So with the precision-aware optimizer, but not where Transformer Engine's layers keep weights in FP8 by another
    recipe than ``delayed`` and the masters are fp32: then megatron-core keeps masters and fp32 gradients as without it
    (``optimizer/optimizer_config.py: use_precision_aware_optimizer_no_fp8_or_ds_fp8``).
    """
    options = config.optimizer
    precision = config.precision
    gathers = precision.fp8_param_gather and not emulates_fp8(precision, "cuda" if engine else "cpu")
    recipe = precision.fp8 if gathers else None
    return options.use_precision_aware_optimizer and (
        options.main_params_dtype != "fp32" or recipe in (None, "delayed") or options.optimizer_cpu_offload
    )


SLICE_NUMBERS = 2**27
"""Parameters that Adam steps at a time on CUDA, or one larger one (``platform/adam_slices.py``)."""


def step_bytes(numbers: int, config: RunConfig, engine: bool = False, largest: int = 0) -> int:
    """Bytes that a step of the optimizer takes for a while: fp32 copies of what is not fp32.

    Gradients, unless Adam reads them (:func:`adam_reads_gradients`); and on a GPU (``engine``) moments and master
    weights of one slice, or of the ``largest`` parameter: Transformer Engine's ``FusedAdam.step`` (2.11,
    ``pytorch/optimizers/fused_adam.py``) copies all that it is given before its kernel runs.
    """
    options = config.optimizer
    direct = adam_reads_gradients(config, engine)
    copied = numbers if gradient_width(config) < 4 and not direct else 0
    if engine and options.use_precision_aware_optimizer and not options.optimizer_cpu_offload:
        kinds = [options.exp_avg_dtype, options.exp_avg_sq_dtype]
        kinds += [options.main_params_dtype] if direct else []
        copied += sum(kind != "fp32" for kind in kinds) * min(numbers, max(SLICE_NUMBERS, largest))
    return 4 * copied


def optimizer_bytes(numbers: int, config: RunConfig) -> int:
    """Bytes of the optimizer's state of so many numbers, without what ``optimizer_cpu_offload`` keeps on the host.

    With it the rest has fp32 copies of bf16 gradients too, which lie there from one step to the next
    (``optimizer/cpu_offloading/hybrid_optimizer.py: _set_sub_optimizer_grads``, ``param_update_in_fp32``).
    """
    options = config.optimizer
    width = state_width(options, config.precision.params_dtype)
    if not options.optimizer_cpu_offload:
        return numbers * width
    width += 4 if gradient_width(config) < 4 else 0
    return int(numbers * width * (1.0 - options.optimizer_offload_fraction))
