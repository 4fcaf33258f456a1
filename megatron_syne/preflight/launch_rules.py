"""The rules of ``launch:``, checked before a job is submitted (a run on one machine does not need them)."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_syne.config.loader import config_origin
from megatron_syne.config.schema import RunConfig
from megatron_syne.config.tree import one_error
from megatron_syne.errors import ConfigError
from megatron_syne.parallel.topology import data_parallel_size

_TIME = re.compile(
    r"(?P<minutes>\d+)"
    r"|(?P<m>\d+):(?P<s>\d+)"
    r"|(?P<h>\d+):(?P<hm>\d+):(?P<hs>\d+)"
    r"|(?P<d>\d+)-(?P<dh>\d+)(:(?P<dm>\d+)(:(?P<ds>\d+))?)?"
)
_UNLIMITED = ("infinite", "unlimited", "-1")


def check_launch(config: RunConfig) -> None:
    """Raise one ConfigError with every rule that the Slurm request breaks: tasks = world size, time, GPUs."""
    problems = list(_problems(config))
    if problems:
        raise one_error(problems, "this job cannot be submitted")


def time_limit_seconds(text: str) -> int | None:
    """Seconds of a time limit in Slurm's notation (``90``, ``1:30:00``, ``2-12``, ...); None = unlimited.

    The forms are those of the sbatch manual. Raises ConfigError for any other.
    """
    if text.lower() in _UNLIMITED:
        return None
    match = _TIME.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"launch.time: {text!r} is not a time limit; write minutes, hours:minutes:seconds or "
            f"days-hours:minutes:seconds, for example 24:00:00"
        )
    part = {name: int(value or 0) for name, value in match.groupdict().items()}
    return (
        (part["d"] * 24 + part["h"] + part["dh"]) * 3600
        + (part["minutes"] + part["m"] + part["hm"] + part["dm"]) * 60
        + (part["s"] + part["hs"] + part["ds"])
    )


def _problems(config: RunConfig) -> Iterator[str]:
    launch = config.launch
    for name in ("nodes", "ntasks_per_node", "signal_lead_seconds", "max_no_progress"):
        if getattr(launch, name) < 1:
            yield f"{_at(config, name)} must be at least 1"
    if launch.cpus_per_task is not None and launch.cpus_per_task < 1:
        yield f"{_at(config, 'cpus_per_task')} must be at least 1"
    if launch.gpus_per_node < 0:
        yield f"{_at(config, 'gpus_per_node')} must be at least 0"
    if launch.nodes >= 1 and launch.ntasks_per_node >= 1:
        try:
            data_parallel_size(config.parallel, launch.nodes * launch.ntasks_per_node)
        except ConfigError as error:
            yield f"{_at(config, 'nodes')} x {_at(config, 'ntasks_per_node')}: {error}"
    if launch.gpus_per_node and launch.gpus_per_node != launch.ntasks_per_node:
        yield (
            f"{_at(config, 'gpus_per_node')} is not {_at(config, 'ntasks_per_node')}: one process per GPU; "
            f"make them equal, or gpus_per_node 0 for the CPU platform"
        )
    if config.platform == "cuda" and launch.gpus_per_node == 0:
        yield f"{_at(config, 'gpus_per_node')} with platform = cuda: ask for as many GPUs as tasks per node"
    for name, value in launch.env.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            yield f"launch.env.{name}: not a name of an environment variable"
        if "\n" in value:
            yield f"launch.env.{name}: the value has a line break"
    try:
        limit = time_limit_seconds(launch.time)
    except ConfigError as error:
        yield f"{error} ({config_origin(config, 'launch.time')})"
        return
    if limit is not None and limit <= launch.signal_lead_seconds:
        yield (
            f"{_at(config, 'signal_lead_seconds')} is not below the time limit {_at(config, 'time')} = {limit} s; "
            f"the job would be signalled at once"
        )


def _at(config: RunConfig, name: str) -> str:
    return f"launch.{name} = {getattr(config.launch, name)} ({config_origin(config, f'launch.{name}')})"
