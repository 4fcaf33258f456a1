"""Start N processes on this machine that each run one module, and wait for them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from launch.local import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
_LOGS = tempfile.TemporaryDirectory(prefix="ranks")  # removed when the tests end


def start_ranks(
    world_size: int, command: list[str], env: dict[str, str] | None = None
) -> list[subprocess.Popen]:
    """Start the ranks; each one's output goes to a file named in its ``.log`` attribute."""
    port = str(free_port())
    folder = Path(tempfile.mkdtemp(dir=_LOGS.name))
    processes = []
    for rank in range(world_size):
        variables = {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
            "TORCH_COMPILE_DISABLE": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}",
        }
        log = folder / f"rank{rank}.log"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [sys.executable, *command],
                env={**os.environ, **variables, **(env or {})},
                stdout=stream,
                stderr=subprocess.STDOUT,
                cwd=REPOSITORY,
                start_new_session=True,
            )
        process.log = log  # type: ignore[attr-defined]
        processes.append(process)
    return processes


def wait_ranks(processes: list[subprocess.Popen], timeout: float = 300.0) -> list[int]:
    """Exit codes; every process is dead afterwards. A rank that fails takes the others down."""
    import time

    end = time.monotonic() + timeout
    while any(p.poll() is None for p in processes):
        failed = [p for p in processes if p.poll() not in (None, 0, 75)]
        if failed or time.monotonic() > end:
            grace = time.monotonic() + (
                10.0 if failed else 2.0
            )  # on a busy machine the others take their time
            while time.monotonic() < grace and any(p.poll() is None for p in processes):
                time.sleep(0.05)
            for p in processes:
                if p.poll() is None:
                    p.kill()
            break
        time.sleep(0.05)
    codes = [p.wait() for p in processes]
    for p in processes:  # what a killed rank started for saving is of its session
        with contextlib.suppress(ProcessLookupError):
            os.killpg(p.pid, signal.SIGKILL)
    return codes


def run_ranks(
    world_size: int, command: list[str], env: dict[str, str] | None = None, timeout: float = 300.0
) -> None:
    """Start, wait, and fail with the ranks' output unless all exit with 0."""
    processes = start_ranks(world_size, command, env)
    codes = wait_ranks(processes, timeout)
    if any(codes):
        logs = "\n".join(
            f"--- rank {i}, exit {c}\n{logs_of(p)[-3000:]}"
            for i, (c, p) in enumerate(zip(codes, processes, strict=True))
        )
        raise AssertionError(f"exit codes {codes}\n{logs}")


def logs_of(process: subprocess.Popen) -> str:
    """What a rank has printed."""
    return process.log.read_text(errors="replace")  # type: ignore[attr-defined]
