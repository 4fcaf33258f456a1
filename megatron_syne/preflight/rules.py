"""The rules that a configuration must meet before a process is started: one small function each.

A rule yields the problems that it sees; each names the values with file and line, the rule, and the nearest
legal values. All rules are run and all problems reported in one :class:`ConfigError`. The traps are those
found by running megatron-core 0.16.1 on gloo: layouts that it accepts and that train wrongly without a word.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

from megatron_syne.config.arithmetic import resolved_overlap_p2p_comm
from megatron_syne.config.schema import ModelConfig, RunConfig
from megatron_syne.config.tree import one_error
from megatron_syne.errors import ConfigError
from megatron_syne.parallel.topology import chunk_layers, data_parallel_size
from megatron_syne.preflight.context_rules import CONTEXT_RULES
from megatron_syne.preflight.data_rules import DATA_RULES
from megatron_syne.preflight.determinism_rules import DETERMINISM_RULES
from megatron_syne.preflight.facts import Facts, PlatformName, nearest, nearest_multiples
from megatron_syne.preflight.fp8_rules import FP8_RULES
from megatron_syne.preflight.harness_rules import HARNESS_RULES
from megatron_syne.preflight.memory_rules import MEMORY_RULES
from megatron_syne.preflight.monitor_rules import MONITOR_RULES
from megatron_syne.preflight.stage_rules import STAGE_RULES
from megatron_syne.preflight.trainable_rules import TRAINABLE_RULES

Problems = Iterator[str]
Rule = Callable[[Facts], Problems]

_PARALLEL = "parallel."
_TP = "parallel.tensor_model_parallel_size"
_PP = "parallel.pipeline_model_parallel_size"
_VPP = "parallel.virtual_pipeline_model_parallel_size"


def check(config: RunConfig, model: ModelConfig, world_size: int | None, platform: PlatformName) -> None:
    """Raise one ConfigError with every rule that the run breaks.

    ``model`` is the resolved model; ``world_size`` None = not known yet (then DP as given, or 1).
    """
    facts = Facts(config, model, world_size, platform)
    # The other rules divide by these sizes.
    problems = list(sizes_are_positive(facts)) or [text for rule in RULES for text in rule(facts)]
    if problems:
        raise one_error(problems, "this run cannot start")


def sizes_are_positive(facts: Facts) -> Problems:
    """Counts and sizes are at least 1, rates at least 0."""
    for least, keys in ((1, AT_LEAST_ONE), (0, AT_LEAST_ZERO)):
        for key in keys:
            value = facts.get(key)
            if value is not None and value < least:
                yield f"{facts.at(key)} must be at least {least}"
    for key in ("optimizer.lr", "optimizer.adam_eps"):
        if facts.get(key) <= 0:
            yield f"{facts.at(key)} must be greater than 0"
    for key in ("optimizer.adam_beta1", "optimizer.adam_beta2"):
        if not 0 <= facts.get(key) < 1:
            yield f"{facts.at(key)} must be at least 0 and below 1"
    for n, stage in enumerate(facts.config.data.stages):
        for name in ("tokens", "seq_length"):
            value = getattr(stage, name)
            if value is not None and value < 1:
                yield f"data.stages.{n}.{name} = {value} (stage {stage.name!r}) must be at least 1"


def world_size_fits(facts: Facts) -> Problems:
    """World size = TP x PP x CP x DP."""
    if facts.world_size is not None:
        world_size = facts.world_size
        keys = (_TP, _PP, "parallel.context_parallel_size", "parallel.data_parallel_size")
        for text in _of(lambda: data_parallel_size(facts.config.parallel, world_size)):
            yield f"{text} ({', '.join(facts.at(key) for key in keys)})"


def tensor_parallel_divides(facts: Facts) -> Problems:
    """TP divides query heads, KV heads and the feed-forward width; beyond the KV heads it is a multiple of
    them, and the fused rows of query, key and value are cut evenly."""
    tp = facts.config.parallel.tensor_model_parallel_size
    heads, groups, width = (
        "model.num_attention_heads",
        "model.num_query_groups",
        "model.ffn_hidden_size",
    )
    count = facts.number(groups)
    rows = (facts.number(heads) + 2 * count) * facts.number("model.kv_channels")

    def broken(size: int) -> list[str]:
        keys = [key for key in (heads, width) if facts.number(key) % size]
        if count % size and (size % count or rows % size):
            keys.append(groups)
        return keys

    legal = [size for size in range(1, facts.number(heads) + 1) if not broken(size)]
    for key in broken(tp):
        why = f"does not divide {facts.at(key)}"
        if key == groups and tp > count:
            why += (
                " and is no multiple of it"
                if tp % count
                else f", nor the {rows} rows of query, key and value"
            )
        yield f"{facts.at(_TP)} {why}; nearest legal: {nearest(tp, legal)}"


def sequence_parallel_needs_tensor_parallel(facts: Facts) -> Problems:
    """SP cuts the sequence over TP ranks: it needs TP > 1 (and a length that TP divides: ``sequences_fit``)."""
    if facts.config.parallel.sequence_parallel and facts.config.parallel.tensor_model_parallel_size == 1:
        yield f"{facts.at('parallel.sequence_parallel')} needs {_TP} > 1; it is 1: set sequence_parallel: false"


def layers_fit_stages(facts: Facts) -> Problems:
    """Layers can be laid out over stages and chunks, at least one to each unless a layout is given."""
    for text in _of(lambda: chunk_layers(facts.config.parallel, facts.number("model.num_layers"))):
        yield f"{text} ({facts.at('model.num_layers')}, {facts.at(_PP)}, {facts.at(_VPP)})"


def virtual_pipeline_needs_pipeline(facts: Facts) -> Problems:
    """Interleaving needs PP > 1 and at least 2 chunks."""
    if facts.vpp is None:
        return
    if facts.vpp == 1:
        yield f"{facts.at(_VPP)}: 1 chunk per stage is no interleaving; set it to null"
    elif facts.config.parallel.pipeline_model_parallel_size == 1:
        yield f"{facts.at(_VPP)} needs {_PP} > 1; it is 1: set virtual_pipeline_model_parallel_size: null"


def batch_divides(facts: Facts) -> Problems:
    """Global batch = micro batch x DP x micro-batches; with VPP their number is a multiple of PP."""
    parallel, train = facts.config.parallel, facts.config.train
    unit, rule = (
        train.micro_batch_size * facts.dp,
        f"micro_batch_size {train.micro_batch_size} x DP {facts.dp}",
    )
    if facts.vpp is not None and parallel.pipeline_model_parallel_size > 1:
        unit *= parallel.pipeline_model_parallel_size
        rule += f" x PP {parallel.pipeline_model_parallel_size} (the interleaved schedule of VPP)"
    if train.global_batch_size % unit:
        yield (
            f"{facts.at('train.global_batch_size')} is not a multiple of {rule} = {unit}; "
            f"nearest legal: {nearest_multiples(train.global_batch_size, unit)}"
        )


def outputs_outlive_gloo_sends(facts: Facts) -> Problems:
    """Trap 1: with VPP on gloo an output freed after its send was started is sent as garbage."""
    if facts.platform == "cpu" and facts.vpp and facts.config.parallel.deallocate_pipeline_outputs:
        yield (
            f"{facts.at('parallel.deallocate_pipeline_outputs')} with VPP on the CPU platform: the output would "
            f"be freed while gloo still sends it and the losses would be silently wrong; "
            f"set it to false or null"
        )


def interleaved_messages_keep_order(facts: Facts) -> Problems:
    """Trap 2: at PP 2 with VPP two messages between the same two ranks in one batch swap."""
    parallel = facts.config.parallel
    if facts.vpp and parallel.pipeline_model_parallel_size == 2 and not resolved_overlap_p2p_comm(parallel):
        yield (
            f"{facts.at('parallel.overlap_p2p_comm')} with PP 2 and VPP: the messages of the two chunks would be "
            f"swapped and the losses silently wrong; set it to true or null, or use PP > 2"
        )


def overlap_needs_interleaving(facts: Facts) -> Problems:
    """megatron-core's 1F1B schedule refuses overlapped sends."""
    if facts.vpp is None and facts.config.parallel.overlap_p2p_comm:
        yield (
            f"{facts.at('parallel.overlap_p2p_comm')} needs {_VPP}: the schedule without interleaving does not "
            f"support it; set it to false or null"
        )


def param_gather_overlap_fits(facts: Facts) -> Problems:
    """Overlapped parameter gathering is part of the sharded optimizer and of overlapped reduction."""
    if not facts.config.parallel.overlap_param_gather:
        return
    for name in ("use_distributed_optimizer", "overlap_grad_reduce"):
        if not facts.get(_PARALLEL + name):
            yield f"{facts.at('parallel.overlap_param_gather')} needs parallel.{name}: true"


def signals_exist(facts: Facts) -> Problems:
    """Exit signals are names of signals that a process can catch."""
    names = [each.name for each in signal.Signals if each.name not in ("SIGKILL", "SIGSTOP")]
    for n, name in enumerate(facts.config.resilience.exit_signals):
        if name not in names:
            yield (
                f"resilience.exit_signals.{n} = {name!r}: not the name of a signal that can be caught; "
                f"usual ones: SIGTERM, SIGINT, SIGUSR1, SIGUSR2"
            )


def start_is_outside_run(facts: Facts) -> Problems:
    """The weights to start from and the run folder do not contain each other."""
    start, run = facts.config.checkpoint.initialize_from, facts.config.run_dir
    if start is None:
        return
    a, b = os.path.realpath(start), os.path.realpath(run)
    if os.path.commonpath([a, b]) in (a, b):
        yield (
            f"{facts.at('run_dir')} and {facts.at('checkpoint.initialize_from')} lie inside each other; a run "
            f"resumes from its own folder by itself: set initialize_from to null or choose another run_dir"
        )


RULES: tuple[Rule, ...] = (
    world_size_fits,
    tensor_parallel_divides,
    sequence_parallel_needs_tensor_parallel,
    layers_fit_stages,
    virtual_pipeline_needs_pipeline,
    batch_divides,
    outputs_outlive_gloo_sends,
    interleaved_messages_keep_order,
    overlap_needs_interleaving,
    param_gather_overlap_fits,
    signals_exist,
    start_is_outside_run,
    *CONTEXT_RULES,
    *MEMORY_RULES,
    *FP8_RULES,
    *STAGE_RULES,
    *TRAINABLE_RULES,
    *HARNESS_RULES,
    *MONITOR_RULES,
    *DATA_RULES,
    *DETERMINISM_RULES,
)

AT_LEAST_ONE = (
    *(f"model.{name}" for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")),
    *(
        f"model.{name}"
        for name in ("num_query_groups", "kv_channels", "vocab_size", "make_vocab_size_divisible_by")
    ),
    "model.window_size",
    *(_TP, _PP, _VPP, "parallel.context_parallel_size", "parallel.data_parallel_size"),
    *(f"parallel.num_layers_in_{end}_pipeline_stage" for end in ("first", "last")),
    "data.seq_length",
    "memory.loss_chunk_tokens",
    *("schedule.lr_warmup_tokens", "schedule.lr_decay_iters"),
    *(f"train.{name}" for name in ("micro_batch_size", "global_batch_size", "train_iters", "exit_interval")),
    *(f"train.{name}" for name in ("eval_interval", "eval_iters")),
    *("checkpoint.save_interval", "monitor.log_interval", "resilience.distributed_timeout_seconds"),
)
AT_LEAST_ZERO = (
    *("optimizer.min_lr", "optimizer.weight_decay", "optimizer.clip_grad"),
    *("schedule.lr_warmup_init", "schedule.lr_warmup_iters", "schedule.lr_wsd_decay_iters"),
    *("train.seed", "checkpoint.keep_latest"),
)


def _of(action: Callable[[], object]) -> Problems:
    try:
        action()
    except ConfigError as error:
        yield str(error)
