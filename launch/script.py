"""The batch script of a run, as a pure function of its configuration; ``launch/slurm.py`` writes and submits it.

Nothing of the configuration is ever read by a shell as code, except ``launch.setup_lines``, which are code:
every other value is quoted, and what cannot be quoted for Slurm's own parser is refused.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from megatron_syne import __version__
from megatron_syne.config.schema import LaunchConfig, RunConfig
from megatron_syne.errors import ConfigError
from megatron_syne.preflight.launch_rules import check_launch, time_limit_seconds

REPOSITORY = Path(__file__).resolve().parents[1]
SHORT_LEAD_SECONDS = 120
"""Slurm looks at its clock every 30 s or so: with less than this there is hardly time for a step and a save."""
STRAGGLER_SECONDS = 60
"""Ranks still running this long after the first one left are killed (they wait for it in a collective).
``--kill-on-bad-exit=1`` would end them at once: also those that still finish a save when the first rank has
left with 75; and Slurm's SIGTERM would make a failed run look like one that stopped cleanly."""


def render(config: RunConfig) -> str:
    """The batch script of a run. Raises ConfigError for values that cannot stand in one."""
    launch, run_dir = config.launch, Path(config.run_dir)
    check_values(config)
    helper = [str(REPOSITORY / "launch" / "job.py"), "--run-dir", str(run_dir)]
    helper += ["--max-no-progress", str(launch.max_no_progress), "--"]
    srun = ["srun", "--export=ALL", "--kill-on-bad-exit=0", f"--wait={STRAGGLER_SECONDS}", *launch.srun_args]
    trainer = [launch.python, "-m", "megatron_syne.train", "--config", str(run_dir / "config.yaml")]
    environment = {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # set before CUDA starts: TP overlap needs it on Hopper
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        **launch.env,
    }
    exports = "\n".join(f"export {key}={shlex.quote(value)}" for key, value in environment.items())
    setup = "\n".join(launch.setup_lines) or ": none"
    return f"""#!/bin/bash
# Written by launch/slurm.py {__version__}; change the configuration, not this file.
{_directives(launch, run_dir)}

# The signal before the time limit is for launch/job.py below. Until that runs, ignore it: it would kill this
# shell, and the job with it. (Handlers are reset by exec, "ignore" is inherited: there is no gap.)
trap '' USR1
# One task per rank: each reads its place from SLURM_PROCID, not from what the submitting shell had.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE
export PYTHONPATH={shlex.quote(str(REPOSITORY))}"${{PYTHONPATH:+:$PYTHONPATH}}"
{exports}
{_cpus(launch)}
# launch.setup_lines
{setup}

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") && [ -n "$hosts" ] || {{
    echo "error: scontrol show hostnames gave no host for '$SLURM_JOB_NODELIST': no address for rank 0" >&2
    exit 70
}}
export MASTER_ADDR="${{hosts%%$'\\n'*}}"
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

python={shlex.quote(sys.executable)} # any Python 3.8+ will do for launch/job.py
[ -x "$python" ] || python=python3
exec "$python" {shlex.join(helper)} \\
    {shlex.join(srun)} \\
    {shlex.join(trainer)}
"""


def _directives(launch: LaunchConfig, run_dir: Path) -> str:
    # Slurm replaces %j and the like in file names; %% is a per cent sign.
    log = str(run_dir / "logs").replace("%", "%%") + "/slurm-%j.log"
    options: list[tuple[str, object]] = [
        ("job-name", launch.job_name),
        ("nodes", launch.nodes),
        ("ntasks-per-node", launch.ntasks_per_node),
        ("gpus-per-node", launch.gpus_per_node or None),
        ("cpus-per-task", launch.cpus_per_task),
        ("time", launch.time),
        ("partition", launch.partition),
        ("account", launch.account),
        ("qos", launch.qos),
        ("signal", f"B:USR1@{launch.signal_lead_seconds}"),
        ("chdir", run_dir),
        ("output", log),
    ]
    return directives(options, launch.sbatch_args)


def directives(options: Iterable[tuple[str, object]], sbatch_args: Iterable[str]) -> str:
    """``#SBATCH`` lines of options (None = left out) and of further ones as ``--name=value``.

    What a job writes is appended to its log through all its starts, and Slurm may requeue it.
    """
    lines = [f"--{name}={shlex.quote(str(value))}" for name, value in options if value is not None]
    lines += ["--open-mode=append", "--requeue"]
    for text in sbatch_args:
        name, equals, value = text.partition("=")
        lines.append(f"{name}{equals}{shlex.quote(value) if equals else ''}")
    return "\n".join(f"#SBATCH {line}" for line in lines)


def _cpus(launch: LaunchConfig) -> str:
    # Since Slurm 22.05 srun does not take --cpus-per-task over from sbatch; this variable tells it.
    return "" if launch.cpus_per_task is None else f"export SRUN_CPUS_PER_TASK={launch.cpus_per_task}\n"


def check_values(config: RunConfig) -> list[str]:
    """Raise ConfigError for a launch section that cannot work; returns warnings."""
    check_launch(config)
    if problems := list(_unfit_for_a_script(config)):
        raise ConfigError("; ".join(problems))
    lead, limit = config.launch.signal_lead_seconds, time_limit_seconds(config.launch.time)
    if limit is not None and limit <= lead + 60:
        raise ConfigError(
            f"launch.time = {config.launch.time} ({limit} s) must exceed launch.signal_lead_seconds = {lead} by "
            f"more than 60 s, or the job is told to stop as it starts; ask for more time or a shorter lead"
        )
    if lead < SHORT_LEAD_SECONDS:
        return [
            f"launch.signal_lead_seconds = {lead} looks short: Slurm is up to 30 s late, and one step and one "
            f"checkpoint must fit in"
        ]
    return []


def _unfit_for_a_script(config: RunConfig) -> Iterator[str]:
    launch = config.launch
    texts = {"run_dir": config.run_dir, "launch.python": launch.python, "launch.job_name": launch.job_name}
    texts |= {f"launch.{key}": getattr(launch, key) or "" for key in ("partition", "account", "qos")}
    texts |= {f"launch.env.{key}": value for key, value in launch.env.items()}
    for key in ("srun_args", "sbatch_args"):
        texts |= {f"launch.{key}.{n}": text for n, text in enumerate(getattr(launch, key))}
    yield from unfit_texts(texts)
    yield from unfit_options("launch.sbatch_args", launch.sbatch_args)
    if launch.signal_lead_seconds > 65535:
        yield f"launch.signal_lead_seconds = {launch.signal_lead_seconds}: Slurm allows at most 65535"
    if "SIGUSR1" not in config.resilience.exit_signals:
        yield (
            f"resilience.exit_signals = {config.resilience.exit_signals}: add SIGUSR1, with which a Slurm job is "
            f"told to save before its time limit"
        )


def unfit_texts(texts: Mapping[str, str]) -> Iterator[str]:
    """What is wrong with values (by the name of their option) that are to stand in a batch script."""
    for key, text in texts.items():
        # A line break would end an #SBATCH comment; Slurm itself takes a backslash out of a name or path.
        if re.search(r"[\x00-\x1f\x7f\\]", text):
            yield f"{key} = {text!r}: no line break, control character or backslash can stand in a batch script"


def unfit_options(key: str, sbatch_args: Iterable[str]) -> Iterator[str]:
    """What is wrong with further options for sbatch."""
    for text in sbatch_args:
        if not re.fullmatch(r"--[a-z][a-z-]*(=.*)?", text):
            yield f"{key}: {text!r}: expected one option, as --name or --name=value"
