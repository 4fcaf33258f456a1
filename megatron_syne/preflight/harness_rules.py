"""The rules of evaluation by lm-evaluation-harness.

Whether it is installed is asked where the run starts (``evaluation.tasks.require_harness``), and only noted by
``--dry-run``: a login node need not have it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from megatron_syne.config.schema import HarnessConfig, RunConfig
from megatron_syne.evaluation.tasks import HOW_TO_INSTALL, is_installed, is_task_file, task_file
from megatron_syne.preflight.facts import Facts, nearest_multiples

Problems = Iterator[str]
_DEVICE = re.compile(r"cpu|cuda(:\d+)?")


def harness_tasks_exist(facts: Facts) -> Problems:
    """Task files and the folder of further ones are there; no task is named twice."""
    harness = facts.config.harness
    if harness.include_path is not None and not Path(harness.include_path).is_dir():
        yield f"{facts.at('harness.include_path')}: no such folder"
    for n, task in enumerate(harness.tasks):
        where = facts.named(f"harness.tasks.{n}", task)
        if not task.strip() or "," in task:
            yield f"{where} must be one task's name or file; give several as a list"
        elif is_task_file(task) and not task_file(task, harness.include_path).is_file():
            yield f"{where}: no such file, neither in harness.include_path nor from the current folder"
        elif task in harness.tasks[:n]:
            yield f"{where} is named twice; leave one out"


def harness_interval_meets_checkpoints(facts: Facts) -> Problems:
    """What is evaluated is a checkpoint: the interval is a multiple of ``checkpoint.save_interval``."""
    interval, save = facts.config.harness.interval, facts.config.checkpoint.save_interval
    if interval is None or interval < 1:
        return
    if save is None:
        yield (
            f"{facts.at('harness.interval')} needs checkpoint.save_interval, which is not given: give it, or leave "
            "the interval out (the last checkpoint alone is evaluated)"
        )
    elif save > 0 and interval % save:
        yield (
            f"{facts.at('harness.interval')} is not a multiple of {facts.at('checkpoint.save_interval')}; "
            f"nearest legal: {nearest_multiples(interval, save)}"
        )


def harness_numbers(facts: Facts) -> Problems:
    """Counts are at least 1 (examples in the context: 0), and the device is one that torch has."""
    least = {"interval": 1, "limit": 1, "batch_size": 1, "timeout_seconds": 1, "num_fewshot": 0}
    for name, lowest in least.items():
        value = getattr(facts.config.harness, name)
        if value is not None and value < lowest:
            yield f"{facts.at(f'harness.{name}')} must be at least {lowest}"
    if not _DEVICE.fullmatch(facts.config.harness.device):
        yield f"{facts.at('harness.device')} must be cpu, cuda or cuda:<n>"


def harness_notes(config: RunConfig) -> list[str]:
    """What is good to know before the run, for ``--dry-run``."""
    harness = config.harness
    if not harness.tasks:
        given = [name for name, value in asdict(harness).items() if value != getattr(HarnessConfig(), name)]
        return [f"harness.{name} is not used: harness.tasks is not given" for name in given]
    found = []
    if not is_installed():
        found.append(
            f"harness.tasks: lm-evaluation-harness is not installed here; the nodes of the run need it "
            f"({HOW_TO_INSTALL})"
        )
    if config.checkpoint.save_interval is None:
        found.append(
            "harness.tasks: checkpoint.save_interval is not given, so the last checkpoint alone is evaluated"
        )
    if harness.device.startswith("cuda"):
        found.append(
            f"harness.device is {harness.device}: it takes memory of a GPU that trains on rank 0's machine"
        )
    return found


HARNESS_RULES: tuple[Callable[[Facts], Problems], ...] = (
    harness_tasks_exist,
    harness_interval_meets_checkpoints,
    harness_numbers,
)
