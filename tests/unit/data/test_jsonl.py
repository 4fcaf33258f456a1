from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from megatron_syne.data.jsonl import BadLine, Line, SourceFile, text_of
from megatron_syne.errors import DataError, MissingInput


def read(path: Path, **options: int) -> list[str | BadLine | None]:
    out: list[str | BadLine | None] = []
    for chunk in SourceFile(path, **options).chunks():
        for line in chunk:
            try:
                out.append(text_of(line, "text"))
            except BadLine as error:
                out.append(error)
    return out


def test_byte_order_mark_crlf_blank_lines_and_no_last_newline(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes('\ufeff{"text": "一"}\r\n\r\n  \n{"text": ""}\n{"text": "b\\nc", "n": 1}'.encode())
    assert read(file) == ["一", None, None, "", "b\nc"]


GOOD = b'{"text": "good"}\n'


@pytest.mark.parametrize(
    ("line", "reason", "byte"),
    [
        (b'{"text": "a"', "Expecting ',' delimiter", 13),
        (b"not json", "Expecting value", 0),
        (b'{"text": "a"} x', "Extra data", 14),
        ('{"text": "一二", bad}'.encode(), "property name", 19),
        (b'["a"]', "expected a JSON object, found array", 0),
        (b"null", "expected a JSON object, found null", 0),
        (b'{"Text": "a", "z": 1}', "no field 'text'; fields here: Text, z", 0),
        (b'{"text": 5}', "must be a string, found number", 0),
        (b'{"text": null}', "must be a string, found null", 0),
        (b'{"text": {"a": 1}}', "must be a string, found object", 0),
        (b'{"text": "ab\xffcd"}', "invalid UTF-8", 12),
        (b'{"text": "\xed\xa0\x80"}', "invalid UTF-8", 10),
        (b'{"text": "a\x00b"}', "NUL byte", 11),
        (b'{"text": "ab\\u0000"}', "escaped NUL", 12),
        (b'{"text": "a\\\\u0000\\u0000"}', "escaped NUL", 18),
        (b'{"text": "\\ud83d\\ude00 \\ud83d"}', "lone surrogate", 23),
        (b'{"text": "x\\ude00"}', "lone surrogate", 11),
        (b'{"text": "\\ud83d \\ude00"}', "lone surrogate", 10),
        (b"[" * 100_000, "nested too deeply", 0),
        (b'{"text": ' + b"9" * 5000 + b"}", "limit", 0),
    ],
)
def test_each_fault_is_named_by_line_and_byte(tmp_path: Path, line: bytes, reason: str, byte: int) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD * 2 + line + b"\n" + GOOD)
    first, second, bad, last = read(file)
    assert (first, second, last) == ("good", "good", "good")
    assert isinstance(bad, BadLine)
    assert reason in bad.reason
    if "delimiter" in reason:
        byte = len(line) + 1  # the decoder stops after the white space
    assert bad.byte == 2 * len(GOOD) + byte


@pytest.mark.parametrize("keep", range(1, 29))
def test_a_file_cut_anywhere_in_its_last_line_says_so(tmp_path: Path, keep: int) -> None:
    file = tmp_path / "a.jsonl"
    whole = '{"text": "é一", "s": "abc"}'.encode()
    assert len(whole) == 29
    file.write_bytes(GOOD + whole[:keep])
    good, bad = read(file)
    assert good == "good" and isinstance(bad, BadLine)
    assert "truncated?" in bad.reason
    assert len(GOOD) <= bad.byte <= len(GOOD) + keep


def test_chunks_change_nothing_and_the_digest_is_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": "x" * (n % 97)}) + "\n" for n in range(500)))
    data = file.read_bytes()
    seen = []
    for size in (1, 100, 5000, 1 << 20):
        source = SourceFile(file, chunk_bytes=size)
        seen.append([line for chunk in source.chunks() for line in chunk])
        assert (source.size, source.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert all(one == seen[0] for one in seen)
    assert all(data[line.offset : line.offset + line.length] == line.raw for line in seen[0])
    assert [line.number for line in seen[0]] == list(range(1, 501))


def test_a_line_over_the_limit_is_not_kept_in_memory(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD + b'{"text": "' + b"x" * 200_000 + b'"}\n' + GOOD)
    good, bad, last = read(file, max_line_bytes=5000, chunk_bytes=4096)
    assert (good, last) == ("good", "good")
    assert isinstance(bad, BadLine) and "200013 bytes is longer than the limit" in bad.reason
    long = [line for chunk in SourceFile(file, max_line_bytes=5000).chunks() for line in chunk][1]
    assert isinstance(long, Line) and len(long.raw) <= 1024


@pytest.mark.parametrize(
    ("start", "what"),
    [(b"\x1f\x8b\x08", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), ("{}".encode("utf-16"), "UTF-16")],
)
def test_compressed_and_utf16_files_are_recognised(tmp_path: Path, start: bytes, what: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(start + b"\n")
    with pytest.raises(DataError, match=what):
        read(file)


def test_what_is_not_a_readable_file(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="no such file"):
        SourceFile(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="not a regular file"):
        SourceFile(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="not a regular file"):
        SourceFile(tmp_path / "pipe")


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD * 10)
    chunks = SourceFile(file, chunk_bytes=1).chunks()
    next(chunks)
    with open(file, "ab") as stream:
        stream.write(GOOD)
    with pytest.raises(DataError, match="changed while it was read"):
        list(chunks)
