"""What ``--dry-run`` prints: everything that is known of a run before a process is started. No torch."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from pathlib import Path

from megatron_syne.config.arithmetic import (
    batch_arithmetic,
    learning_rate,
    resolved_deallocate_pipeline_outputs,
    resolved_overlap_p2p_comm,
    run_schedule,
)
from megatron_syne.config.loader import to_yaml
from megatron_syne.config.schema import ModelConfig, ParallelConfig, RunConfig
from megatron_syne.data.mixture.plan import MixturePlan
from megatron_syne.data.mixture.planning import plan_mixture
from megatron_syne.data.mixture.report import plan_table
from megatron_syne.models.config import padded_vocab_size
from megatron_syne.parallel.topology import coordinates, data_parallel_size, rank_grid, world_size_of
from megatron_syne.preflight.facts import PlatformName
from megatron_syne.preflight.manifests import source_token_counts
from megatron_syne.preflight.size import model_parameters, stage_parameters

FULL_GRID_RANKS = 64
PLOT_COLUMNS, PLOT_ROWS = 60, 6


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
        ("choices", _choices(config.parallel, platform)),
        ("model", _model(model, config.parallel)),
        ("rank grid", _grid(config.parallel, model, world_size)),
        ("batch", _batch(config, world_size, plan)),
        ("tokens", _tokens(config, plan)),
        ("learning rate", _learning_rate(config, plan)),
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
    if schedule.lr_wsd_decay_iters and schedule.lr_decay_style != "WSD":
        found.append(
            f"schedule.lr_wsd_decay_iters is not used: lr_decay_style is {schedule.lr_decay_style}, not WSD"
        )
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
    return found


def _choices(parallel: ParallelConfig, platform: PlatformName) -> str:
    def line(name: str, value: bool) -> str:
        chosen = "given" if getattr(parallel, name) is not None else "chosen"
        return f"parallel.{name}: {str(value).lower()} ({chosen})"

    return "\n".join(
        [
            f"platform: {platform}",
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
    batch = batch_arithmetic(config, data_parallel_size(config.parallel, world_size))
    lengths = dict.fromkeys(segment.seq_length for segment in plan.segments)
    return "\n".join(
        [
            f"global batch {batch.global_batch_size} samples = micro batch {batch.micro_batch_size} x DP "
            f"{batch.data_parallel_size} x {batch.num_microbatches} micro-batches",
            *(
                f"tokens per step: {batch.global_batch_size} x {length} = {batch.global_batch_size * length:,}"
                for length in lengths
            ),
        ]
    )


def _tokens(config: RunConfig, plan: MixturePlan) -> str:
    if config.data.mock:
        return plan_table(plan)
    counts, remarks = source_token_counts(config)
    return "\n".join([plan_table(plan, counts), *remarks])


def _learning_rate(config: RunConfig, plan: MixturePlan) -> str:
    samples, batch = run_schedule(config, plan), config.train.global_batch_size
    last = (plan.train_iters - 1) * batch  # the last step is taken at the rate of the samples before it
    points = {"first step": 0}
    if samples.warmup:
        points["end of warm-up"] = samples.warmup
    if samples.wsd_decay and config.schedule.lr_decay_style == "WSD":
        points["start of decay"] = samples.decay - samples.wsd_decay
    points["last step"] = last
    lines = [f"style: {config.schedule.lr_decay_style}"]
    for name, at in sorted(points.items(), key=lambda point: point[1]):
        lines.append(f"{name:<15} iteration {at / batch:>10g}   {learning_rate(config, samples, at):.4g}")
    rates = [learning_rate(config, samples, last * n // (PLOT_COLUMNS - 1)) for n in range(PLOT_COLUMNS)]
    return "\n".join([*lines, "", *_plot(rates)])


def _plot(values: list[float]) -> list[str]:
    """A sketch of a curve, highest value at the top, one column per value."""
    top = max(values)
    rows = [round(value / top * (PLOT_ROWS - 1)) if top > 0 else 0 for value in values]
    lines = []
    for level in reversed(range(PLOT_ROWS)):
        mark = f"{top:.2g}" if level == PLOT_ROWS - 1 else "0" if level == 0 else ""
        lines.append(f"{mark:>8} |" + "".join("*" if row == level else " " for row in rows).rstrip())
    return lines
