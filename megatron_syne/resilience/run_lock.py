"""One run per run folder: a lock file that names its holder.

Taken over only when the holder is known to be gone: the same machine and no such process, or the same Slurm
job started again (a requeued job may come back on another node). Otherwise the second run is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from pathlib import Path

from megatron_syne.errors import CannotCreate


class RunLock:
    """Holds ``<run_dir>/run.lock`` from :meth:`acquire` to :meth:`release`; rank 0 only."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "run.lock"
        self.held = False

    def acquire(self) -> None:
        """Create the lock; CannotCreate names the holder where another run has it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Looking at a dead holder's lock and replacing it must be one act: of two runs that both see it dead
        # the second would otherwise replace the first one's new lock.
        with (self.path.parent / ".run.lock.guard").open("w") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)
            if os.path.lexists(self.path):
                self._refuse_unless_dead()
                self.path.unlink()
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            with os.fdopen(descriptor, "w") as stream:
                stream.write(json.dumps(_identity()))
        self.held = True

    def _refuse_unless_dead(self) -> None:
        text = self.path.read_text()
        try:
            holder = json.loads(text)
            host, pid, job = holder["host"], int(holder["pid"]), holder.get("job")
        except (ValueError, KeyError, TypeError):
            raise CannotCreate(
                f"{self.path} is not a lock of this stack: {text[:80]!r}; remove it if no run uses this folder"
            ) from None
        mine = _identity()
        same_job = job is not None and job == mine["job"] and holder.get("restart") != mine["restart"]
        dead_here = host == mine["host"] and not _alive(pid, holder.get("started"))
        if not (same_job or dead_here):
            what = f"job {job}" if job else "a run"
            raise CannotCreate(
                f"{self.path.parent} is held by {what} (host {host}, pid {pid}); wait for it or use another "
                f"run_dir. If that run is gone for certain, remove {self.path.name}"
            )

    def release(self) -> None:
        """Give the folder back."""
        if self.held:
            self.path.unlink(missing_ok=True)
            self.held = False


def _identity() -> dict[str, object]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _start_time(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }


def _start_time(pid: int) -> str | None:
    """Kernel start time of a process, which tells a reused pid from the process that held the lock."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return None


def _alive(pid: int, started: object) -> bool:
    now = _start_time(pid)
    return now is not None and (started is None or now == started)
