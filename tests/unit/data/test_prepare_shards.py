from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prepared import many_texts, write_jsonl

from megatron_syne.data.documents.inputs import open_input
from megatron_syne.data.preparation.merge import merge
from megatron_syne.data.preparation.prepare import Job, prepare
from megatron_syne.data.preparation.shards import plan_shard
from megatron_syne.data.tokens.reader import IndexedReader
from megatron_syne.errors import CannotCreate, ConfigError, DataError, MissingInput


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder with every kind of input, some lines malformed, some short."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts = many_texts(900)
    rng = random.Random(0)

    def write(name: str, some: list[str]) -> bytes:
        lines = [json.dumps({"text": text, "ppl": rng.uniform(1, 100)}) for text in some]
        for _ in range(len(some) // 10):
            lines.insert(
                rng.randrange(len(lines)), rng.choice(['{"text": "cut', "", '{"text": "x", "ppl": 1}'])
            )
        data = "\n".join(lines).encode() + b"\n" * rng.randrange(2)
        (folder / name).write_bytes(data)
        return data

    write("a.jsonl", texts[:400])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(write("b.jsonl", texts[400:500])))
    (folder / "b.jsonl").unlink()
    write("c.jsonl", texts[500:510])
    (folder / "d.jsonl").write_bytes(b"")
    table = pyarrow.table({"text": texts[510:700], "ppl": [float(n) for n in range(190)]})
    parquet.write_table(table, folder / "e.parquet")
    write("f.jsonl", texts[700:])
    return folder


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_merged_shards_are_the_unsharded_run(
    tmp_path: Path, corpus: Path, tokenizer_dir: Path, count: int
) -> None:
    job: dict[str, Any] = {
        "inputs": [corpus], "tokenizer": tokenizer_dir, "on_error": "skip", "keep": ["ppl"], "valid_fraction": 0.2,
    }  # fmt: skip
    one, many = tmp_path / "one", tmp_path / "many"
    train, valid = prepare(Job(**job, output_prefix=one / "x", valid_prefix=one / "v"))
    assert train["counts"]["dropped"]["malformed"] > 10
    order = list(range(count))
    random.Random(count).shuffle(order)
    for index in order:
        prepare(Job(**job, output_prefix=many / "x", valid_prefix=many / "v", shard=(index, count)))
    assert merge(many / "x") == train
    assert merge(many / "v", shards=count) == valid
    assert files(many) == files(one)
    assert np.load(many / "x.ppl.npy").shape == (train["counts"]["documents"],)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.lists(
        st.lists(st.sampled_from([b"\n", b"a", b"bcd\n", b"\n\n", b"long" * 9]), max_size=12),
        min_size=1,
        max_size=4,
    ),
    count=st.integers(1, 9),
)
def test_every_line_belongs_to_one_shard(tmp_path: Path, data: list[list[bytes]], count: int) -> None:
    names = []
    for number, pieces in enumerate(data):
        (tmp_path / f"{number}.jsonl").write_bytes(b"".join(pieces))
        names.append(str(tmp_path / f"{number}.jsonl"))

    def read(file: str, span: tuple[int, int] | None = None) -> list[tuple[str, int, bytes]]:
        chunks = open_input(file, span=span, block_bytes=5).chunks()
        return [(file, line.offset, line.raw) for chunk in chunks for line in chunk]

    plans = [plan_shard(names, index, count) for index in range(count)]
    found = [line for plan in plans for part in plan for line in read(*part)]
    assert found == [line for file in names for line in read(file)]
    assert {part.file for plan in plans for part in plan} == set(names)  # an empty file is counted too


def test_shards_are_about_equal(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", many_texts(2000))
    spans = [plan_shard([str(source)], index, 8)[0].span for index in range(8)]
    sizes = [span[1] - span[0] for span in spans if span is not None]
    assert len(sizes) == 8 and max(sizes) - min(sizes) < 1000


def test_a_finished_shard_is_left_alone(tmp_path: Path, tokenizer_dir: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", many_texts(100))
    job: dict[str, Any] = {"inputs": [source], "tokenizer": tokenizer_dir, "output_prefix": tmp_path / "x"}
    first = prepare(Job(**job, shard=(1, 2)))
    stamp = (tmp_path / "x.shard-00001-of-00002.bin").stat().st_mtime_ns
    said: list[str] = []
    assert prepare(Job(**job, shard=(1, 2)), say=said.append) == first
    assert said == [f"{tmp_path}/x.shard-00001-of-00002: finished before; nothing to do"]
    assert (tmp_path / "x.shard-00001-of-00002.bin").stat().st_mtime_ns == stamp
    with pytest.raises(CannotCreate, match="made from other inputs or with other options"):
        prepare(Job(**job, min_tokens=3, shard=(1, 2)))
    prepare(Job(**job, shard=(0, 2)))
    merge(tmp_path / "x")
    with pytest.raises(CannotCreate, match="merged before"):
        prepare(Job(**job, shard=(1, 2)))
    assert merge(tmp_path / "x", say=said.append)["counts"]["documents"] == 100
    assert "merged before; nothing to do" in said[-1]


def test_what_merge_refuses(tmp_path: Path, tokenizer_dir: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [*many_texts(100), ""])
    job: dict[str, Any] = {"inputs": [source], "tokenizer": tokenizer_dir, "output_prefix": tmp_path / "x"}
    with pytest.raises(MissingInput, match="no shards here"):
        merge(tmp_path / "x")
    prepare(Job(**job, shard=(0, 3)))
    with pytest.raises(
        MissingInput, match=r"2 of 3 shards are not finished: 1, 2; run them with --shard 1/3"
    ):
        merge(tmp_path / "x")
    prepare(Job(**job, shard=(1, 3)))
    prepare(Job(**job, shard=(2, 3), min_tokens=3))
    with pytest.raises(DataError, match=r"x\.shard-00002-of-00003\.json: was made from other inputs"):
        merge(tmp_path / "x")
    prepare(Job(**job, shard=(2, 3), overwrite=True))
    damaged = tmp_path / "x.shard-00001-of-00003.bin"
    whole = damaged.read_bytes()
    for broken in (whole[:-2], bytes([whole[0] ^ 1]) + whole[1:], whole + b"\0\0"):
        damaged.write_bytes(broken)
        with pytest.raises(DataError, match=r"00001-of-00003\.bin: is not what its manifest describes"):
            merge(tmp_path / "x")
    damaged.write_bytes(whole)
    text = source.read_bytes()
    for changed in (text.replace(b"quick", b"quack", 1), text + b"\n", text[:-20]):
        source.write_bytes(changed)
        with pytest.raises(DataError, match=r"a\.jsonl: .* changed since"):
            merge(tmp_path / "x")
    assert not (tmp_path / "x.bin").exists() and not list(tmp_path.glob("*.tmp"))
    source.write_bytes(text)
    prepare(Job(**job, shard=(0, 1)))
    with pytest.raises(DataError, match=r"shards of \[1, 3\] lie here"):
        merge(tmp_path / "x")
    merge(tmp_path / "x", shards=3, keep_shards=True)
    with pytest.raises(CannotCreate, match="exists already"):
        merge(tmp_path / "x", shards=3)
    IndexedReader(tmp_path / "x").verify()


def test_a_fault_in_a_shard_is_named_by_its_line_of_the_whole_file(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", many_texts(200))
    size = source.stat().st_size
    with open(source, "ab") as stream:
        stream.write(b'{"text": 1}\n')
    job = Job([source], tokenizer_dir, tmp_path / "x", shard=(3, 4))
    with pytest.raises(DataError, match=rf"a\.jsonl:201:{size}: field 'text' must be a string"):
        prepare(job)
    for shard in ((4, 4), (-1, 4), (0, 0)):
        with pytest.raises(ConfigError, match="--shard"):
            prepare(Job([source], tokenizer_dir, tmp_path / "x", shard=shard))
    with pytest.raises(ConfigError, match="standard input"):
        prepare(Job(["-"], tokenizer_dir, tmp_path / "x", shard=(0, 2)))


def test_the_command(tmp_path: Path, tokenizer_dir: Path, repository: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", many_texts(50))

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, repository / "tools/prepare_data.py", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(repository)}
        return subprocess.run(list(map(str, line)), capture_output=True, text=True, env=environment)

    base = ["--input", source, "--tokenizer", tokenizer_dir, "--output-prefix", tmp_path / "x"]
    assert run(*base, "--shard", "0/2").returncode == 0
    unfinished = run("--merge", tmp_path / "x")
    assert unfinished.returncode == 66 and "1 of 2 shards are not finished: 1;" in unfinished.stderr
    assert run(*base, "--shard", "1/2").returncode == 0
    merged = run("--merge", tmp_path / "x", "--shards", "2")
    assert (merged.returncode, merged.stderr) == (0, "")
    assert merged.stdout.startswith(f"{tmp_path}/x: 50 documents, ")
    assert run("--verify", tmp_path / "x").returncode == 0
    for shard in ("1", "a/2", "2/2"):
        assert run(*base, "--shard", shard).returncode == 64


KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_syne.data.preparation.merge import merge

left = [int(sys.argv[2])]

def counted(function):
    def call(*args, **options):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    return call

for name in ("replace", "fsync", "unlink"):
    setattr(os, name, counted(getattr(os, name)))
Path.unlink = counted(Path.unlink)
merge(sys.argv[1])
"""


def test_a_merge_killed_at_any_moment_is_done_by_giving_it_again(
    tmp_path: Path, tokenizer_dir: Path, repository: Path
) -> None:
    """Before each rename, sync and removal in turn, until one run comes through."""
    source = write_jsonl(tmp_path / "a.jsonl", many_texts(60))
    job: dict[str, Any] = {"inputs": [source], "tokenizer": tokenizer_dir, "min_tokens": 0}
    prepare(Job(**job, output_prefix=tmp_path / "one" / "x"))
    expected, kills = files(tmp_path / "one"), 0
    for step in range(0, 200, 3):
        folder = tmp_path / f"many{step}"
        for index in range(2):
            prepare(Job(**job, output_prefix=folder / "x", shard=(index, 2)))
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(folder / "x"), str(step)], cwd=repository, timeout=60
        )
        if done.returncode == 0:
            break
        assert done.returncode == -9
        kills += 1
        merge(folder / "x")
        assert files(folder) == expected, f"killed before step {step}"
    assert kills > 3 and files(folder) == expected
