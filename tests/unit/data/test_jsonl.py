from __future__ import annotations

from pathlib import Path

import pytest

from megatron_syne.data.documents.inputs import open_input
from megatron_syne.data.documents.jsonl import BadLine, Line, number_in, record_of, text_of


def read(path: Path) -> list[str | BadLine | None]:
    out: list[str | BadLine | None] = []
    for chunk in open_input(path).chunks():
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


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("1.5", 1.5),
        ("7", 7.0),
        ("-0", 0.0),
        ('"7"', "must be a number, found string"),
        ("null", "must be a number, found null"),
        ("true", "must be a number, found boolean"),
        ("NaN", "finite number, found nan"),
        ("-Infinity", "finite number, found -inf"),
        ("1e999", "finite number, found inf"),
        ("1" * 400, "finite number, found inf"),
    ],
)
def test_a_number_is_a_finite_number(value: str, expected: float | str) -> None:
    raw = f'{{"ppl": {value}}}'.encode()
    line = Line(3, 70, raw, len(raw))
    record = record_of(line)
    assert record is not None
    if isinstance(expected, float):
        assert number_in(record, "ppl", line) == expected
    else:
        with pytest.raises(BadLine, match=expected) as caught:
            number_in(record, "ppl", line)
        assert caught.value.byte == 70
    with pytest.raises(BadLine, match="no field 'loss'; fields here: ppl"):
        number_in(record, "loss", line)


def test_a_byte_order_mark_is_one_only_at_the_start_of_the_file() -> None:
    raw = "\ufeff{}\n".encode()
    assert record_of(Line(1, 0, raw, len(raw))) == {}
    with pytest.raises(
        BadLine, match="invalid JSON"
    ):  # the first line that a shard reads is not the file's first
        record_of(Line(1, 10, raw, len(raw)))
