"""The rules of FP8: recipes, their dimensions, layers in bf16, the guard. The same on a CPU and on CUDA, so that
what a CPU has rehearsed is what a GPU will take."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_syne.fp8.choice import emulates_fp8
from megatron_syne.preflight.facts import Facts, nearest_multiples

Problems = Iterator[str]

_FP8 = "precision.fp8"
_GUARD = "precision.fp8_guard"
_THRESHOLDS = ("max_loss_gap", "max_overflow", "max_underflow")
UNIT = 16
"""Transformer Engine's products take dimensions in multiples of 16 (``autocast``'s note)."""
TILE = 128
"""Tile of blockwise scaling."""


def fp8_options_have_fp8(facts: Facts) -> Problems:
    """Options that mean nothing without FP8 are not given without it."""
    if facts.config.precision.fp8 is not None:
        return
    for name in ("first_last_layers_bf16", "fp8_param_gather", "fp8_emulation"):
        if facts.get(f"precision.{name}"):
            yield f"{facts.at(f'precision.{name}')} needs {_FP8}; set it to false"
    for name in ("interval", *_THRESHOLDS):
        if facts.get(f"{_GUARD}.{name}") is not None:
            yield f"{facts.at(f'{_GUARD}.{name}')} needs {_FP8}; remove it, or name a recipe"


def fp8_can_run(facts: Facts) -> Problems:
    """bf16 round it; emulated on a CPU and only there, unless asked for; FP8 weights where there are any."""
    precision = facts.config.precision
    if precision.fp8 is None:
        return
    if precision.params_dtype == "fp32":
        yield f"{facts.at(_FP8)} with {facts.at('precision.params_dtype')}: FP8 needs bf16; set it to bf16"
    if facts.platform == "cpu" and precision.fp8_emulation is False:
        yield (
            f"{facts.at('precision.fp8_emulation')} with {facts.at(_FP8)} on the CPU platform: FP8 is emulated "
            f"there; remove it, or set platform: cuda"
        )
    if not precision.fp8_param_gather:
        return
    if emulates_fp8(precision, facts.platform):
        yield (
            f"{facts.at('precision.fp8_param_gather')} with {facts.at(_FP8)}, emulated: emulated layers keep bf16 "
            f"weights, rounded to the same values; set it to false"
        )
    if not facts.config.parallel.use_distributed_optimizer:
        yield (
            f"{facts.at('precision.fp8_param_gather')} needs parallel.use_distributed_optimizer: true, which gathers "
            f"them; set it to false"
        )


def fp8_scaling_is_possible(facts: Facts) -> Problems:
    """History and margin of delayed scaling."""
    if facts.config.precision.fp8 is None:
        return
    for name, least in (("fp8_amax_history_len", 1), ("fp8_margin", 0)):
        if facts.get(f"precision.{name}") < least:
            yield f"{facts.at(f'precision.{name}')} must be at least {least}"


def fp8_layers_in_bf16_exist(facts: Facts) -> Problems:
    """First and last layers in bf16: with current or blockwise scaling, and no more than there are."""
    precision = facts.config.precision
    if precision.fp8 is None or not precision.first_last_layers_bf16:
        return
    if precision.fp8 == "delayed":
        yield (
            f"{facts.at('precision.first_last_layers_bf16')} with {facts.at(_FP8)}: megatron-core does "
            f"not support it with delayed scaling; use tensorwise or blockwise"
        )
    layers = facts.number("model.num_layers")
    most = layers // facts.config.parallel.pipeline_model_parallel_size
    names = ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
    for name in names:
        if not 0 <= facts.get(f"precision.{name}") <= most:
            yield (
                f"{facts.at(f'precision.{name}')} must be from 0 to the {most} layers of a pipeline stage, "
                f"{facts.at('model.num_layers')} / PP; nearest legal: "
                f"{min(max(facts.get(f'precision.{name}'), 0), most)}"
            )
    if sum(facts.get(f"precision.{name}") for name in names) >= layers:
        yield (
            f"{' + '.join(facts.at(f'precision.{name}') for name in names)} leave none of "
            f"{facts.at('model.num_layers')} layers in FP8; use fewer, or {_FP8}: null"
        )


def fp8_guard_is_possible(facts: Facts) -> Problems:
    """The guard looks every so many iterations, and its thresholds are shares."""
    guard = facts.config.precision.fp8_guard
    if facts.config.precision.fp8 is None:
        return
    if guard.interval is None:
        for name in _THRESHOLDS:
            if getattr(guard, name) is not None:
                yield f"{facts.at(f'{_GUARD}.{name}')} needs {_GUARD}.interval: nothing is watched without it"
    elif guard.interval < 1:
        yield f"{facts.at(f'{_GUARD}.interval')} must be at least 1; null turns the guard off"
    if guard.max_loss_gap is not None and not guard.max_loss_gap > 0:
        yield f"{facts.at(f'{_GUARD}.max_loss_gap')} must be greater than 0; null sets no limit"
    for name in ("max_overflow", "max_underflow"):
        share = getattr(guard, name)
        if share is not None and not 0 <= share < 1:
            yield f"{facts.at(f'{_GUARD}.{name}')} must be at least 0 and below 1, a share; null sets no limit"


def fp8_dimensions_fit(facts: Facts) -> Problems:
    """The FP8 matrix products want every dimension, as one rank sees it, in multiples of 16."""
    if facts.config.precision.fp8 is None:
        return
    tp = facts.config.parallel.tensor_model_parallel_size
    heads, groups = facts.number("model.num_attention_heads"), facts.number("model.num_query_groups")
    size = facts.number("model.kv_channels")
    for what, width in (
        ("hidden_size", facts.number("model.hidden_size") * tp),
        ("ffn_hidden_size / TP", facts.number("model.ffn_hidden_size")),
        ("num_attention_heads x kv_channels / TP", heads * size),
        ("(num_attention_heads + 2 x num_query_groups) x kv_channels / TP", (heads + 2 * groups) * size),
    ):
        if width % (UNIT * tp) and width % tp == 0:
            yield (
                f"{facts.at(_FP8)}: {what} = {width // tp} must be a multiple of {UNIT}; "
                f"nearest legal: {nearest_multiples(width // tp, UNIT)}"
            )
    cp = facts.config.parallel.context_parallel_size
    divided = " / CP" if cp > 1 else ""
    for length, batch in _lengths_and_batches(facts):
        if length * batch % (UNIT * cp) and length * batch % cp == 0:
            tokens = length * batch // cp
            yield (
                f"{facts.at(_FP8)}: seq_length x micro_batch_size{divided} = {tokens} must be a multiple of "
                f"{UNIT}; nearest legal: {nearest_multiples(tokens, UNIT)}"
            )


def fp8_tiles_are_whole(facts: Facts) -> Problems:
    """Blockwise scaling under sequence parallelism gathers whole tiles of 128 (``assert_dim_for_all_gather``)."""
    parallel = facts.config.parallel
    if facts.config.precision.fp8 != "blockwise" or not parallel.sequence_parallel:
        return
    wanted = f"must be a multiple of {TILE} under {facts.at('parallel.sequence_parallel')}"
    width = facts.number("model.hidden_size")
    if width % TILE:
        yield (
            f"{facts.at(_FP8)}: hidden_size = {width} {wanted}; nearest legal: {nearest_multiples(width, TILE)}; "
            f"or use tensorwise"
        )
    ranks = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    for length, batch in _lengths_and_batches(facts):
        if length * batch % (TILE * ranks):
            yield (
                f"{facts.at(_FP8)}: seq_length x micro_batch_size / (TP x CP) = {length} x {batch} / {ranks} "
                f"{wanted}; nearest legal seq_length x micro_batch_size: "
                f"{nearest_multiples(length * batch, TILE * ranks)}; or use tensorwise"
            )


def _lengths_and_batches(facts: Facts) -> list[tuple[int, int]]:
    """(seq_length, micro_batch_size) of every stage, and of validation."""
    data, train = facts.config.data, facts.config.train
    stages = [] if data.mock else data.stages
    pairs = [(data.seq_length, train.micro_batch_size)]
    pairs += [
        (stage.seq_length or data.seq_length, stage.micro_batch_size or train.micro_batch_size)
        for stage in stages
    ]
    return list(dict.fromkeys(pairs))


FP8_RULES: tuple[Callable[[Facts], Problems], ...] = (
    fp8_options_have_fp8,
    fp8_can_run,
    fp8_scaling_is_possible,
    fp8_layers_in_bf16_exist,
    fp8_guard_is_possible,
    fp8_dimensions_fit,
    fp8_tiles_are_whole,
)
