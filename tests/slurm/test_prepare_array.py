"""``launch/prepare.py`` on a real Slurm: a corpus of four shards over two nodes, and what interrupts it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import Cluster, wait_until

REPOSITORY = Path(__file__).resolve().parents[2]
SHARDS = 4

# Python on the nodes: for the shard and the start that a test names in a file, something else happens first.
PYTHON = """#!/bin/sh
trouble={folder}/trouble-${{SLURM_ARRAY_TASK_ID:-merge}}
[ "$SLURM_CPUS_PER_TASK" = 1 ] || exit 99
if [ -e "$trouble" ]; then
    what=$(cat "$trouble"); rm "$trouble"
    echo "trouble: $what"
    [ "$what" = kill ] && kill -9 $$
    [ "$what" = hang ] && sleep 60
fi
exec {python} "$@"
"""


class Corpus:
    """A source of several files, and the commands a user gives for it."""

    def __init__(self, cluster: Cluster, folder: Path, tokenizer: Path, name: str = "en") -> None:
        self.cluster, self.folder, self.tokenizer = cluster, folder, tokenizer
        self.inputs, self.prefix = folder / f"corpus-{name}", folder / "data" / name
        self.inputs.mkdir(parents=True)
        for number in range(3):
            lines = [
                json.dumps({"text": f"Document {n} of file {number} in {name}: " + "words and more words. " * (n % 40)})
                for n in range(200)
            ]  # fmt: skip
            (self.inputs / f"part-{number}.jsonl").write_text("\n".join(lines) + "\n")
        self.python = folder / "python"
        self.python.write_text(PYTHON.format(folder=folder, python=sys.executable))
        self.python.chmod(0o755)

    def tool(self, *arguments: object) -> None:
        """``tools/prepare_data.py``, here and now."""
        command = [sys.executable, str(REPOSITORY / "tools" / "prepare_data.py"), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr

    def in_one_process(self, *more: object) -> dict[str, str]:
        """What one process without shards writes."""
        self.tool(
            "--input",
            self.inputs,
            "--tokenizer",
            self.tokenizer,
            "--output-prefix",
            self.folder / "whole",
            *more,
        )
        return digests(self.folder / "whole")

    def submit(self, *more: str) -> subprocess.CompletedProcess[str]:
        """``launch/prepare.py`` for this source."""
        command = ["--input", self.inputs, "--output-prefix", self.prefix, "--tokenizer", self.tokenizer]
        return prepare(
            self.cluster, *command, "--shards", SHARDS, "--python", self.python, "--time", "10", *more
        )

    def status(self) -> str:
        """What ``--status`` says."""
        return prepare(self.cluster, "--status", self.prefix).stdout

    def trouble(self, task: int | str, what: str) -> None:
        """The next start of this task is killed, or hangs."""
        (self.folder / f"trouble-{task}").write_text(what)

    def log(self, name: str) -> str:
        """The log of a shard or of the merge."""
        return (Path(f"{self.prefix}.slurm") / "logs" / f"{name}.log").read_text()

    def jobs(self) -> list[str]:
        """Numbers of the jobs in the queue, tasks apart."""
        return self.cluster.client("squeue", "-h", "-r", "-o", "%i %j").splitlines()

    def wait_over(self) -> None:
        """Until no job of this source is left."""
        wait_until(
            lambda: "jobs            none" in self.status() or "complete" in self.status(), "no job left", 90
        )
        wait_until(lambda: not self.jobs(), "an empty queue", 90)


def prepare(cluster: Cluster, *arguments: object) -> subprocess.CompletedProcess[str]:
    """``python launch/prepare.py`` with these arguments."""
    command = [sys.executable, str(REPOSITORY / "launch" / "prepare.py"), *map(str, arguments)]
    return subprocess.run(command, env=cluster.env, capture_output=True, text=True, check=False, timeout=60)


def digests(prefix: Path) -> dict[str, str]:
    """SHA-256 of a prepared prefix's token files."""
    return {
        name: hashlib.sha256(Path(f"{prefix}.{name}").read_bytes()).hexdigest() for name in ("bin", "idx")
    }


@pytest.fixture
def corpus(cluster: Cluster, tmp_path: Path, shared_data: Path) -> Corpus:
    """Three files of 200 documents."""
    return Corpus(cluster, tmp_path, shared_data / "stories260k")


def test_killed_and_requeued_tasks_then_only_what_is_missing(corpus: Corpus) -> None:
    corpus.trouble(1, "hang")
    corpus.trouble(2, "kill")
    first = corpus.submit("--sbatch-arg=--exclusive")  # a node for each task
    assert first.returncode == 0, first.stderr
    array = re.search(r"4 of 4 shards to make: array job (\d+), then merge job \d+", first.stdout)
    assert array, first.stdout

    # a second submission beside it is refused, and says which jobs
    refused = corpus.submit()
    assert refused.returncode == 73
    assert re.search(rf"not over: {array[1]} \(.*\), \d+ \(1 PENDING\)", refused.stderr), refused.stderr

    # one task is put back by Slurm (as after the loss of a node) and makes its shard at the second start
    log = Path(f"{corpus.prefix}.slurm/logs/shard-1.log")
    corpus.cluster.wait_until_log(log, "trouble: hang")
    task = corpus.cluster.client("squeue", "-h", "-j", f"{array[1]}_1", "-o", "%A").strip()
    corpus.cluster.client("scontrol", "requeue", task)
    corpus.cluster.release(int(task))
    corpus.wait_over()
    assert corpus.log("shard-1").count("start 1 on n") == corpus.log("shard-1").count("start 2 on n") == 1
    hosts = set(re.findall(r"start \d on (n\d)", "".join(corpus.log(f"shard-{n}") for n in range(SHARDS))))
    assert hosts == {"n1", "n2"}

    # the other task was killed for good: its shard is missing, the merge was taken out of the queue
    assert "3 of 4 finished; missing: 2" in corpus.status()
    assert "none; the same command submits what is missing" in corpus.status()
    assert not corpus.prefix.with_suffix(".json").exists()
    stamps = {n: os.stat(f"{corpus.prefix}.shard-{n:05d}-of-00004.bin").st_mtime_ns for n in (0, 1, 3)}
    second = corpus.submit("--keep-shards")
    assert "1 of 4 shards to make" in second.stdout, second.stderr
    corpus.wait_over()
    assert {
        n: os.stat(f"{corpus.prefix}.shard-{n:05d}-of-00004.bin").st_mtime_ns for n in (0, 1, 3)
    } == stamps
    assert corpus.log("shard-0").count("] start ") == 1

    assert digests(corpus.prefix) == corpus.in_one_process()
    corpus.tool("--verify", corpus.prefix)
    assert "complete: 600 documents" in corpus.status()

    # all is done: nothing more is submitted
    third = corpus.submit()
    assert third.returncode == 0 and "complete; nothing to submit" in third.stdout
    assert not corpus.jobs()
    other = corpus.submit("--min-tokens", "50")
    assert other.returncode == 73 and "exists, made with other options" in other.stderr


def test_merge_alone_is_submitted_again(corpus: Corpus) -> None:
    fraction = ["--valid-fraction", "0.2"]
    options = [*fraction, "--valid-suffix", "_valid"]
    corpus.trouble("merge", "kill")
    assert corpus.submit(*options).returncode == 0
    corpus.wait_over()
    assert "4 of 4 finished; not merged" in corpus.status()
    assert re.search(r"^merge +trouble: kill$", corpus.status(), re.M)
    changed = corpus.submit(*options, "--min-tokens", "50")
    assert changed.returncode == 73 and "shards made with other options stand" in changed.stderr
    again = corpus.submit(*options, "--workers", "2")  # which changes no byte
    assert re.search(r"all 4 shards are finished; merge job \d+ submitted", again.stdout), again.stderr
    corpus.wait_over()
    assert digests(corpus.prefix) == corpus.in_one_process(
        *fraction, "--valid-prefix", corpus.folder / "whole_valid"
    )
    assert digests(corpus.folder / "data" / "en_valid") == digests(corpus.folder / "whole_valid")
    assert not list(corpus.prefix.parent.glob("*.shard-*"))


def test_several_sources_and_what_a_shell_would_run(
    cluster: Cluster, tmp_path: Path, shared_data: Path
) -> None:
    evil = "a $(touch CANARY) ; `touch CANARY` & '\" # %a ${HOME} *"
    corpora = [Corpus(cluster, tmp_path / name, shared_data / "stories260k", name) for name in ("zh", evil)]
    jobs = [part for each in corpora for part in ("--job", each.inputs, each.prefix)]
    options = ["--tokenizer", corpora[0].tokenizer, "--shards", 2, "--python", corpora[0].python]
    more = [f"--sbatch-arg=--comment={evil}", "--setup-line", "echo set up", "--max-running", 1]
    done = prepare(cluster, *jobs, *options, *more)
    assert done.returncode == 0, done.stderr
    for each in corpora:
        each.wait_over()
        assert digests(each.prefix) == each.in_one_process()
        assert "set up" in each.log("shard-0")
    left = [one.name for folder in (tmp_path, Path.cwd(), *tmp_path.iterdir()) for one in folder.iterdir()]
    assert "CANARY" not in left


def test_bad_input_is_said_by_status(corpus: Corpus) -> None:
    with open(corpus.inputs / "part-2.jsonl", "a") as stream:
        stream.write('{"text": "cut off')
    assert corpus.submit().returncode == 0
    corpus.wait_over()
    status = corpus.status()
    assert "3 of 4 finished; missing: 3" in status
    assert re.search(r"shard-3 +error: .*part-2\.jsonl:201:", status), status

    # the line is put right: what was made from the file as it was is not mixed with what is made now
    text = (corpus.inputs / "part-2.jsonl").read_text()
    (corpus.inputs / "part-2.jsonl").write_text(text + ' and put right"}\n')
    refused = corpus.submit()
    assert refused.returncode == 73 and "shards made with other files stand" in refused.stderr
    for file in corpus.prefix.parent.glob("en.shard-*"):
        file.unlink()
    assert "4 of 4 shards to make" in corpus.submit().stdout
    corpus.wait_over()
    assert digests(corpus.prefix) == corpus.in_one_process()
