"""One start of a Slurm job: run ``srun``, pass the exit signal on, record what happened, requeue or stop.

The batch script that ``launch/slurm.py`` writes ends with::

    exec python job.py --run-dir RUN --max-no-progress 3 -- srun ... python -m megatron_syne.train

so this process *is* the batch step and gets Slurm's ``--signal=B:USR1@LEAD``. Standard library only: it runs
outside of any container and needs no environment. What it relies on (seen on Slurm 22.05):

* A signal sent to ``srun`` reaches every rank exactly once. One that comes while the step is being created is
  lost, so it is repeated until ``srun`` ends; ranks take repeated signals as one.
* ``scancel``, ``scontrol requeue``, preemption and the time limit all look alike from inside: SIGTERM, then
  JobState=COMPLETING. They differ in Restarts (a requeue raises it at once) and in EndTime - StartTime.
* ``scontrol requeue`` also revives a cancelled job, so it must not be called for one.
* ``srun``'s own exit code is the largest of all ranks' (137 for the peers that it kills); the code that
  counts is the one in ``last_exit.json``, which the trainer writes.

Files in the run folder: ``status.json`` (written by this and by ``slurm.py``), ``last_exit.json``
(``{"exit_code": 75, "iteration": 40, "time": ...}``: written by rank 0 when all is well, or by the first rank
that fails by its own fault; a rank that only lost its peer writes nothing, so that a killed rank shows).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXIT_INTERNAL, EXIT_CANNOT_CREATE, EXIT_REQUEUE = 70, 73, 75  # as in megatron_syne/errors.py
REPEAT_SECONDS = 30.0
STOPPED_CLEANLY = "stopped cleanly"
ALIVE = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING"}
ALIVE |= {"REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD", "STAGE_OUT"}


class SlurmUnreachable(Exception):
    """The controller did not answer: nothing can be said about a job."""


@dataclass(frozen=True)
class Ending:
    """What becomes of the job after one start."""

    state: str
    """COMPLETED, FAILED, STOPPED (by scancel) or REQUEUED."""
    reason: str
    exit_code: int
    requeue: bool = False
    """Whether this process has to ask Slurm for it (Slurm may have requeued the job by itself)."""
    no_progress: int = 0
    """Starts in a row that saved nothing new, this one included."""


def decide(code: int, by_slurm: str | None, progress: bool, no_progress: int, limit: int) -> Ending:
    """The ending for the trainer's exit code.

    ``by_slurm``: who ended the start from outside (``requeued``, ``cancelled``, ``timeout``), None = nobody.
    ``no_progress``: starts in a row without a new checkpoint *before* this one; ``limit``: as many as allowed.
    """
    count = 0 if progress else no_progress + 1
    if by_slurm == "requeued":  # preemption, scontrol requeue, node loss: not the run's fault, not counted
        return Ending("REQUEUED", "requeued by Slurm", EXIT_REQUEUE, False, 0 if progress else no_progress)
    if code == 0:
        return Ending("COMPLETED", "finished", 0)
    if by_slurm == "cancelled":
        return Ending(
            "STOPPED", "cancelled (scancel); submit again to go on", EXIT_REQUEUE, False, no_progress
        )
    # After 137/143 of ranks that Slurm killed at the limit the run simply goes on from its last checkpoint.
    if by_slurm == "timeout" or code == EXIT_REQUEUE or code > 128:
        why = (
            "time limit"
            if by_slurm == "timeout"
            else "stopped cleanly"
            if code == EXIT_REQUEUE
            else _by(code)
        )
        if count >= limit:
            reason = f"no progress: {count} starts in a row saved no new checkpoint (last one: {why})"
            return Ending("FAILED", reason, EXIT_INTERNAL, False, count)
        return Ending("REQUEUED", why, EXIT_REQUEUE, True, count)
    return Ending("FAILED", f"exit code {code}", code, False, count)


def trainer_code(recorded: object, srun_code: int) -> int:
    """The exit code of the run, from ``last_exit.json`` (None = not written) and srun's.

    srun's is the largest of all ranks', so 137 where it killed the peers of a rank that left with a reason:
    the recorded one counts. But 70 is also what a rank says that merely lost its peer: then a rank that was
    killed by a signal (out of memory, a lost node) is the cause.
    """
    if not isinstance(recorded, int) or (recorded == EXIT_INTERNAL and srun_code > 128):
        return srun_code
    return recorded


def _by(code: int) -> str:
    try:
        return f"killed by {signal.Signals(code - 128).name}"
    except ValueError:
        return f"exit code {code}"


# -- Slurm ---------------------------------------------------------------------------------------------------


def ask_slurm(job: int) -> dict[str, str]:
    """Fields of ``scontrol show job``; empty where Slurm does not know the job (any more)."""
    command = ["scontrol", "show", "job", "-o", str(job)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmUnreachable(f"{' '.join(command)}: {error}") from None
    if done.returncode != 0:
        if "Invalid job id" in done.stderr:
            return {}
        raise SlurmUnreachable(f"{' '.join(command)}: {done.stderr.strip()}")
    return dict(re.findall(r"(\w+)=(\S*)", done.stdout))


def is_alive(fields: dict[str, str]) -> bool:
    """Whether a job runs or may still run."""
    return fields.get("JobState", "") in ALIVE


def ended_by(fields: dict[str, str], restarts: int) -> str | None:
    """Who ends this start, by the job's fields: ``requeued``, ``cancelled``, ``timeout`` or None (nobody)."""
    if int(fields.get("Restarts", "0")) > restarts:
        return "requeued"
    if fields.get("JobState") in ("RUNNING", None):
        return None
    limit = parse_limit(fields.get("TimeLimit", "UNLIMITED"))
    try:
        start, end = (
            time.mktime(time.strptime(fields[k], "%Y-%m-%dT%H:%M:%S")) for k in ("StartTime", "EndTime")
        )
    except (KeyError, ValueError):
        return "cancelled"
    return "timeout" if limit is not None and end - start >= limit else "cancelled"


def parse_limit(text: str) -> int | None:
    """Seconds of a time limit as ``scontrol`` prints it (``2-12:30:00``, ``01:00:00``); None = no limit."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(each or 0) for each in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


# -- the run folder ------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none that can be read."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replace a JSON file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w") as stream:
        stream.write(json.dumps(value, indent=1) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def last_saved(run_dir: Path) -> int | None:
    """Iteration of the newest checkpoint (``checkpoints/iter_0000100`` with a manifest); None = none yet."""
    folders = (run_dir / "checkpoints").glob("iter_*/manifest.json")
    names = (re.fullmatch(r"iter_(\d+)", file.parent.name) for file in folders)
    return max((int(name[1]) for name in names if name), default=None)


def record(run_dir: Path, state: str, **values: Any) -> dict[str, Any]:
    """Set the state (and other values) in ``status.json``, keeping the history; returns the new status."""
    status = read_json(run_dir / "status.json")
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    status.update(values, state=state, updated=now, last_saved_iteration=last_saved(run_dir))
    event = {"time": now, "state": state}
    event |= {
        k: status[k]
        for k in ("job_id", "restarts", "reason", "last_saved_iteration")
        if status.get(k) is not None
    }
    history = status.get("history", [])
    if history and all(history[-1].get(k) == event.get(k) for k in ("state", "job_id", "restarts", "reason")):
        history.pop()  # the same said again, a little later
    status["history"] = [*history, event]
    write_json(run_dir / "status.json", status)
    return status


def release_dead_lock(run_dir: Path) -> None:
    """Remove the trainer's ``run.lock`` where Slurm says that the job which holds it is gone.

    A job that was killed leaves it, and the next one may come up on another node, from which the dead
    process cannot be seen.
    """
    lock = run_dir / "run.lock"
    holder = str(read_json(lock).get("job") or "")
    if holder.isdigit() and holder != os.environ.get("SLURM_JOB_ID") and not is_alive(ask_slurm(int(holder))):
        say(f"removing {lock}, left by job {holder}, which has ended")
        lock.unlink(missing_ok=True)


def say(text: str) -> None:
    """One line in the job's log."""
    line = f"[job {os.environ.get('SLURM_JOB_ID', '?')} {time.strftime('%H:%M:%S')}] {text}\n"
    sys.stdout.write(line)  # in one piece: the ranks write into the same log
    sys.stdout.flush()


# -- one start -----------------------------------------------------------------------------------------------


def begin(run_dir: Path, job: int, restarts: int, limit: int) -> int | None:
    """Take the run folder for this start; an exit code where there is nothing to run or it is not ours."""
    status = read_json(run_dir / "status.json")
    owner, state = status.get("job_id"), status.get("state")
    if owner not in (None, job) and is_alive(ask_slurm(int(owner))):
        say(f"error: {run_dir} is held by job {owner}, which is not over; cancel one of them")
        return EXIT_CANNOT_CREATE
    if state == "COMPLETED" and owner == job:
        say("this run is complete; nothing to do")
        return 0
    no_progress = int(status.get("no_progress_starts", 0))
    if state == "RUNNING" and owner == job:  # the last start was killed before it could record its end
        progress = last_saved(run_dir) != status.get("saved_at_start")
        ending = decide(137, None, progress, no_progress, limit)
        no_progress = ending.no_progress
        if ending.state == "FAILED":
            finish(run_dir, ending)
            return ending.exit_code
    release_dead_lock(run_dir)
    (run_dir / "last_exit.json").unlink(missing_ok=True)
    saved = last_saved(run_dir)
    record(
        run_dir, "RUNNING", job_id=job, restarts=restarts, saved_at_start=saved, no_progress_starts=no_progress,
        reason=None, exit_code=None, nodes=os.environ.get("SLURM_JOB_NODELIST"),
    )  # fmt: skip
    say(f"start {restarts + 1} on {os.environ.get('SLURM_JOB_NODELIST')}, last saved iteration: {saved}")
    return None


def listen() -> list[int]:
    """From now on SIGUSR1 and SIGTERM are noted in the list that is returned."""
    received: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, frame: received.append(number))
    return received


def run(command: list[str], received: list[int], on_terminate: Callable[[], None]) -> int:
    """Run ``srun`` to its end, passing the signals in ``received`` on to all ranks; its exit code (128+n).

    Always as SIGUSR1: sent to ``srun``, SIGTERM would end the step instead of reaching the ranks alone.
    """
    process = subprocess.Popen(command)
    told, passed_on = False, -REPEAT_SECONDS
    while process.poll() is None:
        if received and time.monotonic() - passed_on >= REPEAT_SECONDS:
            passed_on = time.monotonic()
            say(f"{signal.Signals(received[0]).name}: asking the ranks to save and stop")
            process.send_signal(signal.SIGUSR1)
        if signal.SIGTERM in received and not told:
            told = True
            on_terminate()
        time.sleep(0.1)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def finish(run_dir: Path, ending: Ending) -> None:
    """Record the ending and say it."""
    saved = record(
        run_dir, ending.state, reason=ending.reason, exit_code=ending.exit_code,
        no_progress_starts=ending.no_progress,
    )["last_saved_iteration"]  # fmt: skip
    say(f"{ending.state}: {ending.reason}; last saved iteration: {saved}")


def requeue(job: int) -> str | None:
    """Ask Slurm to start this job again; the error text where it refuses."""
    command = ["scontrol", "requeue", str(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else done.stderr.strip() or f"exit code {done.returncode}"


def main() -> int:
    """One start of the job, from taking the run folder to requeue; returns the batch step's exit code."""
    parser = argparse.ArgumentParser(description="Run one start of a job; called by the batch script.")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--max-no-progress", type=int, required=True)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    job, restarts = int(os.environ["SLURM_JOB_ID"]), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    run_dir: Path = args.run_dir

    received = listen()
    try:
        early = begin(run_dir, job, restarts, args.max_no_progress)
    except SlurmUnreachable as error:
        say(f"error: cannot tell whether {run_dir} is free: {error}")
        return EXIT_CANNOT_CREATE
    if early is not None:
        return early
    status = read_json(run_dir / "status.json")

    asked = False

    def ending(code: int) -> Ending:
        try:
            by_slurm = "timeout" if asked else ended_by(ask_slurm(job), restarts)
        except SlurmUnreachable as error:
            say(f"warning: {error}")
            by_slurm = None
        progress = last_saved(run_dir) != status["saved_at_start"]
        return decide(code, by_slurm, progress, status["no_progress_starts"], args.max_no_progress)

    def settle(known: Ending) -> Ending:
        nonlocal asked
        finish(run_dir, known)
        if known.requeue and not asked:
            asked = True
            if (problem := requeue(job)) is not None:
                known = Ending("FAILED", f"Slurm refused to requeue: {problem}", known.exit_code)
                finish(run_dir, known)
        return known

    def on_terminate() -> None:
        # Slurm kills this process too where the ranks take longer than its grace (KillWait) to leave: what is
        # clear by now is done now. At the time limit that is the requeue; a save going on may still finish.
        known = ending(EXIT_REQUEUE)
        if known.state in ("REQUEUED", "STOPPED") and known.reason != STOPPED_CLEANLY:
            settle(known)

    srun_code = run(command, received, on_terminate)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # what follows is short and must not be cut off
    code = trainer_code(read_json(run_dir / "last_exit.json").get("exit_code"), srun_code)
    if code != srun_code:
        say(f"the trainer's exit code is {code} (srun: {srun_code})")
    return settle(ending(code)).exit_code


if __name__ == "__main__":
    sys.exit(main())
