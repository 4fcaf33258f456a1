"""Which tasks are evaluated, and after which iterations. No torch, and nothing of the harness is imported."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from megatron_syne.config.schema import RunConfig
from megatron_syne.errors import ConfigError

HOW_TO_INSTALL = "pip install -c constraints.txt -e .[eval]"


def is_task_file(task: str) -> bool:
    """Whether a task is given as a YAML file, and not by its name."""
    return task.endswith((".yaml", ".yml"))


def task_file(task: str, include_path: str | None) -> Path:
    """Where a task file lies: in ``include_path`` if it is there, else as given, from the current folder."""
    inside = Path(include_path or "", task)
    return inside if inside.is_file() else Path(task)


def interval_of(config: RunConfig) -> int | None:
    """Iterations between two evaluations; None = the last checkpoint alone."""
    return config.harness.interval or config.checkpoint.save_interval


def is_due(step: int, train_iters: int, config: RunConfig) -> bool:
    """Whether the checkpoint of ``step`` is to be evaluated: at the interval, and the last one."""
    interval = interval_of(config)
    return step > 0 and (step == train_iters or (interval is not None and step % interval == 0))


def is_installed() -> bool:
    """Whether lm-evaluation-harness and what its transformers model needs can be imported here."""
    return find_spec("lm_eval") is not None and find_spec("accelerate") is not None


def require_harness(config: RunConfig) -> None:
    """Raises ConfigError where the run asks for evaluations and lm-evaluation-harness is not installed."""
    if config.harness.tasks and not is_installed():
        raise ConfigError(
            f"harness.tasks = {', '.join(config.harness.tasks)}: lm-evaluation-harness is not installed on this "
            f"machine: {HOW_TO_INSTALL}, or remove the harness section"
        )
