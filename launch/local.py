"""Run a configuration on this machine: one process per rank, on the loopback interface.

    launch/local.sh run.yaml [a.b=c ...] [--dry-run]
    launch/local.sh run.yaml [a.b=c ...] --score --input DOCUMENTS --output SCORED ...    megatron_syne.score

The world size is what the configuration asks for (TP x PP x CP x DP). Unlike ``torchrun``, which says 1 for
every failure, this returns the trainer's own exit code: of the first rank that fails, or 75 where all stopped
cleanly. SIGTERM and SIGUSR1 are passed on to all ranks, once; the first Ctrl-C asks them to save and stop, the
second kills them. No rank outlives this process, however it ends. Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # works in a checkout, installed or not

from megatron_syne.config.loader import load_config  # noqa: E402
from megatron_syne.errors import EXIT_CONFIG, EXIT_INTERNAL, EXIT_REQUEUE, IOFault, run_cli  # noqa: E402
from megatron_syne.parallel.topology import world_size_of  # noqa: E402

GRACE_SECONDS = 20.0
"""How long the peers of a failed rank may take to notice (and say what they saw) before they are killed."""
PR_SET_PDEATHSIG = 1


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What a rank needs to find the others; everything else as it is here."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    defaults = {
        "OMP_NUM_THREADS": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "GLOO_SOCKET_IFNAME": "lo",  # nothing of a run on one machine is to be reached from outside
        "NCCL_SOCKET_IFNAME": "lo",
    }
    python_path = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **defaults,
        **os.environ,
        **{name: str(value) for name, value in place.items()},
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": ":".join(python_path),
    }


def free_port() -> int:
    """A port that nobody listens on now, and that no outgoing connection is given before the ranks bind it.

    The kernel gives those ports from 32768 on (Linux's default): these are below.
    """
    for port in random.SystemRandom().sample(range(10_000, 32_768), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise IOFault("no free port found below 32768 on the loopback interface: something holds them all")


def run_ranks(command: Sequence[str], world_size: int, grace_seconds: float = GRACE_SECONDS) -> int:
    """Start ``command`` once per rank, wait for all; the exit code to leave with (128+n for a signal)."""
    libc, parent = ctypes.CDLL(None), os.getpid()

    def die_with_parent() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(EXIT_REQUEUE)

    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda number, frame: received.append(number))
    port = free_port()
    # A session each: Ctrl-C in the terminal comes to this process alone, which passes it on.
    ranks = [
        subprocess.Popen(
            command,
            env=rank_environment(rank, world_size, port),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        for rank in range(world_size)
    ]
    failures: dict[int, int] = {}  # rank -> exit code, in the order in which they failed
    told: set[int] = set()
    deadline = float("inf")
    running = True
    while running:
        running = False
        for rank, process in enumerate(ranks):
            running |= process.poll() is None
            if process.returncode not in (None, 0, EXIT_REQUEUE) and time.monotonic() <= deadline:
                failures.setdefault(rank, _exit_code(process))
        if failures:
            deadline = min(deadline, time.monotonic() + grace_seconds)
        while received:
            got = received.pop(0)
            if got == signal.SIGINT and got in told:
                deadline = 0.0
                failures.setdefault(-1, 128 + got)
            elif got not in told:
                told.add(got)
                _send(ranks, signal.SIGTERM if got == signal.SIGINT else got)
        if time.monotonic() > deadline:
            _send(ranks, signal.SIGKILL)
        time.sleep(0.05)
    for (
        rank
    ) in ranks:  # a killed rank leaves its helpers behind (saving starts some): they are of its session
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rank.pid, signal.SIGKILL)
    # A rank that merely lost its peer says 70: the peer's reason counts, even where it was slower to leave.
    reasons = [code for code in failures.values() if code != EXIT_INTERNAL] or list(failures.values())
    return reasons[0] if reasons else max(_exit_code(process) for process in ranks)


def _send(ranks: list[subprocess.Popen[bytes]], number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)


def _exit_code(rank: subprocess.Popen[bytes]) -> int:
    return rank.returncode if rank.returncode >= 0 else 128 - rank.returncode


def main() -> int:
    """Command line; see the module's docstring."""
    config_path, *rest = sys.argv[1:] or ["--help"]
    if config_path.startswith("-"):
        print(__doc__.strip() if __doc__ else "", file=sys.stderr)
        return 0 if config_path in ("-h", "--help") else EXIT_CONFIG
    module, further = "megatron_syne.train", []
    if "--score" in rest:  # what follows are the other program's own options
        at = rest.index("--score")
        module, rest, further = "megatron_syne.score", rest[:at], rest[at + 1 :]
    command = [sys.executable, "-m", module, "--config", config_path, *rest, *further]
    options = [text for text in rest if text.startswith("-")]
    config = load_config(config_path, [text for text in rest if text not in options])
    return run_ranks(command, 1 if "--dry-run" in options else world_size_of(config.parallel))


if __name__ == "__main__":
    sys.exit(run_cli(main))
