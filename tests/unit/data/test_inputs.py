from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from megatron_syne.data.documents.inputs import find_inputs, open_input
from megatron_syne.data.documents.jsonl import BadLine, Line, record_of, text_of
from megatron_syne.errors import DataError, MissingInput

GOOD = b'{"text": "good"}\n'
RECORDS: list[dict[str, Any]] = [{"text": "é一\n" * (n % 40) + str(n), "n": n / 7} for n in range(2000)]
RAW = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()


def lines(path: Path, **options: Any) -> list[Line]:
    return [line for chunk in open_input(path, **options).chunks() for line in chunk]


def zstd(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    return bytes(zstandard.ZstdCompressor().compress(data))


def parquet(data: bytes) -> bytes:
    """The records as a table of several row groups."""
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")

    out = io.BytesIO()
    table = pyarrow.Table.from_pylist([json.loads(line) for line in data.splitlines()])
    pyarrow.parquet.write_table(table, out, row_group_size=300)
    return out.getvalue()


def two_members(pack: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    return lambda data: pack(data[:1001]) + pack(data[1001:])


WAYS: dict[str, Callable[[bytes], bytes]] = {
    "a.jsonl": bytes,
    "a.json.gz": gzip.compress,
    "b.jsonl.gz": two_members(gzip.compress),
    "c.jsonl.gz": lambda data: gzip.compress(data) + bytes(512),  # padded with zeros, as gzip allows
    "a.jsonl.zst": zstd,
    "b.jsonl.zst": two_members(zstd),
    "c.jsonl.zst": lambda data: b"\x50\x2a\x4d\x18\x04\0\0\0skip" + zstd(data),  # a skippable frame first
    "gzip_in_disguise.jsonl": gzip.compress,
    "a.parquet": parquet,
}


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("block_bytes", [1, 700, 1 << 20])
def test_every_kind_gives_the_same_records_and_its_own_hash(
    tmp_path: Path, name: str, block_bytes: int
) -> None:
    file = tmp_path / name
    file.write_bytes(WAYS[name](RAW))
    source = open_input(file, block_bytes=block_bytes)
    found = [line for chunk in source.chunks() for line in chunk]
    assert [record_of(line) for line in found] == RECORDS
    assert [line.number for line in found] == list(range(1, len(RECORDS) + 1))
    assert all(line.offset == before.offset + before.length for before, line in pairwise(found))
    assert (source.size, source.sha256) == (
        file.stat().st_size,
        hashlib.sha256(file.read_bytes()).hexdigest(),
    )
    if not name.endswith("parquet"):
        assert all(RAW[line.offset : line.offset + line.length] == line.raw for line in found)


@pytest.mark.parametrize("name", ["b.jsonl.gz", "b.jsonl.zst"])
def test_truncated_anywhere_gives_whole_lines_then_one_fault(tmp_path: Path, name: str) -> None:
    whole = WAYS[name](RAW)
    frame = len(WAYS[name.replace("b", "a", 1).replace("jsonl.gz", "json.gz")](RAW[:1001]))
    file = tmp_path / name
    for keep in [*random.Random(0).sample(range(len(whole)), 40), 0, 1, len(whole) - 1]:
        if keep == frame:
            continue  # one whole member: nothing tells that more was to come
        file.write_bytes(whole[:keep])
        *first, last = lines(file)
        assert [record_of(line) for line in first] == RECORDS[: len(first)]
        with pytest.raises(BadLine, match=rf"ends early, at byte {keep} of the file itself") as caught:
            record_of(last)
        assert caught.value.byte == last.offset + last.length
        assert last.raw == RAW[last.offset : last.offset + last.length]


@pytest.mark.parametrize("name", ["a.json.gz", "a.jsonl.zst"])
def test_damaged_in_the_middle(tmp_path: Path, name: str) -> None:
    data = bytearray(WAYS[name](RAW))
    data[len(data) // 2] ^= 0x10
    data[len(data) // 2 + 1] ^= 0xFF
    (tmp_path / name).write_bytes(data + b"\0garbage")
    source = open_input(tmp_path / name)
    *_, last = [line for chunk in source.chunks() for line in chunk]
    with pytest.raises(BadLine, match="damaged"):
        record_of(last)
    assert source.sha256 == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


def test_a_text_file_is_one_document_with_the_byte_of_its_faults(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes('\ufeffa "quoted" \\ line\r\n\r\n第二\n'.encode())
    (line,) = lines(file, text_key="body")
    assert text_of(line, "body") == 'a "quoted" \\ line\r\n\r\n第二\n'
    packed = tmp_path / "b.txt.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert text_of(lines(packed)[0], "text") == text_of(line, "body")
    for data, reason, byte in ((b"ab\n\xff", "invalid UTF-8", 3), (b"ab\n\0", "NUL", 3)):
        file.write_bytes(data)
        with pytest.raises(BadLine, match=reason) as caught:
            text_of(lines(file)[0], "text")
        assert caught.value.byte == byte
    file.write_bytes(b"")
    assert text_of(lines(file)[0], "text") == ""
    file.write_bytes(b"x" * 101)
    assert lines(file, max_line_bytes=101)[0].length == 101
    with pytest.raises(BadLine, match="101 bytes is longer than the limit"):
        text_of(lines(file, max_line_bytes=100, block_bytes=10)[0], "text")


def test_parquet_columns_and_faults(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")

    file = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["a", None, "c"], "other": [[1], [2], [3]], "score": [0.5, 1.5, 2.5]})
    pyarrow.parquet.write_table(table, file)
    assert record_of(lines(file, fields=["text", "score"])[2]) == {"text": "c", "score": 2.5}
    assert record_of(lines(file)[0]) == {"text": "a", "other": [1], "score": 0.5}
    with pytest.raises(BadLine, match="must be a string, found null"):
        text_of(lines(file)[1], "text")
    with pytest.raises(DataError, match="no column 'body'; columns here: other, score, text"):
        lines(file, fields=["body"])
    # text that is no UTF-8 spoils its own row, not its neighbours
    broken = pyarrow.array([b"good", b"bad \xff"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": broken}), file)
    good, bad = lines(file)
    assert text_of(good, "text") == "good"
    with pytest.raises(BadLine, match="surrogate"):
        text_of(bad, "text")
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-20] + b"\xff" * 12 + whole[-8:]):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.parquet: damaged"):
            lines(file)
    file.write_bytes(b"{}")
    with pytest.raises(DataError, match="is no parquet file"):
        lines(file)


def test_a_line_over_the_limit_is_not_kept(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    long = b'{"text": "' + b"x" * 200_000 + b'"}\n'
    file.write_bytes(GOOD + long + GOOD)
    for block_bytes in (1, 4096, 150_000, 1 << 20):
        first, second, third = lines(file, max_line_bytes=5000, block_bytes=block_bytes)
        assert record_of(first) == record_of(third) == {"text": "good"}
        assert (second.length, third.number, third.offset) == (len(long), 3, len(GOOD + long))
        assert len(second.raw) <= 1024 and long.startswith(second.raw)
        with pytest.raises(BadLine, match=f"line of {len(long)} bytes is longer than the limit"):
            record_of(second)
    # the limit does not count the newline
    assert record_of(lines(file, max_line_bytes=len(long) - 1)[1]) is not None
    assert lines(file, max_line_bytes=len(long) - 2)[1].length > len(
        lines(file, max_line_bytes=len(long) - 2)[1].raw
    )


@pytest.mark.parametrize("kind", ["plain", "gzip", "zstd"])
def test_memory_does_not_follow_a_huge_line_or_a_bomb(tmp_path: Path, kind: str) -> None:
    """300 MB in one line; a limit of 8 MB; read in a process of its own."""
    file = tmp_path / "a.jsonl"
    piece = b"x" * (1 << 20)
    with open(file, "wb") as stream:
        if kind == "plain":
            for _ in range(300):
                stream.write(piece)
        elif kind == "gzip":
            with gzip.GzipFile(fileobj=stream, mode="wb", compresslevel=1) as packed:
                for _ in range(300):
                    packed.write(piece)
        else:
            stream.write(zstd(piece * 300))
    code = (
        "import resource, sys\n"
        "from megatron_syne.data.documents.inputs import open_input\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "chunks = open_input(sys.argv[1], max_line_bytes=1 << 23).chunks()\n"
        "print(sum(line.length for chunk in chunks for line in chunk))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, check=True)
    length, kilobytes = map(int, done.stdout.split())
    assert length == 300 << 20
    assert kilobytes < 80_000


@pytest.mark.parametrize(
    ("start", "what"), [(b"BZh9", "bzip2"), (b"\xfd7zXZ\0", "xz"), ("{}".encode("utf-16"), "UTF-16")]
)
def test_what_is_not_read_is_recognised(tmp_path: Path, start: bytes, what: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(start + b"\n")
    with pytest.raises(DataError, match=what):
        lines(file)


def test_what_is_not_a_readable_file(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="no such file"):
        open_input(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="not a regular file"):
        open_input(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="not a regular file"):
        open_input(tmp_path / "pipe")


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD * 10)
    chunks = open_input(file, block_bytes=1).chunks()
    next(chunks)
    with open(file, "ab") as stream:
        stream.write(GOOD)
    with pytest.raises(DataError, match="changed while it was read"):
        list(chunks)


def test_a_folder_stands_for_its_files_sorted(tmp_path: Path) -> None:
    names = ["b/2.jsonl", "b/10.jsonl.zst", "a.parquet", "b/c/x.txt", "z.JSON.gz"]
    others = ["README.md", "b/data.arrow", "p.parquet.gz"]
    for name in [*names, *others, "_SUCCESS", ".hidden.jsonl", "_temporary/x.jsonl", ".git/x.json"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    said: list[str] = []
    found = [str(Path(file).relative_to(tmp_path)) for file in find_inputs([tmp_path], said.append)]
    assert found == ["a.parquet", "b/10.jsonl.zst", "b/2.jsonl", "b/c/x.txt", "z.JSON.gz"]
    assert len(said) == 1 and "3 files of other kinds are left out, such as" in said[0]
    assert find_inputs(["x.anything", "-", tmp_path / "b" / "c"]) == [
        "x.anything",
        "-",
        str(tmp_path / "b/c/x.txt"),
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingInput, match="no input in this folder"):
        find_inputs([tmp_path / "b" / "c", tmp_path / "empty"])


def test_standard_input_packed_or_not() -> None:
    code = (
        "from megatron_syne.data.documents.inputs import open_input\n"
        "source = open_input('-')\n"
        "print(sum(len(chunk) for chunk in source.chunks()), source.size, source.sha256)\n"
    )
    for data in (RAW, gzip.compress(RAW), zstd(RAW)):
        done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
        digest = hashlib.sha256(data).hexdigest()
        assert done.stdout.decode().split() == [str(len(RECORDS)), str(len(data)), digest]
