"""From a run's YAML to a Slurm job: run folder, batch script, submission, status.

    python launch/slurm.py --config run.yaml [a.b=c ...]              write the run folder and submit
    python launch/slurm.py --config run.yaml [a.b=c ...] --print      show the batch script, write nothing
    python launch/slurm.py --config run.yaml [a.b=c ...] --no-submit  write the run folder only
    python launch/slurm.py --status RUN_DIR                           what the run is doing

One task per rank. Slurm signals the job ``launch.signal_lead_seconds`` before its limit; the ranks save and
leave with 75, and the job puts itself back into the queue, in the same run folder and appending to the same
log, until the run is complete (exit 0), fails (its exit code), stops saving anything new
(``launch.max_no_progress``, exit 70), or is cancelled. Submitting again resumes the run. Two jobs never share
a run folder: the second is refused with exit 73. ``launch/job.py`` is the part that runs inside the job.

In the run folder: ``config.yaml`` (resolved), ``submit.sbatch``, ``status.json``, ``logs/slurm-JOBID.log``.
Needs PyYAML and Slurm's commands; no torch, so a login node will do.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "launch")]  # works in a checkout, installed or not

import job as on_node  # noqa: E402
from script import check_values, render  # noqa: E402

from megatron_syne import __version__  # noqa: E402
from megatron_syne.config.loader import load_config, save_resolved  # noqa: E402
from megatron_syne.config.schema import RunConfig  # noqa: E402
from megatron_syne.errors import CannotCreate, ConfigError, IOFault, MissingInput, run_cli  # noqa: E402
from megatron_syne.models.config import resolve_model  # noqa: E402
from megatron_syne.preflight.rules import check  # noqa: E402

# -- submission ----------------------------------------------------------------------------------------------


def prepare(config: RunConfig, script: str) -> None:
    """Write the run folder. Raises CannotCreate where a live job holds it."""
    run_dir = Path(config.run_dir)
    status = on_node.read_json(run_dir / "status.json")
    holder = status.get("job_id")
    if holder is not None:
        try:
            alive = on_node.is_alive(on_node.ask_slurm(int(holder)))
        except on_node.SlurmUnreachable as error:
            raise CannotCreate(
                f"{run_dir} was used by job {holder}, and Slurm cannot say if it is over: {error}"
            ) from None
        if alive:
            raise CannotCreate(
                f"{run_dir} is held by job {holder}, which is not over (squeue -j {holder}); "
                f"wait for it, scancel {holder}, or use another run_dir"
            )
    save_resolved(config, run_dir / "config.yaml")
    (run_dir / "submit.sbatch").write_text(script)
    on_node.record(
        run_dir, "INIT", job_id=None, job_name=config.launch.job_name, restarts=0, no_progress_starts=0,
        reason=None, exit_code=None, code=code_version(),
    )  # fmt: skip


def submit(run_dir: Path) -> int:
    """Hand the script to Slurm; the job's number.

    The job is held until its number is in the status file, so that it cannot start before.
    """
    try:
        text = slurm_command("sbatch", "--parsable", "--hold", str(run_dir / "submit.sbatch"))
    except ConfigError as error:
        on_node.record(run_dir, "FAILED", reason=str(error))
        raise
    number = int(text.strip().split(";")[0])
    on_node.record(run_dir, "PENDING", job_id=number)
    slurm_command("scontrol", "release", str(number))
    return number


def slurm_command(*command: str) -> str:
    """Standard output of a command of Slurm's. Raises ConfigError where it refuses, MissingInput without Slurm."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise MissingInput(
            f"{command[0]} is not here: submit from a machine with Slurm, or look with --print"
        ) from None
    if done.returncode != 0:
        raise ConfigError(f"{command[0]} refused: {done.stderr.strip()}")
    return done.stdout


@contextlib.contextmanager
def submission_lock(run_dir: Path) -> Iterator[None]:
    """Of two submissions into one run folder at the same moment, the second is refused (CannotCreate)."""
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        lock = os.open(run_dir / ".submit.lock", os.O_WRONLY | os.O_CREAT, 0o644)
    except OSError as error:
        raise CannotCreate(f"run_dir: cannot create {run_dir}: {error.strerror} ({error.filename})") from None
    with os.fdopen(lock, "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CannotCreate(f"{run_dir}: another submission into it is going on at this moment") from None
        except OSError as error:
            raise IOFault(f"{run_dir / '.submit.lock'}: this file system has no locks: {error}") from None
        yield


def code_version() -> dict[str, str]:
    """Version of the package and, in a git checkout, its commit (``-dirty`` where files differ from it)."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    version = {"package": __version__}
    with contextlib.suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            version["commit"] = done.stdout.strip()
    return version


# -- status --------------------------------------------------------------------------------------------------


def show_status(run_dir: Path) -> str:
    """What the run folder and Slurm say about a run. Raises MissingInput where there is no run."""
    status = on_node.read_json(run_dir / "status.json")
    if not status:
        raise MissingInput(f"{run_dir}: no status.json; not a run folder of launch/slurm.py")
    number, state = status.get("job_id"), status["state"]
    slurm = "not asked (no job)"
    if number is not None:
        try:
            fields = on_node.ask_slurm(int(number))
            reason = fields.get("Reason", "None")
            slurm = fields.get("JobState", "unknown job") + (f" ({reason})" if reason != "None" else "")
            state = combined_state(state, fields)
        except on_node.SlurmUnreachable as error:
            slurm = f"no answer: {error}"
    saved = on_node.last_saved(run_dir)
    rows = {
        "run": run_dir, "state": state, "reason": status.get("reason"), "job": number, "slurm": slurm,
        "restarts": status.get("restarts"), "last checkpoint": "none" if saved is None else f"iteration {saved}",
        "updated": status.get("updated"), "log": None if number is None else run_dir / f"logs/slurm-{number}.log",
    }  # fmt: skip
    return "\n".join(f"{name:<16}{value}" for name, value in rows.items() if value is not None)


def combined_state(recorded: str, fields: dict[str, str]) -> str:
    """The recorded state, corrected by what Slurm knows better (a job killed before it could record its end)."""
    now = fields.get("JobState")
    if now == "PENDING":
        return "REQUEUED" if fields.get("Restarts", "0") != "0" else "PENDING"
    if now == "RUNNING" and recorded in ("PENDING", "REQUEUED", "STOPPED"):
        return "RUNNING"
    if recorded in ("PENDING", "RUNNING", "REQUEUED") and not on_node.is_alive(fields):
        return {"CANCELLED": "STOPPED", "COMPLETED": "COMPLETED", None: "UNKNOWN"}.get(now, "FAILED")
    return recorded


def main() -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Submit a run to Slurm, or show what it is doing.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", help="YAML of the run")
    what.add_argument("--status", metavar="RUN_DIR", type=Path, help="show the state of a run")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="options over those of the file")
    parser.add_argument("--print", action="store_true", help="show the batch script, write nothing")
    parser.add_argument("--no-submit", action="store_true", help="write the run folder, do not submit")
    args = parser.parse_intermixed_args()
    if args.status is not None:
        print(show_status(args.status))
        return 0
    config = load_config(args.config, args.overrides)
    warnings = check_values(config)
    world_size = config.launch.nodes * config.launch.ntasks_per_node
    gpus = config.platform == "cuda" or (config.platform == "auto" and config.launch.gpus_per_node > 0)
    check(config, resolve_model(config.model), world_size, "cuda" if gpus else "cpu")
    script = render(config)
    if args.print:
        print(script, end="")
        return 0
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    run_dir = Path(config.run_dir)
    with submission_lock(run_dir):
        prepare(config, script)
        if args.no_submit:
            print(f"{run_dir}: written; submit it with: sbatch {shlex.quote(str(run_dir / 'submit.sbatch'))}")
            return 0
        number = submit(run_dir)
    print(f"job {number} submitted: {world_size} ranks on {config.launch.nodes} nodes")
    print(f"log:    {run_dir / 'logs' / f'slurm-{number}.log'}")
    print(f"status: python {shlex.quote(os.path.relpath(__file__))} --status {shlex.quote(str(run_dir))}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
