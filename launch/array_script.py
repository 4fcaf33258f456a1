"""The two batch scripts of a corpus that is tokenised by a Slurm array; ``launch/prepare.py`` submits them.

Each task of the array makes one shard with ``tools/prepare_data.py``; a job that waits for all of them merges
the shards. As in ``launch/script.py``, no value is ever read by a shell as code except ``setup_lines``.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from script import REPOSITORY, directives, unfit_options, unfit_texts

from megatron_syne import __version__
from megatron_syne.errors import ConfigError

TOOL = REPOSITORY / "tools" / "prepare_data.py"


@dataclass(frozen=True)
class Source:
    """What becomes one prepared prefix."""

    inputs: tuple[str, ...]
    """Files and folders, absolute."""
    prefix: str
    """Where it goes, absolute: PREFIX.bin, .idx, .json."""
    valid_prefix: str | None = None
    """Where the held-out documents go, absolute; None = none are held out."""

    @property
    def prefixes(self) -> list[str]:
        """All that is written."""
        return [self.prefix] if self.valid_prefix is None else [self.prefix, self.valid_prefix]

    @property
    def tool_arguments(self) -> list[str]:
        """What names this source to ``tools/prepare_data.py``."""
        valid = [] if self.valid_prefix is None else ["--valid-prefix", self.valid_prefix]
        return ["--input", *self.inputs, "--output-prefix", self.prefix, *valid]

    @property
    def folder(self) -> Path:
        """Scripts, logs and the record of what was submitted."""
        return Path(f"{self.prefix}.slurm")

    @property
    def job_name(self) -> str:
        """The same for every submission of this prefix and for no other: by it squeue finds what still runs."""
        readable = re.sub(r"[^A-Za-z0-9._-]", "_", Path(self.prefix).name)[:40]
        return f"prepare-{readable}-{hashlib.sha256(self.prefix.encode()).hexdigest()[:12]}"

    @property
    def merge_name(self) -> str:
        """Name of the job that merges."""
        return f"{self.job_name}-merge"


@dataclass(frozen=True)
class Resources:
    """What to ask Slurm for, and how to start Python there."""

    cpus_per_task: int
    workers: int
    time: str | None
    partition: str | None
    account: str | None
    qos: str | None
    max_running: int | None
    sbatch_args: tuple[str, ...]
    setup_lines: tuple[str, ...]
    python: str
    working_folder: str


def shards_script(source: Source, resources: Resources, shards: int, tool_options: Sequence[str]) -> str:
    """The batch script of the array: task i makes shard i of ``shards``."""
    command = [resources.python, str(TOOL), *source.tool_arguments, *tool_options]
    shard = f'"$SLURM_ARRAY_TASK_ID/{shards}"'
    return _script(
        source.job_name, resources, source.folder / "logs" / "shard-%a.log", resources.cpus_per_task,
        f"{shlex.join(command)} --workers {resources.workers} --shard {shard}",
    )  # fmt: skip


def merge_script(
    source: Source, prefixes: Sequence[str], resources: Resources, shards: int, merge_options: Sequence[str]
) -> str:
    """The batch script of the merge of ``prefixes``; it only reads and writes, so one CPU is enough."""
    command = [resources.python, str(TOOL), "--merge", *prefixes, "--shards", str(shards), *merge_options]
    log = source.folder / "logs" / "merge.log"
    return _script(source.merge_name, resources, log, 1, shlex.join(command))


def _script(name: str, resources: Resources, log: Path, cpus: int, command: str) -> str:
    # Slurm replaces %a and the like in a log's name; %% is a per cent sign.
    log_name = str(log.parent).replace("%", "%%") + "/" + log.name
    options: list[tuple[str, object]] = [
        ("job-name", name),
        ("nodes", 1),
        ("ntasks", 1),
        ("cpus-per-task", cpus),
        ("time", resources.time),
        ("partition", resources.partition),
        ("account", resources.account),
        ("qos", resources.qos),
        ("chdir", resources.working_folder),
        ("output", log_name),
    ]
    setup = "\n".join(resources.setup_lines) or ": none"
    return f"""#!/bin/bash
# Written by launch/prepare.py {__version__}; submit again with that, which knows what is finished.
{directives(options, resources.sbatch_args)}

export PYTHONPATH={shlex.quote(str(REPOSITORY))}"${{PYTHONPATH:+:$PYTHONPATH}}"
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
# setup lines
{setup}

echo "[job ${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}} $(date +%FT%T)] \\
start $((${{SLURM_RESTART_COUNT:-0}} + 1)) on $(hostname)"
exec {command}
"""


def array_spec(indices: Iterable[int], max_running: int | None) -> str:
    """``--array``'s value for task numbers: ``0-2,7``, with ``%8`` where at most 8 may run at once."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return text if max_running is None else f"{text}%{max_running}"


def check(sources: Sequence[Source], resources: Resources, tool_options: Sequence[str]) -> None:
    """Raise ConfigError, naming all of them, for values that cannot stand in a batch script."""
    texts = {f"--{key}": getattr(resources, key) or "" for key in ("time", "partition", "account", "qos")}
    texts |= {"--python": resources.python, "the working folder": resources.working_folder}
    texts |= {f"--sbatch-arg {n}": text for n, text in enumerate(resources.sbatch_args)}
    texts |= {f"option {n} of prepare_data.py": text for n, text in enumerate(tool_options)}
    for source in sources:
        texts |= {"--output-prefix": source.prefix, "--valid-prefix": source.valid_prefix or ""}
        texts |= {f"--input {n}": text for n, text in enumerate(source.inputs)}
        if problems := [*unfit_texts(texts), *unfit_options("--sbatch-arg", resources.sbatch_args)]:
            raise ConfigError("; ".join(problems))
