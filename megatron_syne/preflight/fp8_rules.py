"""The rules of FP8 recipes, their dimensions, the guard."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_syne.preflight.facts import Facts, nearest_multiples

Problems = Iterator[str]


def fp8_can_run(facts: Facts) -> Problems:
    """FP8 is Transformer Engine's: CUDA, bf16 around it."""
    precision = facts.config.precision
    if precision.fp8 is None:
        for name in ("first_last_layers_bf16", "fp8_param_gather"):
            if facts.get(f"precision.{name}"):
                yield f"{facts.at(f'precision.{name}')} needs precision.fp8; set it to false"
        return
    if precision.params_dtype == "fp32":
        yield f"{facts.at('precision.fp8')} with {facts.at('precision.params_dtype')}: FP8 needs bf16"
    if precision.first_last_layers_bf16 and precision.fp8 == "delayed":
        yield (
            f"{facts.at('precision.first_last_layers_bf16')} with {facts.at('precision.fp8')}: megatron-core does "
            f"not support it with delayed scaling; use tensorwise or blockwise"
        )


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
        *(
            ("seq_length x micro_batch_size", tp * length * facts.number("train.micro_batch_size"))
            for length in dict.fromkeys(length for _, length in facts.seq_lengths())
        ),
    ):
        if width % (16 * tp) and width % tp == 0:
            yield (
                f"{facts.at('precision.fp8')}: {what} = {width // tp} must be a multiple of 16; "
                f"nearest legal: {nearest_multiples(width // tp, 16)}"
            )


FP8_RULES: tuple[Callable[[Facts], Problems], ...] = (fp8_can_run, fp8_dimensions_fit)
