"""Stands in for ``python -m megatron_syne.train`` under a real Slurm: the same files, signals and exit codes.

Started as ``launch.python``; the arguments are those of the real one. What to do comes from the environment
(``launch.env``): ``FAKE_STEPS`` steps of 0.05 s, a checkpoint on SIGUSR1/SIGTERM unless ``FAKE_SAVES=0``;
``FAKE_EXIT=RANK:CODE`` makes a rank leave with that code at once, ``FAKE_KILL=RANK`` kill itself;
``FAKE_DEAF=1``: hears no signal.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

RANK = os.environ["SLURM_PROCID"]
received: list[int] = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    deaf = os.environ.get("FAKE_DEAF") == "1"
    signal.signal(number, signal.SIG_IGN if deaf else lambda number, frame: received.append(number))

module, run_dir = sys.argv[1:3], Path(sys.argv[sys.argv.index("--config") + 1]).parent
assert module == ["-m", "megatron_syne.train"], sys.argv
checkpoints = run_dir / "checkpoints"


def say(text: str) -> None:
    os.write(1, f"rank {RANK}: {text}\n".encode())  # in one write: ranks share the log


def saved() -> int:
    return max((int(each.parent.name[5:]) for each in checkpoints.glob("iter_*/manifest.json")), default=0)


def leave(code: int, step: int) -> None:
    if RANK == "0":
        text = json.dumps({"exit_code": code, "iteration": step, "time": time.time()})
        (run_dir / "last_exit.json").write_text(text)
    say(f"exit {code} after {len(received)} signals at step {step}")
    sys.exit(code)


start = step = saved()
where = " ".join(os.environ[name] for name in ("SLURMD_NODENAME", "SLURM_LOCALID", "SLURM_NTASKS"))
say(f"start {os.environ.get('SLURM_RESTART_COUNT', '0')} at step {start} on {where}")
rank, _, code = os.environ.get("FAKE_EXIT", "").partition(":")
if rank == RANK:
    leave(int(code), step)
if os.environ.get("FAKE_KILL") == RANK:
    os.kill(os.getpid(), signal.SIGKILL)
while step < int(os.environ.get("FAKE_STEPS", "400")) and not received:
    time.sleep(0.05)
    step += 1
if RANK == "0" and os.environ.get("FAKE_SAVES", "1") == "1":
    time.sleep(0.5)  # the peers have left by now: this save must not be cut off
    (checkpoints / f"iter_{step:07d}").mkdir(parents=True, exist_ok=True)
    (checkpoints / f"iter_{step:07d}" / "manifest.json").write_text("{}")
leave(75 if received else 0, step)
