"""The rules of what is recomputed, offloaded and overlapped, and of the optimizer's formats.

Most are megatron-core 0.16.1's own checks (``TransformerConfig``, ``OptimizerConfig``), said before a process is
started. The others are what it accepts and does not do, or does wrongly: each says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_syne.errors import ConfigError
from megatron_syne.parallel.topology import chunk_layers
from megatron_syne.preflight.facts import Facts, nearest

Problems = Iterator[str]

RECOMPUTE_MODULES = ("core_attn", "mlp", "layernorm")
"""Those of the engine's modules that a dense model has."""

_GRANULARITY = "memory.recompute_granularity"
_METHOD = "memory.recompute_method"
_NUM_LAYERS = "memory.recompute_num_layers"
_MODULES = "memory.recompute_modules"
_DISTRIBUTE = "memory.distribute_saved_activations"
_OFFLOAD = "memory.cpu_offloading"
_OFFLOAD_LAYERS = "memory.cpu_offloading_num_layers"
_TP_OVERLAP = "parallel.tp_comm_overlap"
_TP = "parallel.tensor_model_parallel_size"
_PP = "parallel.pipeline_model_parallel_size"
_SP = "parallel.sequence_parallel"
_AWARE = "optimizer.use_precision_aware_optimizer"
_OPTIMIZER_OFFLOAD = "optimizer.optimizer_cpu_offload"
_MOMENTS = ("optimizer.exp_avg_dtype", "optimizer.exp_avg_sq_dtype")
_FORMATS = ("optimizer.main_grads_dtype", "optimizer.main_params_dtype", *_MOMENTS)


def recompute_options_belong_together(facts: Facts) -> Problems:
    """Method, number of layers and distribution go with ``full``, modules with ``selective``; ``full`` needs a
    method."""
    granularity = facts.get(_GRANULARITY)
    for key, wanted in (
        (_METHOD, "full"),
        (_NUM_LAYERS, "full"),
        (_DISTRIBUTE, "full"),
        (_MODULES, "selective"),
    ):
        if facts.get(key) and granularity != wanted:
            yield f"{facts.at(key)} needs {_GRANULARITY}: {wanted}; it is {granularity or 'null'}"
    if granularity == "full" and facts.get(_METHOD) is None:
        yield f"{facts.at(_GRANULARITY)} needs {_METHOD}: uniform or block"


def recompute_modules_exist(facts: Facts) -> Problems:
    """Only modules of a dense model can be recomputed; the norms not under FP8 with delayed scaling."""
    names = facts.get(_MODULES)
    unknown = [name for name in names if name not in RECOMPUTE_MODULES]
    if unknown:
        yield f"{facts.at(_MODULES)}: no module {', '.join(unknown)}; there are {', '.join(RECOMPUTE_MODULES)}"
    if "layernorm" in names and facts.get("precision.fp8") == "delayed":
        yield (
            f"{facts.at(_MODULES)}: layernorm cannot be recomputed with {facts.at('precision.fp8')}, whose scales "
            f"would be of two passes; leave it out, or use precision.fp8: tensorwise"
        )


def recompute_layers_fit_chunks(facts: Facts) -> Problems:
    """``uniform`` groups divide the layers of every chunk (the engine would reach past the end); ``block`` is at
    most the layers of the largest."""
    count, method = facts.get(_NUM_LAYERS), facts.get(_METHOD)
    if count is None or method is None or facts.get(_GRANULARITY) != "full":
        return
    try:
        stages = chunk_layers(facts.config.parallel, facts.number("model.num_layers"))
    except ConfigError:
        return  # reported by its own rule
    sizes = sorted({len(chunk) for stage in stages for chunk in stage if chunk})
    legal = [
        size
        for size in range(1, sizes[-1] + 1)
        if method == "block" or not any(layers % size for layers in sizes)
    ]
    if count not in legal:
        text = ", ".join(str(size) for size in sizes)
        rule = "must divide the layers of each" if method == "uniform" else "is at most the layers of a"
        yield f"{facts.at(_NUM_LAYERS)} {rule} model chunk ({text}); nearest legal: {nearest(count, legal)}"


def saved_activations_can_be_distributed(facts: Facts) -> Problems:
    """Kept inputs are cut over TP ranks, unless SP has cut them already."""
    if not facts.get(_DISTRIBUTE):
        return
    tp = facts.get(_TP)
    if facts.get(_SP):
        yield f"{facts.at(_DISTRIBUTE)} with {facts.at(_SP)}, which has cut them already: set it to false"
    elif tp == 1:
        yield f"{facts.at(_DISTRIBUTE)} needs {_TP} > 1; it is 1: set it to false"
    else:
        hidden, cp = facts.number("model.hidden_size"), facts.get("parallel.context_parallel_size")
        for key, length in facts.seq_lengths():
            if length // cp * hidden % tp:
                yield (
                    f"{facts.at(_DISTRIBUTE)}: the {length // cp} x {hidden} numbers of an input ({key}, "
                    f"model.hidden_size) are not a multiple of {facts.at(_TP)}; set it to false"
                )


def activations_can_be_offloaded(facts: Facts) -> Problems:
    """Transformer Engine's offloading: CUDA, one pipeline stage, no recomputation, fewer than all layers."""
    count = facts.get(_OFFLOAD_LAYERS)
    if not facts.get(_OFFLOAD):
        if count is not None:
            yield f"{facts.at(_OFFLOAD_LAYERS)} needs {_OFFLOAD}: true"
        return
    if facts.platform == "cpu":
        yield f"{facts.at(_OFFLOAD)}: on the CPU platform activations are in host memory already; set it to false"
    if facts.get(_PP) > 1:
        yield f"{facts.at(_OFFLOAD)} needs {_PP} 1; found {facts.at(_PP)}"
    if facts.get(_GRANULARITY) is not None:
        yield f"{facts.at(_OFFLOAD)} does not go with {facts.at(_GRANULARITY)}; set one of them to its default"
    layers = facts.number("model.num_layers")
    if layers == 1:
        yield f"{facts.at(_OFFLOAD)}: the last layer stays on the device, and {facts.at('model.num_layers')}"
    elif count is not None and not 1 <= count < layers:
        yield (
            f"{facts.at(_OFFLOAD_LAYERS)} must be at least 1 and below {facts.at('model.num_layers')}; "
            f"nearest legal: {nearest(count, range(1, layers))}"
        )


def tensor_parallel_communication_can_overlap(facts: Facts) -> Problems:
    """Transformer Engine's user buffers: CUDA, TP with SP, and one shape of the activations in the whole run."""
    if not facts.get(_TP_OVERLAP):
        return
    if facts.platform == "cpu":
        yield f"{facts.at(_TP_OVERLAP)} is Transformer Engine's on CUDA; on the CPU platform set it to false"
    if facts.get(_TP) == 1:
        yield f"{facts.at(_TP_OVERLAP)} needs {_TP} > 1; it is 1: set it to false"
    elif not facts.get(_SP):
        yield f"{facts.at(_TP_OVERLAP)} needs {_SP}: true"
    lengths = dict(facts.seq_lengths())
    if len(set(lengths.values())) > 1:
        text = ", ".join(f"{key} = {value}" for key, value in lengths.items())
        yield f"{facts.at(_TP_OVERLAP)} needs one sequence length in the run, found {text}"
    usual = facts.get("train.micro_batch_size")
    for n, stage in enumerate(facts.config.data.stages):
        if stage.micro_batch_size not in (None, usual):
            yield (
                f"{facts.at(_TP_OVERLAP)} needs one micro batch in the run, found "
                f"{facts.named(f'data.stages.{n}.micro_batch_size', stage.micro_batch_size)} and "
                f"{facts.at('train.micro_batch_size')}"
            )


def buckets_need_overlap(facts: Facts) -> Problems:
    """The engine puts all gradients into one bucket unless their reduction is overlapped."""
    key, overlap = "parallel.ddp_bucket_size", "parallel.overlap_grad_reduce"
    size = facts.get(key)
    if size is None:
        return
    if size < 1:
        yield f"{facts.at(key)} must be at least 1, or null for the engine's choice"
    if not facts.get(overlap):
        yield f"{facts.at(key)} needs {overlap}: true; without it there is one bucket: set it to null"


def optimizer_formats_fit(facts: Facts) -> Problems:
    """Formats belong to the precision-aware optimizer, and that to bf16 weights and sharded state."""
    if not facts.get(_AWARE):
        for key in _FORMATS:
            if facts.get(key) != "fp32":
                yield f"{facts.at(key)} needs {_AWARE}: true"
        return
    if not facts.get("parallel.use_distributed_optimizer"):
        yield f"{facts.at(_AWARE)} needs parallel.use_distributed_optimizer: true"
    if facts.get("precision.params_dtype") != "bf16":
        yield (
            f"{facts.at(_AWARE)} needs precision.params_dtype: bf16; of fp32 weights Transformer Engine keeps a "
            f"copy that it never updates, and checkpoints would hold that"
        )
    accumulate = "precision.accumulate_allreduce_grads_in_fp32"
    grads = "fp32" if facts.get(accumulate) else "bf16"
    if facts.get(_FORMATS[0]) != grads:
        yield (
            f"{facts.at(_FORMATS[0])} but gradients are {grads} by {facts.at(accumulate)}: the optimizer reads "
            f"them where they are reduced; set {_FORMATS[0]}: {grads} or turn the other round"
        )


def moments_survive(facts: Facts) -> Problems:
    """What the engine accepts and what loses the moments."""
    if not facts.get(_AWARE):
        return
    first, second = _MOMENTS
    if facts.get(second) == "fp8":
        yield (
            f"{facts.at(second)}: with one scale per tensor FP8 turns second moments below 2**-19 of the largest "
            f"into 0, and their weights then step without measure (a loss of 7.8 was 42 after 20 steps); "
            f"nearest legal: fp16 or bf16"
        )
    recipe = facts.get("precision.fp8")
    in_fp8 = recipe in ("tensorwise", "blockwise") and facts.get("precision.fp8_param_gather")
    if in_fp8 and facts.get(_FORMATS[1]) == "fp32":
        for key in (first, second):
            if facts.get(key) in ("fp16", "fp8"):
                yield (
                    f"{facts.at(key)} with {facts.at('precision.fp8')}, weights in FP8 and {_FORMATS[1]} fp32: "
                    "the engine's checkpoints would leave out the scale of the moments; use bf16, or "
                    f"{_FORMATS[1]}: fp16"
                )


def optimizer_can_be_offloaded(facts: Facts) -> Problems:
    """The engine's HybridDeviceOptimizer: CUDA, by way of the precision-aware optimizer, its own formats."""
    fraction, overlap = "optimizer.optimizer_offload_fraction", "optimizer.overlap_cpu_optimizer_d2h_h2d"
    if not facts.get(_OPTIMIZER_OFFLOAD):
        if facts.get(fraction) != 1.0:
            yield f"{facts.at(fraction)} needs {_OPTIMIZER_OFFLOAD}: true"
        if facts.get(overlap):
            yield f"{facts.at(overlap)} needs {_OPTIMIZER_OFFLOAD}: true"
        return
    if facts.platform == "cpu":
        yield (
            f"{facts.at(_OPTIMIZER_OFFLOAD)}: on the CPU platform the optimizer is in host memory already; "
            f"set it to false"
        )
    if not 0 < facts.get(fraction) <= 1:
        yield f"{facts.at(fraction)} must be above 0 and at most 1"
    if not facts.get(_AWARE):
        yield f"{facts.at(_OPTIMIZER_OFFLOAD)} needs {_AWARE}: true, whose way through the engine it takes"
    for key in _FORMATS[1:]:
        if facts.get(key) != "fp32":
            yield f"{facts.at(key)} with {_OPTIMIZER_OFFLOAD}: the state on the host is fp32; set it to fp32"
    if facts.get("precision.fp8_param_gather") and facts.get("precision.fp8") != "delayed":
        yield (
            f"{facts.at(_OPTIMIZER_OFFLOAD)} with precision.fp8_param_gather needs precision.fp8: delayed, "
            f"found {facts.at('precision.fp8')}"
        )


MEMORY_RULES: tuple[Callable[[Facts], Problems], ...] = (
    recompute_options_belong_together,
    recompute_modules_exist,
    recompute_layers_fit_chunks,
    saved_activations_can_be_distributed,
    activations_can_be_offloaded,
    tensor_parallel_communication_can_overlap,
    buckets_need_overlap,
    optimizer_formats_fit,
    moments_survive,
    optimizer_can_be_offloaded,
)
