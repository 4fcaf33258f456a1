"""``launch/local.py``: exit codes, signals and orphans, with small programs as ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]

RUN_RANKS = """
import sys
sys.path.insert(0, "{folder}")
from local import run_ranks
sys.exit(run_ranks([sys.executable, "-c", sys.argv[1]], int(sys.argv[2]), grace_seconds=1.0))
"""
PRELUDE = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
def say(*words):  # in one write: ranks share the pipe
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())
"""
WAIT_FOR_SIGNAL = """
got = []
for n in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(n, lambda n, f: got.append(n))
say("ready", os.getpid())
end = time.monotonic() + 30
while not got and time.monotonic() < end:
    time.sleep(0.02)
time.sleep(0.3)
say("got", *got)
sys.exit(75 if got else 1)
"""


def start(body: str, world_size: int = 2) -> subprocess.Popen[str]:
    program = RUN_RANKS.format(folder=REPOSITORY / "launch")
    command = [sys.executable, "-c", program, PRELUDE + body, str(world_size)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_ready(process: subprocess.Popen[str], count: int) -> list[int]:
    """Process numbers of the ranks, as they say ``ready NUMBER``."""
    assert process.stdout is not None and process.stderr is not None
    lines = [process.stdout.readline() for _ in range(count)]
    assert all(line.startswith("ready ") for line in lines), (lines, process.poll(), process.stderr.read())
    return [int(line.split()[1]) for line in lines]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("sys.exit(0)", 0),
        ("sys.exit(75)", 75),
        ("sys.exit(75 if rank else 0)", 75),
        ("sys.exit(65 if rank else 0)", 65),
        ("sys.exit(75 if rank else 1)", 1),
        ("os.kill(os.getpid(), signal.SIGKILL) if rank else time.sleep(0)", 137),
        # The peer of a failed rank hangs: it is killed, and the reason of the first one stands.
        ("time.sleep(60) if rank else sys.exit(66)", 66),
        # The peer notices first and says 70; the rank that failed for a reason is slower to leave.
        ("time.sleep(0.4 * rank); sys.exit(65 if rank else 70)", 65),
    ],
)
def test_exit_code_is_the_trainers(body: str, expected: int) -> None:
    process = start(body)
    _, errors = process.communicate(timeout=30)  # less than the hanging peer sleeps
    assert process.returncode == expected, errors


def test_ranks_get_their_place() -> None:
    names = "RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS"
    process = start(f"say(*(os.environ[n] for n in '{names}'.split()))", world_size=3)
    out, _ = process.communicate(timeout=30)
    rows = sorted(line.split() for line in out.splitlines())
    assert [row[:4] for row in rows] == [[str(r), str(r), "3", "127.0.0.1"] for r in range(3)]
    assert len({row[4] for row in rows}) == 1 and int(rows[0][4]) > 1023
    assert rows[0][5] == os.environ.get("OMP_NUM_THREADS", "1")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_every_rank_once(number: signal.Signals) -> None:
    process = start(WAIT_FOR_SIGNAL)
    wait_ready(process, 2)
    process.send_signal(number)
    process.send_signal(number)
    out, errors = process.communicate(timeout=30)
    assert process.returncode == 75, errors
    assert out.splitlines() == [f"got {int(number)}"] * 2


def test_first_interrupt_stops_cleanly() -> None:
    process = start(WAIT_FOR_SIGNAL)
    wait_ready(process, 2)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, out.count(f"got {int(signal.SIGTERM)}")) == (75, 2)


def test_second_interrupt_kills() -> None:
    process = start("signal.signal(15, signal.SIG_IGN); say('ready', os.getpid()); time.sleep(60)")
    pids = wait_ready(process, 2)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert all(gone(pid) for pid in pids)


def test_no_rank_outlives_a_killed_launcher() -> None:
    process = start("say('ready', os.getpid()); time.sleep(60)", world_size=3)
    pids = wait_ready(process, 3)
    process.kill()
    process.wait(timeout=10)
    deadline = time.monotonic() + 10
    while not all(gone(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(gone(pid) for pid in pids)
    process.communicate()


def test_no_helper_outlives_a_killed_rank() -> None:
    process = start(
        "import subprocess\n"
        "helper = subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        "say('ready', helper.pid)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    helpers = wait_ready(process, 2)
    assert process.wait(timeout=30) == 137
    deadline = time.monotonic() + 10
    while not all(gone(pid) for pid in helpers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(gone(pid) for pid in helpers)
    process.communicate()


def local_sh(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(REPOSITORY / "launch" / "local.sh"), *arguments]
    env = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_bad_configuration_is_one_line_and_64(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("run_dir: run\nparalel: {}\n")
    done = local_sh(str(file))
    assert done.returncode == 64
    assert "paralel" in done.stderr and "Traceback" not in done.stderr


def test_missing_configuration_is_66(tmp_path: Path) -> None:
    assert local_sh(str(tmp_path / "none.yaml")).returncode == 66


def test_help_shows_the_command() -> None:
    done = local_sh("--help")
    assert done.returncode == 0 and "launch/local.sh run.yaml" in done.stderr
