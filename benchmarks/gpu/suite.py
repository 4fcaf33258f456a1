"""Measure what is not yet measured, in order of importance, within a time budget: one command, given again until done.

    python benchmarks/gpu/suite.py --output DIR --minutes 9 [--only '8l-*' stall-sync] [--rehearse] [--ahead]
        [--retry-failed] [--text JSONL --tokenizer FOLDER] [--unpack FILE.tar.gz] [--pack FILE.tar.gz] [--commit HASH]

Each case is a process of its own with a time limit of its own; one that fails leaves a record with its error. A case is
begun only if it will likely end within the budget; one that does not is begun anew by the next call. Results are
``DIR/NAME.json``, what was printed is ``DIR/logs/NAME.txt``; with ``--pack`` both are in one small file after every
case, which ``--unpack`` brings to the next machine. Ctrl-C and SIGTERM end the case under way and leave what is done.
Exit code 0; 1 where a case has failed.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cases import CASES, MODULES, Case
from process import Options, command_of, last_lines, new_record, without_folders
from record import Record, read_records
from report import tables

HERE = Path(__file__).resolve().parent
KILLED_AFTER = 10.0
"""Seconds between SIGTERM and SIGKILL."""
LIKELY = 0.6
"""A case is begun where at least this share of its time limit is left: most need a third of it."""
OUT_OF_TIME = "the budget has ended"
QUIET = ("host", "loader", "machine", "stall")
"""Kinds whose point is the time of the host or a ceiling: nothing is imported beside them."""
QUIET_CASES = ("8l-bf16",)
"""Nor beside these: loader and loggers are held to 0.5 % of its step."""
LOG_HEAD, LOG_TAIL = 8_000, 24_000
"""Bytes kept of a log: its begin and its end."""
PACKED = 4_000_000
"""Bytes above which a file stays out of the pack: it is no result."""


@dataclass
class Suite:
    """What a call of the suite does."""

    options: Options
    minutes: float
    pack: Path | None
    ahead: bool = False
    """Import what the next case needs while one is measured: ten seconds less for each."""
    child: subprocess.Popen[bytes] | None = None
    waiting: tuple[str, subprocess.Popen[bytes]] | None = None
    stopped: bool = False

    def left(self, begun: float) -> float:
        """Minutes of the budget that are left."""
        return self.minutes - (time.monotonic() - begun) / 60

    def run(self, cases: Iterable[Case]) -> list[Record]:
        """Each case in turn; a line for each. Returns their records."""
        begun, done, queue = time.monotonic(), [], list(cases)
        (self.options.output / "logs").mkdir(parents=True, exist_ok=True)
        for index, case in enumerate(queue):
            if self.stopped:
                break
            left = self.left(begun)
            if left < LIKELY * case.minutes:
                print(
                    f"{case.name:28} not begun: {left:.1f} of its {case.minutes:g} minutes are left",
                    flush=True,
                )
                continue
            started = time.monotonic()
            record = self.one(case, min(left, case.minutes), queue[index + 1 : index + 2])
            words = "stopped: it will be begun anew" if record is None else in_words(record)
            print(f"{case.name:28} {time.monotonic() - started:6.1f} s  {words}", flush=True)
            if record is not None:
                done.append(record)
                self.keep()
        if self.waiting is not None:
            end(self.waiting[1])
        return done

    def keep(self) -> None:
        """The tables of what there is by now; and everything in one file, where asked."""
        folder = self.options.output
        (folder / "tables.md").write_text(tables(read_records(folder)) + "\n")
        if self.pack is not None:
            pack(folder, self.pack)

    def one(self, case: Case, minutes: float, following: Sequence[Case] = ()) -> Record | None:
        """Run a case to its end or its time limit; its record, with an error where it left none of its own. None where
        it was stopped before it left one, by a signal or because only so many ``minutes`` were left.

        A record is written whole, as the last that a case does: one that is there counts, however the process ended.
        """
        folder = self.options.output
        result = folder / f"{case.name}.json"
        result.unlink(missing_ok=True)
        self.child = self.taken(case)
        quiet = case.kind in QUIET or case.name in QUIET_CASES
        for other in following if self.ahead and not quiet else ():
            self.waiting = other.name, self.start(other)
        problem = self.wait(case, minutes)
        text = trimmed(folder / "logs" / f"{case.name}.txt", folder)
        shutil.rmtree(
            folder / "runs" / case.name, ignore_errors=True
        )  # a checkpoint of tens of GB may lie there
        if not result.exists():
            if self.stopped or problem == OUT_OF_TIME:
                return None
            error = f"{last_lines(text, folder)}\n{problem or 'left no record'}"
            new_record(case, self.options, error=error).write(folder)
        return read_records(folder)[case.name]

    def start(self, case: Case) -> subprocess.Popen[bytes]:
        """The process of a case; with ``ahead`` it imports what it needs and then waits for a line."""
        folder, options = self.options.output, self.options
        command = [
            sys.executable,
            str(HERE / f"{MODULES[case.kind]}.py"),
            "--case",
            case.name,
            "--output",
            str(folder),
        ]
        command += ["--rehearse"] * options.rehearse + ["--wait"] * self.ahead
        if MODULES[case.kind] == "ours":
            for name, value in (("--text", options.text), ("--tokenizer", options.tokenizer)):
                command += [name, str(value)] if value is not None else []
        variables = {**os.environ, "PYTHONUNBUFFERED": "1", **dict(case.environment)}
        with open(folder / "logs" / f"{case.name}.txt", "wb") as out:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=variables,
                start_new_session=True,
            )

    def taken(self, case: Case) -> subprocess.Popen[bytes]:
        """The case's process, begun now: the one that waits, where it is this case's, or a new one."""
        waiting, self.waiting = self.waiting, None
        if waiting is not None and waiting[0] != case.name:
            end(waiting[1])
            waiting = None
        child = self.start(case) if waiting is None else waiting[1]
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already: its log says why
            child.stdin.write(b"begin\n")
            child.stdin.close()
        return child

    def wait(self, case: Case, minutes: float) -> str | None:
        """Wait for the child; what went wrong with it from outside, None where it ended by itself."""
        assert self.child is not None
        try:
            self.child.wait(minutes * 60)
            return f"killed by signal {-self.child.returncode}" if self.child.returncode < 0 else None
        except subprocess.TimeoutExpired:
            limit = f"ended after its limit of {case.minutes:g} minutes"
            return OUT_OF_TIME if minutes < case.minutes else limit
        finally:
            child, self.child = self.child, None
            end(child)

    def stop(self, number: int, frame: Any) -> None:
        """On a signal: no further case, and the one under way is ended."""
        self.stopped = True
        if self.child is not None:
            send(self.child.pid, signal.SIGTERM)


def end(child: subprocess.Popen[bytes]) -> None:
    """End a child with all that it started (its own process group): nothing may hold the GPU after it."""
    send(child.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(KILLED_AFTER)
    send(child.pid, signal.SIGKILL)
    child.wait()
    if child.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()


def send(group: int, number: int) -> None:
    """A signal to a process group of ours, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def in_words(record: Record) -> str:
    """The line of a case that has ended."""
    if record.error:
        return "FAILED: " + record.error.splitlines()[-1][:110]
    if record.tokens_per_second is None or record.model_flops_per_second is None:
        return f"ok: {len(record.found)} found"
    rate, memory = record.model_flops_per_second / 1e12, record.peak_allocated_bytes
    words = f"{record.tokens_per_second:,.0f} tokens/s, {rate:,.1f} TFLOP/s"
    return words + (f", {memory / 2**30:.1f} GiB" if memory else "")


def trimmed(log: Path, folder: Path) -> str:
    """The log's text without this machine's folders; the file is cut to its begin and its end where it is long."""
    data = log.read_bytes()
    if len(data) > LOG_HEAD + LOG_TAIL:
        data = data[:LOG_HEAD] + b"\n[... cut ...]\n" + data[-LOG_TAIL:]
    text = without_folders(data.decode(errors="replace"), folder)
    log.write_text(text)
    return text


def pack(folder: Path, target: Path) -> None:
    """Records, logs and what else small a case has left in ``folder`` itself, in one file."""
    temporary = target.with_name(target.name + ".tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(temporary, "w:gz") as out:
        for path in sorted([*folder.glob("*.*"), *folder.glob("logs/*")]):
            if path.is_file() and path.stat().st_size <= PACKED:
                out.add(path, path.relative_to(folder).as_posix())
    temporary.replace(target)


def unpack(source: Path, folder: Path) -> None:
    """What :func:`pack` has packed; what lies there already stays."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(source) as packed:
        for member in packed.getmembers():
            if not (folder / member.name).exists():
                packed.extract(member, folder, filter="data")


def chosen(only: Sequence[str], done: dict[str, Record], retry_failed: bool) -> list[Case]:
    """The cases that match a pattern and have no record yet (or, asked for, only one with an error)."""
    names = [case.name for case in CASES]
    for pattern in only:
        if not fnmatch.filter(names, pattern):
            raise SystemExit(f"--only {pattern}: no such case; there are {', '.join(names)}")
    return [
        case
        for case in CASES
        if (not only or any(fnmatch.fnmatch(case.name, pattern) for pattern in only))
        and (case.name not in done or (retry_failed and done[case.name].error))
    ]


def fits(case: Case, gib: float | None) -> bool:
    """Whether the GPU is large enough for a case; True where its size is not known."""
    return gib is None or case.needs_gib <= gib


def gpu_gib() -> float | None:
    """Memory of the GPU as the driver tells it, None where there is none."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        return float(done.stdout.split()[0]) / 1024
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        return None


def main(argv: list[str] | None = None) -> int:
    """Measure, print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--minutes", type=float, default=9.0, help="budget of this call")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="PATTERN", help="names of cases, * and ? allowed"
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU platform")
    parser.add_argument(
        "--retry-failed", action="store_true", help="also what has only a record of its failure"
    )
    parser.add_argument("--ahead", action="store_true", help="import for the next case while one is measured")
    parser.add_argument("--list", action="store_true", help="print what would be measured, and end")
    parser.add_argument("--text", type=Path, help="JSONL of real text for the 8B runs")
    parser.add_argument("--tokenizer", type=Path, help="folder of its tokenizer")
    parser.add_argument("--pack", type=Path, metavar="FILE.tar.gz")
    parser.add_argument("--unpack", type=Path, metavar="FILE.tar.gz", help="results to go on from")
    parser.add_argument("--commit", help="of the checkout, where git does not know it")
    given = parser.parse_args(argv)
    if given.commit:
        os.environ["MEASURED_COMMIT"] = given.commit
    paths = [path.resolve() if path is not None else None for path in (given.text, given.tokenizer)]
    options = Options(given.output.resolve(), given.rehearse, *paths)
    if given.unpack is not None:
        unpack(given.unpack, options.output)
    cases = chosen(given.only, read_records(options.output), given.retry_failed)
    gib = None if given.rehearse else gpu_gib()
    for case in cases:
        if given.list or not fits(case, gib):
            print(
                f"{case.name:28} {command_of(case, options)}"
                if given.list
                else f"{case.name:28} needs {case.needs_gib} GiB"
            )
    if given.list:
        return 0
    suite = Suite(options, given.minutes, given.pack, given.ahead)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, suite.stop)
    done = suite.run(case for case in cases if fits(case, gib))
    suite.keep()
    print((options.output / "tables.md").read_text())
    return 1 if any(record.error for record in done) else 0


if __name__ == "__main__":
    sys.exit(main())
