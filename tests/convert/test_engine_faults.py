"""Killed at any moment, out of disk, asked to stop, started twice: absent or complete, and then the same bytes."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from engine_toys import PLANS, contents, make_source, opened, several_files, shards

from megatron_syne.convert import engine, journal, tiles
from megatron_syne.convert.engine import convert
from megatron_syne.convert.journal import partial_folder
from megatron_syne.errors import CannotCreate, IOFault, StoppedCleanly

HERE = Path(__file__).parent
PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from engine_toys import PLANS, opened
from megatron_syne.convert.engine import convert
from megatron_syne.errors import run_cli

source, plan, out = sys.argv[1:]

def main():
    weights = opened(Path(source))
    print("start", flush=True)
    convert(weights, PLANS[plan](weights), Path(out), jobs=2)

sys.exit(run_cli(main))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("faults") / "source")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 MB: long enough under way to be met there."""
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "vocab_size": 8000}
    return make_source(tmp_path_factory.mktemp("faults") / "large", **sizes)


def start(source: Path, plan: str, out: Path, **options: Any) -> subprocess.Popen[str]:
    """The conversion in a process of its own, about to begin, and open to ctrl-C: what a shell starts in the
    background ignores it, and so does all that comes of that."""
    program = PROGRAM.format(here=str(HERE))
    arguments = [sys.executable, "-c", program, str(source), plan, str(out)]
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **{"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options},
    )
    assert process.stdout is not None and process.stdout.readline() == "start\n"
    return process


def die_at(step: int, act: Callable[[], object]) -> bool:
    """Do ``act`` in a child process that is killed at its ``step``-th call to the system; whether it was."""
    child = os.fork()
    if child == 0:
        try:
            calls = 0

            def counted(real: Callable[..., Any]) -> Callable[..., Any]:
                def call(*arguments: Any, **options: Any) -> Any:
                    nonlocal calls
                    calls += 1
                    if calls == step:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*arguments, **options)

                return call

            for name in (
                "open",
                "pwrite",
                "write",
                "fsync",
                "ftruncate",
                "rename",
                "mkdir",
                "unlink",
                "rmdir",
            ):
                setattr(os, name, counted(getattr(os, name)))
            act()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "failed in another way"
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_killed_at_every_call_to_the_system(source: Path, tmp_path: Path, overwrite: bool) -> None:
    """One thread, so that the calls have an order. After each death the next run is killed one call later."""
    weights, out = opened(source), tmp_path / "out"
    convert(weights, shards(weights), tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    old: dict[str, bytes] = {}
    if overwrite:
        convert(weights, several_files(weights), out)
        old = contents(out)
    step = 1
    while die_at(step, lambda: convert(weights, shards(weights), out, jobs=1, overwrite=overwrite)):
        if out.exists():
            found = contents(out)
            assert found in (old, expected), f"half-made at call {step}"
            if found == expected and not overwrite:
                with pytest.raises(CannotCreate, match="exists already"):
                    convert(weights, shards(weights), out)
                break
        step += 1
    assert step > 50, "it did die"
    convert(weights, shards(weights), out, overwrite=True)
    assert contents(out) == expected
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]


def test_killed_once_and_run_again(source: Path, tmp_path: Path) -> None:
    """From the beginning each time, then to the end."""
    weights, out = opened(source), tmp_path / "out"
    convert(weights, shards(weights), tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    step = 1
    while die_at(step, lambda: convert(weights, shards(weights), out, jobs=1)):
        convert(weights, shards(weights), out, overwrite=True)
        assert contents(out) == expected, f"after a death at call {step}"
        assert sorted(os.listdir(tmp_path)) == ["out", "whole"]
        subprocess.run(["rm", "-r", str(out)], check=True)
        step += 3
    assert step > 100


@pytest.mark.parametrize("plan", PLANS)
def test_killed_at_any_time(large: Path, tmp_path: Path, plan: str) -> None:
    """From outside, several threads, wherever they are."""
    weights = opened(large)
    convert(weights, PLANS[plan](weights), tmp_path / "whole")
    moments, kept = random.Random(3), 0
    for _ in range(8):
        process = start(large, plan, tmp_path / "out")
        time.sleep(moments.uniform(0.0, 0.12))
        process.kill()
        process.communicate()
        if (tmp_path / "out").exists():
            break
        noted = partial_folder(tmp_path / "out") / journal.JOURNAL
        kept = max(kept, len(noted.read_text().splitlines())) if noted.exists() else kept
    else:
        convert(weights, PLANS[plan](weights), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    with pytest.raises(CannotCreate, match="exists already"):
        convert(weights, PLANS[plan](weights), tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]


def stop_midway(source: Path, out: Path) -> None:
    """Leave a partial conversion with about half of the tensors."""

    def interrupt(real: Callable[..., Any]) -> Callable[..., Any]:
        calls = 0

        def call(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > 12:
                raise KeyboardInterrupt
            return real(*arguments)

        return call

    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(StoppedCleanly, match="the same command goes on"),
    ):
        patch.setattr(engine, "write_tensor", interrupt(engine.write_tensor))
        convert(opened(source), shards(opened(source)), out, jobs=1)


def written_by(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Convert; the tensors that were really written."""
    names = []
    real = engine.write_tensor

    def call(weights: Any, target: Any, name: str, *rest: Any) -> Any:
        names.append(name)
        return real(weights, target, name, *rest)

    monkeypatch.setattr(engine, "write_tensor", call)
    convert(opened(source), shards(opened(source)), out)
    return names


def test_what_is_finished_is_not_written_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = opened(source)
    convert(weights, shards(weights), tmp_path / "whole")
    stop_midway(source, tmp_path / "out")
    names = written_by(source, tmp_path / "out", monkeypatch)
    assert len(names) == len(weights.shapes) - 12
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_damage_to_what_was_finished_is_found(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a power failure: bytes that were journalled and never came to the disk, a file cut short."""
    weights, out = opened(source), tmp_path / "out"
    target = shards(weights)
    convert(weights, target, tmp_path / "whole")
    for damage in ("flip", "padding", "header", "short", "stranger", "journal"):
        stop_midway(source, out)
        folder = partial_folder(out)
        lines = (folder / journal.JOURNAL).read_text().splitlines()
        name = next(e["name"] for e in map(json.loads, lines) if e.get("kind") == "tensor")
        place = target.places[name][0]
        path = folder / journal.OUTPUT / place.file
        with path.open("r+b") as stream:
            if damage == "flip":
                stream.seek(place.offset)
                byte = stream.read(1)
                stream.seek(place.offset)
                stream.write(bytes([byte[0] ^ 1]))
            if damage == "header":
                stream.write(b"\xff" * 20)
            if damage == "short":
                stream.truncate(place.offset + 10)
        if damage == "padding":  # of the second rank's vocabulary
            for file in target.files:
                with (folder / journal.OUTPUT / file.path).open("r+b") as stream:
                    stream.seek(file.fixed[0][0] + len(file.fixed[0][1]) + 490 * 256)
                    stream.write(b"\xff" * 10)
        if damage == "stranger":
            (folder / journal.OUTPUT / "config.json").write_text("{}")
        if damage == "journal":
            with (folder / journal.JOURNAL).open("a") as stream_text:
                stream_text.write(
                    '[1]\n{"kind": "tensor", "name": "lm_head.weight", "hash": "00"}\n{"kind": '
                )
        names = written_by(source, out, monkeypatch)
        assert (name in names) == (damage in ("flip", "short")) or damage == "padding"
        assert contents(out) == contents(tmp_path / "whole"), damage
        subprocess.run(["rm", "-r", str(out)], check=True)


def test_another_conversion_starts_afresh(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of other weights under the same name: nothing of the first one's may be kept."""
    other = make_source(tmp_path / "source", vocab_size=900)
    stop_midway(source, tmp_path / "out")
    assert len(written_by(other, tmp_path / "out", monkeypatch)) == len(opened(other).shapes)
    weights = opened(other)
    convert(weights, shards(weights), tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_an_old_output_that_was_moved_aside_comes_back(source: Path, tmp_path: Path) -> None:
    """Killed between the two renames of an overwrite."""
    weights, out = opened(source), tmp_path / "out"
    convert(weights, several_files(weights), out)
    old = contents(out)
    child = os.fork()
    if child == 0:
        real = os.rename

        def rename(before: Path, after: Path) -> None:
            if after == out:
                os.kill(os.getpid(), signal.SIGKILL)
            real(before, after)

        os.rename = rename  # type: ignore[assignment]
        convert(weights, shards(weights), out, overwrite=True)
        os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert os.listdir(tmp_path) == [".out.partial"]
    with pytest.raises(CannotCreate, match="exists already"):
        convert(weights, shards(weights), out)
    assert contents(out) == old
    convert(weights, shards(weights), out, overwrite=True)
    convert(weights, shards(weights), tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]


def test_nothing_is_kept_that_the_disk_may_not_hold(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failed fsync the page cache shows bytes that the disk has lost."""

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(IOFault, match=r"Input/output error"):
            convert(opened(source), shards(opened(source)), tmp_path / "out")
    names = written_by(source, tmp_path / "out", monkeypatch)
    assert len(names) == len(opened(source).shapes)


def test_stopped_within_a_tensor(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With streams open and pages on their way."""
    monkeypatch.setattr(tiles, "TILE_BYTES", 4096)

    class Breaking(tiles.Stream):
        appended = 0

        def append(self, part: Any) -> None:
            type(self).appended += 1
            if self.appended == 30:
                raise OSError(errno.ENOSPC, "No space left on device")
            super().append(part)

    for jobs in (1, 3):
        with monkeypatch.context() as patch, pytest.raises(IOFault, match="No space left"):
            patch.setattr(tiles, "Stream", Breaking)
            convert(opened(source), shards(opened(source)), tmp_path / "out", jobs=jobs)
        Breaking.appended = 0
    convert(opened(source), shards(opened(source)), tmp_path / "out")
    convert(opened(source), shards(opened(source)), tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_more_files_than_a_process_may_open(source: Path, tmp_path: Path) -> None:
    weights = opened(source)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 5, hard))
    try:
        convert(weights, shards(weights), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop(large: Path, tmp_path: Path, number: signal.Signals) -> None:
    """75, one line that says what to do; the same command goes on."""
    weights, out = opened(large), tmp_path / "out"
    convert(weights, shards(weights), tmp_path / "whole")
    for _ in range(20):
        process = start(large, "shards", out)
        noted = partial_folder(out) / journal.JOURNAL
        while not noted.exists() and process.poll() is None:
            time.sleep(0.0005)
        for each in (signal.SIGSTOP, number, signal.SIGCONT):  # held: a busy machine leaves it no head start
            process.send_signal(each)
        _, text = process.communicate()
        if process.returncode == 75:
            break
        assert process.returncode == 0, text  # it was faster than the signal
        subprocess.run(["rm", "-r", str(out)], check=True)
    assert process.returncode == 75
    assert text.count("\n") == 1 and "interrupted" in text and "the same command goes on from there" in text
    assert not out.exists() and partial_folder(out).is_dir()
    assert start(large, "shards", out).wait() == 0
    assert contents(out) == contents(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]


def test_two_at_once(large: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = start(large, "shards", out)
    lock = partial_folder(out) / journal.LOCK
    while not (lock.exists() and lock.read_text()):
        assert first.poll() is None
        time.sleep(0.001)
    first.send_signal(signal.SIGSTOP)
    try:
        if not out.exists():
            with pytest.raises(CannotCreate, match=rf"pid {first.pid}\)"):
                convert(opened(large), shards(opened(large)), out)
    finally:
        first.send_signal(signal.SIGCONT)
    assert first.wait() == 0
    assert os.listdir(tmp_path) == ["out"]


def test_a_full_disk(
    large: Path, tmp_path: Path, small_disk: Callable[[str], AbstractContextManager[Path]]
) -> None:
    """A real small one: first too small for the plan, then filled by somebody else under way."""
    with small_disk("40m") as disk:
        weights = opened(large)
        target = shards(weights)
        with pytest.raises(IOFault, match=r"bytes are needed.*nothing was written"):
            convert(weights, target, disk / "out")
        assert os.listdir(disk) == []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "check_space", lambda *_: None)
            with pytest.raises(IOFault, match=r"No space left on device.*the same command goes on"):
                convert(weights, target, disk / "out")
        assert os.listdir(disk) == [".out.partial"]
        subprocess.run(["mount", "-o", "remount,size=80m", str(disk)], check=True)
        convert(weights, target, disk / "out")  # 40 MB more would not fit beside what is there already
        convert(weights, target, tmp_path / "whole")
        assert contents(disk / "out") == contents(tmp_path / "whole")
        assert os.listdir(disk) == ["out"]


def test_a_limit_on_file_sizes(large: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    process = start(large, "hf", tmp_path / "out", preexec_fn=limit)
    _, text = process.communicate()
    assert process.returncode == 74 and "File too large" in text and "Traceback" not in text
    assert os.listdir(tmp_path) == [".out.partial"]
    convert(opened(large), several_files(opened(large)), tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_that_may_not_be_written(source: Path, tmp_path: Path) -> None:
    """A disk that is mounted for reading alone: even root may not write there."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        with pytest.raises(CannotCreate, match="Read-only file system"):
            convert(opened(source), shards(opened(source)), disk / "out")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
