"""What ``--dry-run`` prints: everything that is known of a run before a process is started. No torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megatron_syne.config.arithmetic import (
    batch_arithmetic,
    learning_rate,
    resolved_deallocate_pipeline_outputs,
    resolved_overlap_p2p_comm,
    schedule_samples,
)
from megatron_syne.config.loader import to_yaml
from megatron_syne.config.schema import ModelConfig, ParallelConfig, RunConfig
from megatron_syne.data.mixture import MixturePlan, plan_mixture, plan_table
from megatron_syne.errors import SyneError
from megatron_syne.models.config import padded_vocab_size
from megatron_syne.models.json_file import read_json
from megatron_syne.parallel.topology import coordinates, data_parallel_size, rank_grid, world_size_of
from megatron_syne.preflight.facts import PlatformName
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
        ("batch", _batch(config, world_size)),
        ("tokens", _tokens(config, plan)),
        ("learning rate", _learning_rate(config, plan.train_iters)),
    ]
    found = notes(config, plan)
    if found:
        sections.append(("notes", "\n".join(f"- {note}" for note in found)))
    return "\n\n".join(f"== {title} ==\n{body}" for title, body in sections) + "\n"


def notes(config: RunConfig, plan: MixturePlan) -> list[str]:
    """Settings that are allowed but do nothing in this run."""
    data, schedule, train = config.data, config.schedule, config.train
    found = []
    if data.mock:
        given = [name for name in ("sources", "stages") if getattr(data, name)]
        found += [f"data.{name} is not used: data.mock is on" for name in given]
    else:
        unused = [
            name
            for name in plan.sources
            if not any(stage.shares[plan.sources.index(name)] for stage in plan.stages)
        ]
        found += [f"data.sources.{name} is not used: it stands in no mixture" for name in unused]
    if data.validation and train.eval_interval is None:
        found.append("data.validation is not used: train.eval_interval is not given")
    if schedule.lr_wsd_decay_iters and schedule.lr_decay_style != "WSD":
        found.append(
            f"schedule.lr_wsd_decay_iters is not used: lr_decay_style is {schedule.lr_decay_style}, not WSD"
        )
    if config.checkpoint.save_interval is None:
        found.append("checkpoint.save_interval is not given: one checkpoint is written, at the end")
    return found


def source_token_counts(config: RunConfig) -> tuple[dict[str, int], list[str]]:
    """Tokens of each training source by its manifest ``<prefix>.json``, and a remark for each without one."""
    counts: dict[str, int] = {}
    remarks = []
    for name, source in config.data.sources.items():
        manifest = Path(source.path + ".json")
        if not manifest.exists():
            remarks.append(f"{name}: no manifest {manifest}; run tools/prepare_data.py for this source")
            continue
        try:
            tokens = read_json(manifest).get("counts", {}).get("tokens")
        except (SyneError, OSError, AttributeError) as error:
            remarks.append(f"{name}: {error}")
            continue
        if isinstance(tokens, int) and not isinstance(tokens, bool):
            counts[name] = tokens
        else:
            remarks.append(f"{name}: {manifest} has no counts.tokens")
    return counts, remarks


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


def _batch(config: RunConfig, world_size: int) -> str:
    batch = batch_arithmetic(config, data_parallel_size(config.parallel, world_size))
    return (
        f"global batch {batch.global_batch_size} samples = micro batch {batch.micro_batch_size} x DP "
        f"{batch.data_parallel_size} x {batch.num_microbatches} micro-batches\n"
        f"tokens per step: {batch.global_batch_size} x {batch.seq_length} = {batch.tokens_per_step:,}"
    )


def _tokens(config: RunConfig, plan: MixturePlan) -> str:
    if config.data.mock:
        return plan_table(plan)
    counts, remarks = source_token_counts(config)
    return "\n".join([plan_table(plan, counts), *remarks])


def _learning_rate(config: RunConfig, iters: int) -> str:
    samples, batch = schedule_samples(config, iters), config.train.global_batch_size
    last = (iters - 1) * batch  # the last step is taken at the rate of the samples before it
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
