"""The configuration of a run as others are shown it: a page, and hyper-parameters. Without the launch section,
whose environment may hold keys that are nobody else's business."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from megatron_syne.config.loader import to_yaml
from megatron_syne.config.schema import LaunchConfig, ModelConfig, RunConfig
from megatron_syne.parallel.topology import rank_grid

Plain = str | int | float | bool


def page(config: RunConfig, model: ModelConfig, machine: str, world_size: int) -> str:
    """Markdown: the machine, the rank grid, the whole configuration."""
    grid = rank_grid(config.parallel, model.num_layers or 0, world_size)
    shown = to_yaml(_public(config, model))
    return f"{machine}\n\n## Ranks\n\n```text\n{grid}\n```\n\n## Configuration\n\n```yaml\n{shown.rstrip()}\n```\n"


def hyper_parameters(config: RunConfig, model: ModelConfig, world_size: int) -> dict[str, Plain]:
    """Every option by its dotted name, lists and mappings of free keys as text; what is not given is left out."""
    values = asdict(_public(config, model))
    del values["launch"]
    return {**dict(_flat(values, "")), "world_size": world_size}


def _public(config: RunConfig, model: ModelConfig) -> RunConfig:
    return replace(config, model=model, launch=LaunchConfig())


def _flat(values: Mapping[str, Any], lead: str) -> Iterator[tuple[str, Plain]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{lead}{name}.")
        elif isinstance(value, bool | int | float | str):
            yield lead + name, value
        elif value is not None and value != []:
            yield lead + name, str(value)
