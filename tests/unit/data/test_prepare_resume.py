"""A preparation killed at any moment and started again gives the bytes of one that ran through."""

from __future__ import annotations

import errno
import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from prepared import many_texts, write_jsonl

from megatron_syne.data.documents.blocks import Block
from megatron_syne.data.preparation import prepare as room
from megatron_syne.data.preparation import workers
from megatron_syne.data.preparation.encode import encode_block
from megatron_syne.data.preparation.prepare import Job, prepare
from megatron_syne.errors import CannotCreate, DataError

RUN = """
import functools, json, sys
from megatron_syne.data.preparation import prepare as room
room.JOURNAL_SECONDS, room._BYTES_PER_WORKER, room._PACKED_PER_WORKER = 0.0, 1, 1
room.open_input = functools.partial(room.open_input, block_bytes=1 << 14)
from megatron_syne.errors import run_cli
job = room.Job(**json.loads(sys.argv[1]))
sys.exit(run_cli(lambda: room.prepare(job, say=lambda text: print(text, flush=True)) and 0))
"""


class Stop(Exception):
    """Stands for a kill: the files stay as a killed process leaves them."""


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture
def corpus(tmp_path: Path) -> list[str]:
    texts = many_texts(1200)
    texts[5:5] = ["", "x"]
    lines = [json.dumps({"text": text, "ppl": number / 3}).encode() for number, text in enumerate(texts)]
    lines[50:50] = lines[700:700] = [b'{"text": "malformed"', b'{"text": "y", "ppl": "z"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines[:500]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines[500:800]) + b"\n"))
    (tmp_path / "c.jsonl").write_bytes(b"\n".join(lines[800:]))
    return [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl")]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal entry behind each block of a few lines."""
    whole = room.open_input
    monkeypatch.setattr(room, "JOURNAL_SECONDS", 0.0)
    monkeypatch.setattr(room, "open_input", lambda *args, **named: whole(*args, **named, block_bytes=20_000))


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Make ``prepare`` end at a block; gives the list of lines at which the blocks encoded began."""

    def set_limit(blocks: int) -> list[int]:
        seen: list[int] = []

        def counting(block: Block, *rest: Any) -> Any:
            if len(seen) == blocks:
                raise Stop
            seen.append(block.first_line)
            return encode_block(block, *rest)

        monkeypatch.setattr(workers, "encode_block", counting)
        return seen

    return set_limit


@pytest.mark.parametrize("blocks", [1, 4, 9, 13])
def test_stopped_at_a_block_and_gone_on(
    tmp_path: Path,
    corpus: list[str],
    tokenizer_dir: Path,
    stop_after: Callable[[int], list[int]],
    small_blocks: None,
    blocks: int,
) -> None:
    job: dict[str, Any] = {"inputs": corpus, "tokenizer": tokenizer_dir, "on_error": "skip", "keep": ["ppl"]}

    def run(folder: str, said: list[str] | None = None) -> None:
        prefixes = {"output_prefix": tmp_path / folder / "x", "valid_prefix": tmp_path / folder / "v"}
        prepare(Job(**job, **prefixes), say=None if said is None else said.append)

    run("whole")
    stop_after(blocks)
    with pytest.raises(Stop):
        run("out")
    assert all(name.endswith(".tmp") for name in files(tmp_path / "out"))
    stop_after(10**6)
    # what came behind the last entry of the journal is not trusted
    for name in ("x.bin", "x.idx", "v.ppl.npy", "x.quarantine.jsonl", "x.journal"):
        with open(tmp_path / "out" / f"{name}.tmp", "ab") as stream:
            stream.write(b"half a ")
    said: list[str] = []
    run("out", said)
    assert len(said) == 1 and "going on where a killed run stopped" in said[0]
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_what_is_done_is_not_done_again(
    tmp_path: Path,
    corpus: list[str],
    tokenizer_dir: Path,
    stop_after: Callable[[int], list[int]],
    small_blocks: None,
) -> None:
    job: dict[str, Any] = {"inputs": corpus, "tokenizer": tokenizer_dir, "on_error": "skip"}
    every = stop_after(10**6)
    prepare(Job(**job, output_prefix=tmp_path / "whole" / "x"))
    first = stop_after(10)
    with pytest.raises(Stop):
        prepare(Job(**job, output_prefix=tmp_path / "out" / "x"))
    rest = stop_after(10**6)
    prepare(Job(**job, output_prefix=tmp_path / "out" / "x"))
    assert first + rest == every and len(rest) > 5


def test_blocks_of_one_line(
    tmp_path: Path,
    tokenizer_dir: Path,
    stop_after: Callable[[int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(room, "JOURNAL_SECONDS", 0.0)
    monkeypatch.setattr(room, "open_input", partial(room.open_input, block_bytes=1))
    source = write_jsonl(tmp_path / "a.jsonl", many_texts(7))
    for blocks in (1, 3, 7):
        stop_after(blocks if blocks < 7 else 10**6)
        with pytest.raises(Stop) if blocks < 7 else nullcontext():
            prepare(Job([source], tokenizer_dir, tmp_path / "out" / "x"))
    prepare(Job([source], tokenizer_dir, tmp_path / "whole" / "x"))
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("change", ["input", "options", "bin", "missing", "overwrite"])
def test_another_request_or_damage_starts_from_zero(
    tmp_path: Path,
    corpus: list[str],
    tokenizer_dir: Path,
    stop_after: Callable[[int], list[int]],
    small_blocks: None,
    change: str,
) -> None:
    out = tmp_path / "out"
    job: dict[str, Any] = {"inputs": corpus, "tokenizer": tokenizer_dir, "on_error": "skip"}
    stop_after(9)
    with pytest.raises(Stop):
        prepare(Job(**job, output_prefix=out / "x"))
    stop_after(10**6)
    if change == "input":
        Path(corpus[2]).write_bytes(Path(corpus[2]).read_bytes().replace(b"quick", b"quack"))
    elif change == "options":
        job["min_tokens"] = 40
    elif change == "bin":
        data = bytearray((out / "x.bin.tmp").read_bytes())
        data[7] ^= 1
        (out / "x.bin.tmp").write_bytes(data)
    elif change == "missing":
        (out / "x.idx.tmp").unlink()
    else:  # a result that appeared meanwhile is not overwritten, nor is the work done so far thrown away
        shutil.copy(corpus[0], out / "x.bin")
        before = files(out)
        with pytest.raises(CannotCreate):
            prepare(Job(**job, output_prefix=out / "x"))
        assert {name: data for name, data in files(out).items() if name in before and data} == {
            name: data for name, data in before.items() if data
        }
        return
    said: list[str] = []
    prepare(Job(**job, output_prefix=out / "x"), say=said.append)
    assert len(said) == 1 and "starting from zero" in said[0]
    prepare(Job(**job, output_prefix=tmp_path / "whole" / "x"))
    assert files(out) == files(tmp_path / "whole")


def test_a_malformed_line_leaves_nothing_even_behind_a_journal(
    tmp_path: Path, corpus: list[str], tokenizer_dir: Path, small_blocks: None
) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:51:"):
        prepare(Job(corpus, tokenizer_dir, tmp_path / "out" / "x"))
    assert not files(tmp_path / "out")


def test_a_full_disk_keeps_the_work_and_publishes_nothing(
    tmp_path: Path,
    corpus: list[str],
    tokenizer_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    small_blocks: None,
) -> None:
    job = Job(corpus, tokenizer_dir, tmp_path / "out" / "x", on_error="skip")
    real = os.fsync
    calls = 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        prepare(job)
    assert all(name.endswith(".tmp") for name in files(tmp_path / "out"))
    monkeypatch.setattr(os, "fsync", real)
    said: list[str] = []
    prepare(job, say=said.append)
    assert "going on" in said[0]
    prepare(Job(corpus, tokenizer_dir, tmp_path / "whole" / "x", on_error="skip"))
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_killed_between_the_renames(
    tmp_path: Path,
    corpus: list[str],
    tokenizer_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    small_blocks: None,
) -> None:
    job: dict[str, Any] = {"inputs": corpus, "tokenizer": tokenizer_dir, "on_error": "skip"}
    whole = tmp_path / "whole"
    prepare(Job(**job, output_prefix=whole / "x", valid_prefix=whole / "v"))
    real = os.replace
    for renames in (0, 1, 4, 5):
        out = tmp_path / f"out{renames}"
        count = 0

        def replace(source: str, target: str) -> None:
            nonlocal count
            count += 1
            if count > renames:  # noqa: B023
                raise Stop
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises(Stop):
            prepare(Job(**job, output_prefix=out / "x", valid_prefix=out / "v"))
        monkeypatch.setattr(os, "replace", real)
        prepare(Job(**job, output_prefix=out / "x", valid_prefix=out / "v"))
        assert files(out) == files(whole)


@pytest.mark.parametrize("workers", [1, 2])
def test_sigkill_at_random_moments(
    tmp_path: Path, corpus: list[str], tokenizer_dir: Path, repository: Path, workers: int
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    texts = many_texts(9000)
    inputs = [*corpus, str(write_jsonl(tmp_path / "d.jsonl", texts))]
    job: dict[str, Any] = {
        "inputs": inputs, "tokenizer": str(tokenizer_dir), "on_error": "skip", "valid_fraction": 0.1,
        "workers": workers,
    }  # fmt: skip
    prepare(Job(**job, output_prefix=whole / "x", valid_prefix=whole / "v"))
    call = json.dumps(job | {"output_prefix": str(out / "x"), "valid_prefix": str(out / "v")})
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    rng = random.Random(workers)
    resumed = kills = 0
    while True:
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, call], stdout=subprocess.PIPE, text=True, env=environment
        )
        journal = out / "x.journal.tmp"
        before = journal.stat().st_size if journal.exists() else 0
        while (
            process.poll() is None
            and kills < 3
            and not (journal.exists() and journal.stat().st_size > before)
        ):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.15))
        if kills < 3:
            process.kill()
            kills += 1
        said, _ = process.communicate()
        resumed += "going on" in said
        if process.returncode == 0:
            break
    assert kills >= 2 and resumed >= 1
    assert files(out) == files(whole)
