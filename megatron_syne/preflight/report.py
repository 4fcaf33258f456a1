"""What ``--dry-run`` prints: everything that is known of a run before a process is started. No torch."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from pathlib import Path

from megatron_syne.config.arithmetic import (
    resolved_deallocate_pipeline_outputs,
    resolved_overlap_p2p_comm,
)
from megatron_syne.config.learning_rate import schedules
from megatron_syne.config.loader import to_yaml
from megatron_syne.config.schema import ModelConfig, ParallelConfig, RunConfig
from megatron_syne.data.mixture.plan import MixturePlan
from megatron_syne.data.mixture.planning import plan_mixture
from megatron_syne.data.mixture.report import plan_table
from megatron_syne.fp8.choice import describe_fp8
from megatron_syne.models.config import padded_vocab_size
from megatron_syne.parallel.topology import coordinates, data_parallel_size, rank_grid, world_size_of
from megatron_syne.preflight.facts import PlatformName
from megatron_syne.preflight.harness_rules import harness_notes
from megatron_syne.preflight.manifests import source_token_counts
from megatron_syne.preflight.size import model_parameters, stage_parameters
from megatron_syne.preflight.stage_report import learning_rate_section, stage_table

FULL_GRID_RANKS = 64


def dry_run_report(
    config: RunConfig,
    model: ModelConfig,
    platform: PlatformName,
    world_size: int | None = None,
) -> str:
    """The whole report; the configuration must have passed ``rules.check`` with the same arguments.

    ``model`` is the resolved one; ``world_size`` None = TP x PP x CP x DP with DP as given, or 1.
    """
    world_size = world_size_of(config.parallel) if world_size is None else world_size
    plan = plan_mixture(config)
    sections = [
        ("resolved configuration", to_yaml(dataclasses.replace(config, model=model)).rstrip()),
        ("choices", _choices(config, platform)),
        ("model", _model(model, config.parallel)),
        ("rank grid", _grid(config.parallel, model, world_size)),
        ("batch", _batch(config, world_size, plan)),
        ("tokens", _tokens(config, plan)),
        *([] if config.data.mock else [("stages", stage_table(config, model, plan))]),
        ("learning rate", learning_rate_section(config, plan)),
    ]
    found = notes(config, plan)
    if found:
        sections.append(("notes", "\n".join(f"- {note}" for note in found)))
    return "\n\n".join(f"== {title} ==\n{body}" for title, body in sections) + "\n"


def notes(config: RunConfig, plan: MixturePlan) -> list[str]:
    """Settings that are allowed but do nothing in this run, and what else is good to know."""
    data, schedule, train = config.data, config.schedule, config.train
    found = []
    if data.mock:
        given = [name for name in ("sources", "stages") if getattr(data, name)]
        found += [f"data.{name} is not used: data.mock is on" for name in given]
    else:
        read = {name for stage in plan.asked for name, _ in stage.shares}
        unused = [name for name in plan.sources if name not in read]
        found += [f"data.sources.{name} is not used: it stands in no mixture" for name in unused]
    if data.validation and train.eval_interval is None:
        found.append("data.validation is not used: train.eval_interval is not given")
    for name in ("lr_wsd_decay_iters", "lr_wsd_decay_tokens"):
        styles = {each.rates.lr_decay_style for each in schedules(config, plan)}
        if getattr(schedule, name) and "WSD" not in styles:
            found.append(f"schedule.{name} is not used: lr_decay_style is {' and '.join(styles)}, not WSD")
    if data.stages and data.stages[0].reset_optimizer and config.checkpoint.branch_from is None:
        found.append("data.stages.0.reset_optimizer is not used: a run begins with new moments")
    if data.mock and data.reweighting:
        found.append("data.reweighting is not used: data.mock is on")
    if data.loader == "dali" and (find_spec("nvidia") is None or find_spec("nvidia.dali") is None):
        found.append("data.loader is dali: NVIDIA DALI is not installed here; the nodes of the run need it")
    if any(Path(config.run_dir, "checkpoints").glob("*")):
        found.append(
            f"the run in {config.run_dir} has begun: it goes on from its checkpoint with the rest of each budget; "
            f"what is shown here is a run from the start"
        )
    if config.checkpoint.save_interval is None:
        found.append("checkpoint.save_interval is not given: one checkpoint is written, at the end")
    return found + harness_notes(config)


def _choices(config: RunConfig, platform: PlatformName) -> str:
    parallel = config.parallel

    def line(name: str, value: bool) -> str:
        chosen = "given" if getattr(parallel, name) is not None else "chosen"
        return f"parallel.{name}: {str(value).lower()} ({chosen})"

    return "\n".join(
        [
            f"platform: {platform}{describe_fp8(config.precision, platform)}",
            line("overlap_p2p_comm", resolved_overlap_p2p_comm(parallel)),
            line("deallocate_pipeline_outputs", resolved_deallocate_pipeline_outputs(parallel, platform)),
        ]
    )


def _model(model: ModelConfig, parallel: ParallelConfig) -> str:
    tp, stages = parallel.tensor_model_parallel_size, stage_parameters(model, parallel)
    padded, size = padded_vocab_size(model, tp), model.vocab_size
    lines = [
        f"parameters: {model_parameters(model):,}",
        f"embedding rows: {size:,}" + (f", padded to {padded:,}" if padded != size else ""),
    ]
    lines += [f"parameters on each rank of stage {n}: {count:,}" for n, count in enumerate(stages)]
    return "\n".join(lines)


def _grid(parallel: ParallelConfig, model: ModelConfig, world_size: int) -> str:
    assert model.num_layers
    lines = rank_grid(parallel, model.num_layers, world_size).splitlines()
    if world_size <= FULL_GRID_RANKS:
        return "\n".join(lines)
    first = [n for n in range(world_size) if coordinates(n, parallel, world_size).dp == 0]
    dp = data_parallel_size(parallel, world_size)
    rest = f"(of {world_size} ranks only the first of {dp} replicas is shown)"
    return "\n".join([lines[0], *(lines[n + 1] for n in first), rest])


def _batch(config: RunConfig, world_size: int, plan: MixturePlan) -> str:
    """Each batch that the run goes through: how it is put together, and its tokens."""
    dp = data_parallel_size(config.parallel, world_size)
    batches = dict.fromkeys((each.global_batch_size, each.micro_batch_size) for each in plan.segments)
    sizes = dict.fromkeys((each.global_batch_size, each.seq_length) for each in plan.segments)
    return "\n".join(
        [
            *(
                f"global batch {batch} samples = micro batch {micro} x DP {dp} x {batch // (micro * dp)} micro-batches"
                for batch, micro in batches
            ),
            *(f"tokens per step: {batch} x {length} = {batch * length:,}" for batch, length in sizes),
        ]
    )


def _tokens(config: RunConfig, plan: MixturePlan) -> str:
    if config.data.mock:
        return plan_table(plan)
    counts, remarks = source_token_counts(config)
    return "\n".join([plan_table(plan, counts), *remarks])
