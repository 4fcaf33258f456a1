"""What recomputation leaves of a model chunk's activations, and what it takes while it computes again. No torch.

As megatron-core does it: ``full`` keeps the input of each group of layers; ``mlp`` the input of the feed-forward part;
``layernorm`` the input of the norms (local layers only: Transformer Engine's norms are part of the linear layers,
recomputed with ``mlp`` and not alone); ``core_attn`` keeps the attention's inputs and, for the output projection, its
output, so it spares a few bytes only (under bf16 on a CPU the fp32 copies), and with Transformer Engine it costs some:
queries and keys beside the fused projection, which attention would let go.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_syne.config.schema import MemoryConfig, ModelConfig, RunConfig
from megatron_syne.fp8.choice import emulates_fp8, layers_in_bf16
from megatron_syne.planner.activations import FP32, Layer, Sizes, layer_bytes, norm_bytes
from megatron_syne.planner.stacks import CUDA_PLATFORM

_BLOCK = 128
"""Values that share a scale in blockwise FP8."""


@dataclass(frozen=True)
class Unit:
    """A part of a model chunk, in the order of the forward pass."""

    kept: int
    """Bytes from its forward to its backward pass."""
    again: int = 0
    """Further bytes while its own backward pass runs: what it computes again, and gradients on the way."""


def layer_units(layer: Layer, sizes: Sizes, memory: MemoryConfig) -> list[Unit]:
    """Attention and feed-forward part of one layer that is not recomputed as a whole."""
    modules: list[str] = []
    if memory.recompute_granularity == "selective":
        modules = memory.recompute_modules or ["core_attn"]
    kept, again = [layer.attention_part, layer.feed_forward_part], [0, 0]
    if "core_attn" in modules:
        kept[0] += layer.projected - layer.attention + sizes.document_mask
        output = 0 if layer.attention_output else sizes.query * sizes.tokens * sizes.width
        again[0] = layer.attention - layer.attention_reused + output
    # what a linear layer keeps is the norm's output itself, or a rounded copy of it
    plain = 0 if layer.rounded else layer.norm_output
    if "mlp" in modules and sizes.engine:  # its norm is part of it
        kept[1] = sizes.residual
        again[1] = layer.feed_forward_part - layer.shared
    elif "mlp" in modules:
        kept[1] = layer.norm + sizes.residual
        again[1] = layer.feed_forward + layer.norm_output - plain
        if layer.rounded_anew:
            again[1] += 3 * sizes.ffn * sizes.hidden * sizes.width
    if "layernorm" in modules and not sizes.engine:
        outputs = plain, sizes.residual if "mlp" in modules else plain
        for part, output in enumerate(outputs):
            kept[part] += sizes.residual - layer.norm - output
            again[part] += layer.norm - layer.shared + sizes.residual
    return [Unit(k, a + _gradients(sizes, part)) for part, (k, a) in enumerate(zip(kept, again, strict=True))]


def _gradients(sizes: Sizes, part: int) -> int:
    """Gradients on the way through a part (0 attention, 1 feed-forward) on a GPU, an estimate; saved tensors, which the
    CPU's numbers are of, do not hold them."""
    if not sizes.engine:
        return 0
    inner = 2 * (sizes.query + 2 * sizes.key) + sizes.query if part == 0 else 3 * sizes.ffn
    weight = 0
    if not CUDA_PLATFORM.fused_layer_gradients:  # the larger of a part's two waits to be added
        weight = (sizes.query + 2 * sizes.key if part == 0 else 2 * sizes.ffn) * sizes.hidden
    return sizes.width * (sizes.tokens * (inner + 3 * sizes.hidden) + weight)


def chunk_units(
    config: RunConfig, model: ModelConfig, sizes: Sizes, layers: list[int], first: bool, last: bool
) -> list[Unit]:
    """The parts of one model chunk; ``first``: it has the embedding, ``last``: the final norm (:func:`logits_bytes` has
    the rest)."""
    precision, memory = config.precision, config.memory
    emulated = emulates_fp8(precision, "cuda" if sizes.engine else "cpu")
    in_bf16 = layers_in_bf16(precision, model.num_layers or 0)
    each = []
    for number in layers:
        fp8 = precision.fp8 is not None and number not in in_bf16
        scaled = 1 + (FP32 / _BLOCK if precision.fp8 == "blockwise" else 0)
        anew = fp8 and emulated and precision.fp8 != "delayed"
        each.append(layer_bytes(sizes, scaled if fp8 and not emulated else 0.0, fp8 and emulated, anew))
    units = [Unit(_start_bytes(sizes, memory, each, first))]
    if memory.recompute_granularity == "full":
        units += _recomputed(each, sizes, memory)
    else:
        plain = [unit for layer in each for unit in layer_units(layer, sizes, memory)]
        units += _offloaded(plain, len(layers), memory)
    if last:
        units.append(Unit(norm_bytes(sizes)[0]))
    return units


def _start_bytes(sizes: Sizes, memory: MemoryConfig, each: list[Layer], first: bool) -> int:
    """What comes into a chunk: token numbers, or the tensor that the stage before sent, held by the schedule."""
    if first:
        return sizes.tokens * (8 + (1 if sizes.tp > 1 else 0))  # and which of them are another TP rank's
    if not each or memory.recompute_granularity == "full":
        return 0 if each else sizes.residual
    if "layernorm" in memory.recompute_modules and not sizes.engine:
        return 0
    return 0 if each[0].shared else sizes.residual


def _recomputed(each: list[Layer], sizes: Sizes, memory: MemoryConfig) -> list[Unit]:
    """Groups of layers of which only the input is kept, and the others of ``block``."""
    whole = [Unit(layer.attention_part + layer.feed_forward_part) for layer in each]
    if memory.recompute_method == "uniform":
        size, groups = memory.recompute_num_layers or 1, len(each)
    else:
        size, groups = 1, min(memory.recompute_num_layers or len(each), len(each))
    parts = sizes.tp if memory.distribute_saved_activations else 1
    units, shared_once = [], sizes.document_mask
    for start in range(0, groups, size):
        group = each[start : start + size]
        inside = sum(unit.kept for unit in whole[start : start + size]) - (
            group[0].shared if parts == 1 else 0
        )
        if parts > 1 and not group[0].shared:
            inside += sizes.residual
        weights = (2 * sizes.query + 2 * sizes.key + 3 * sizes.ffn) * sizes.hidden * sizes.width
        inside += weights * sum(layer.rounded_anew for layer in group)
        units.append(Unit(sizes.residual // parts + shared_once, inside + _gradients(sizes, 1)))
        shared_once = 0
    kept = [unit for layer in each[groups:] for unit in layer_units(layer, sizes, MemoryConfig())]
    return units + kept


def _offloaded(units: list[Unit], layers: int, memory: MemoryConfig) -> list[Unit]:
    """Layers whose activations wait in host memory; two of them are on the GPU at a time, going and coming
    (Transformer Engine's double buffer; an assumption, not measured)."""
    if not memory.cpu_offloading:
        return units
    away = memory.cpu_offloading_num_layers or layers - 1
    if away <= 2:
        return units
    buffers = units[: 2 * 2]
    return [*buffers, *(Unit(0, unit.again) for unit in units[4 : 2 * away]), *units[2 * away :]]
