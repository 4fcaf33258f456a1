"""A real, private Slurm on this machine: munged, slurmctld and several ``slurmd -N nX`` with made-up hardware.

Every daemon is started by us with its own configuration, sockets and free ports inside one folder, and is
ended by its process number; a Slurm that the machine may already run is not touched. Each node has its own
hostname and its own /etc/hosts (``unshare -m -u``), so that ``scontrol show hostnames`` gives names that
resolve, as on a cluster. CPUs, memory and GPUs are invented: what is tested is scheduling, signals, requeue
and the start of ranks, never the confinement of resources.

Debian and Ubuntu: ``apt-get install --no-install-recommends slurm-wlm munge``.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "unshare")
FINAL_STATES = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"}

# cred_expire=5: a requeued job waits for its credential to expire, which takes 121 s by default.
# linuxproc: pgid tracking would leak the children of a cancelled job that called setsid.
SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
EnforcePartLimits=ALL
ReturnToService=2
JobRequeue=1
KillWait={kill_wait}
SlurmdTimeout=10
SlurmctldTimeout=30
BatchStartTimeout=10
UnkillableStepTimeout=20
DefMemPerCPU=100
MinJobAge=3600
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
"""
NODE_CONF = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=192 Boards=1 SocketsPerBoard=2"
    " CoresPerSocket=96 ThreadsPerCore=1 RealMemory=2000000 Gres=gpu:h100:8 State=UNKNOWN\n"
)
PARTITION_CONF = (
    "PartitionName=batch Nodes={nodes} Default=YES DefaultTime=00:10:00 MaxTime=INFINITE State=UP\n"
)


def missing() -> str | None:
    """Why no cluster can be started here, or None where one can."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if absent:
        return f"Slurm is not installed ({', '.join(absent)} not found): apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "a private Slurm with its own host names needs root"
    probe = ["unshare", "-m", "-u", "--", "sh", "-c", "hostname probe"]
    if subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        return "unshare -m -u is refused here (needs CAP_SYS_ADMIN)"
    return None


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at this moment; all held open together so that none comes twice."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_until(condition: Callable[[], object], what: str, timeout: float, interval: float = 0.1) -> None:
    """Poll until ``condition()`` is true; AssertionError naming ``what`` otherwise."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:.0f} s: {what}")
        time.sleep(interval)


class Cluster:
    """``with Cluster(folder) as cluster:`` brings it up (about 1 s) and down (about 4 s) again.

    ``kill_wait`` is Slurm's grace in seconds between SIGTERM and SIGKILL.
    """

    def __init__(self, folder: Path, num_nodes: int = 2, kill_wait: int = 5) -> None:
        self.folder = folder.resolve()
        self.nodes = [f"n{index + 1}" for index in range(num_nodes)]
        self.kill_wait = kill_wait
        self._daemons: list[subprocess.Popen[bytes]] = []
        keep = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH"))}
        keep["PATH"] = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
        self.env = {**keep, "SLURM_CONF": str(self.folder / "slurm.conf")}
        """Environment for clients (and for programs under test that call them)."""

    # -- up and down ---------------------------------------------------------------------------------------

    def __enter__(self) -> Cluster:
        try:
            self._configure()
            munge = self.folder / "munge"
            # The socket folder is 0755 as any user may authenticate; the key itself is 0400.
            self._daemon(
                "munged", "munged", "--foreground", "--force", f"--socket={munge}/munge.sock",
                f"--key-file={munge}/munge.key", f"--pid-file={munge}/munged.pid",
                f"--log-file={self.folder}/log/munged.log", f"--seed-file={munge}/seed",
            )  # fmt: skip
            self._wait_up(lambda: (munge / "munge.sock").exists(), "munged")
            self._daemon("slurmctld", "slurmctld", "-D", "-i", "-f", self.env["SLURM_CONF"])
            for node in self.nodes:
                inside = 'mount --bind "$1" /etc/hosts && hostname "$2" && exec slurmd -D -N "$2" -f "$3"'
                self._daemon(
                    f"slurmd.{node}", "unshare", "-m", "-u", "--", "sh", "-c", inside, "sh",
                    str(self.folder / "hosts"), node, self.env["SLURM_CONF"],
                )  # fmt: skip
            self._wait_up(lambda: "is UP" in self.client("scontrol", "ping", check=False), "slurmctld")
            idle = ("sinfo", "-h", "-N", "-t", "idle", "-o", "%N")
            self._wait_up(lambda: len(self.client(*idle).split()) == len(self.nodes), "all nodes idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Cancel everything, shut the daemons down, and end by number what is left of them."""
        if len(self._daemons) > 1 and self._daemons[1].poll() is None:  # clients hang on a dead slurmctld
            self.client("scancel", "--full", "--signal=KILL", *self._jobs(), check=False)
            self.client("scancel", *self._jobs(), check=False)
            with contextlib.suppress(AssertionError):
                wait_until(lambda: not self._jobs(), "no job left", 20)
            self.client("scontrol", "shutdown", check=False)
        # munged was started first and goes last, as the others authenticate with it to shut down.
        for daemon in reversed(self._daemons):
            for grace, number in ((5.0, signal.SIGTERM), (3.0, signal.SIGKILL), (3.0, None)):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    daemon.wait(grace if daemon is not self._daemons[0] or number is None else 0)
                    break
                if number is not None:
                    daemon.send_signal(number)
        self._daemons.clear()

    def _configure(self) -> None:
        for name in ("state", "spool", "log", "run", "munge", "dev"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for each in (self.folder, self.folder / "munge"):
            each.chmod(0o755)
        key = self.folder / "munge" / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        host = socket.gethostname().split(".")[0]
        ports = free_ports(len(self.nodes) + 1)
        text = SLURM_CONF.format(host=host, port=ports[0], folder=self.folder, kill_wait=self.kill_wait)
        for node, port in zip(self.nodes, ports[1:], strict=True):
            (self.folder / "spool" / node).mkdir(exist_ok=True)
            text += NODE_CONF.format(name=node, host=host, port=port)
        text += PARTITION_CONF.format(nodes=",".join(self.nodes))
        (self.folder / "slurm.conf").write_text(text)
        devices = self.folder / "dev"
        for index in range(8):  # twins of /dev/null stand in for GPUs
            os.mknod(devices / f"nvidia{index}", 0o20666, os.makedev(1, 3))
        gres = f"NodeName={','.join(self.nodes)} Name=gpu Type=h100 File={devices}/nvidia[0-7]\n"
        (self.folder / "gres.conf").write_text(gres)
        names = "".join(f"127.0.0.1 {node}\n" for node in self.nodes)
        (self.folder / "hosts").write_text(Path("/etc/hosts").read_text() + names)

    def _daemon(self, name: str, *command: str) -> None:
        with open(self.folder / "log" / f"{name}.out", "wb") as out:
            self._daemons.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=self.env,
                    start_new_session=True,
                )
            )

    def _wait_up(self, condition: Callable[[], object], what: str) -> None:
        def ready_or_dead() -> bool:
            for daemon in self._daemons:
                if daemon.poll() is not None:
                    raise AssertionError(f"{daemon.args!r} ended while waiting for {what}: {self.logs()}")
            return bool(condition())

        wait_until(ready_or_dead, what, 30, interval=0.05)

    def logs(self, lines: int = 15) -> str:
        """The last lines of every daemon's log, for a failed test."""
        tails = []
        for file in sorted((self.folder / "log").glob("*")):
            tails += [f"--- {file.name}", *file.read_text(errors="replace").splitlines()[-lines:]]
        return "\n".join(tails)

    # -- use -----------------------------------------------------------------------------------------------

    def client(self, *command: str, check: bool = True, timeout: float = 60) -> str:
        """Standard output of a Slurm command; AssertionError with its stderr where it fails."""
        done = subprocess.run(
            command, env=self.env, capture_output=True, text=True, timeout=timeout, check=False
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{command}: exit {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def _jobs(self) -> list[str]:
        return self.client("squeue", "-h", "-o", "%A", check=False).split()

    def submit(self, *arguments: str) -> int:
        """``sbatch`` with these arguments; the job's number."""
        return int(self.client("sbatch", "--parsable", *arguments).split(";")[0])

    def job(self, job: int) -> dict[str, str]:
        """What ``scontrol show job`` says, by field (JobState, Reason, Restarts, ExitCode, ...)."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.client("scontrol", "show", "job", "-o", str(job))))

    def wait_state(self, job: int, states: str | Iterable[str], timeout: float = 60) -> str:
        """Wait until the job is in one of ``states``; returns it. Fails at once in another final state."""
        wanted = {states} if isinstance(states, str) else set(states)
        state = ""

        def arrived() -> bool:
            nonlocal state
            state = self.job(job)["JobState"]
            if state in FINAL_STATES - wanted:
                raise AssertionError(f"job {job} is {state}, not {sorted(wanted)}: {self.job(job)}")
            return state in wanted

        wait_until(arrived, f"job {job} {sorted(wanted)}", timeout)
        return state

    def wait_until_log(self, path: Path, text: str, count: int = 1, timeout: float = 60) -> None:
        """Wait until the file holds ``text`` at least ``count`` times."""

        def found() -> bool:
            return path.exists() and path.read_text(errors="replace").count(text) >= count

        try:
            wait_until(found, f"{text!r} {count} times in {path}", timeout)
        except AssertionError as error:
            content = path.read_text(errors="replace")[-3000:] if path.exists() else "(no file)"
            raise AssertionError(f"{error}\n{content}") from None

    def release(self, job: int, restarts: int = 1, timeout: float = 60) -> None:
        """Wait until the job was requeued for the ``restarts``-th time, and let it start now.

        Slurm would hold it for a while (BeginTime).
        """

        def requeued() -> bool:
            fields = self.job(job)
            return (fields["JobState"], fields["Restarts"]) == ("PENDING", str(restarts))

        wait_until(requeued, f"job {job} requeued {restarts} times", timeout)
        time.sleep(2)  # in the second of its end slurmd refuses the job: "already killed, do not launch"
        self.client("scontrol", "update", f"jobid={job}", "starttime=now")
