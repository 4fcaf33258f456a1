"""Our reader and writer against the safetensors library, and files that are not what they claim."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_syne.convert.safetensors_io import (
    DTYPES,
    TensorFile,
    TensorSpec,
    TensorWriter,
    tensor_sha256,
)
from megatron_syne.errors import DataError, SyneError

DTYPE_LIST = list(DTYPES.values())


def write(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    specs = [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    writer = TensorWriter(path, specs, {"format": "pt"})
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    return writer.finish()


@pytest.mark.parametrize("dtype", DTYPE_LIST)
def test_the_library_reads_what_we_write(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "b": torch.randn(5, 7).to(dtype),
        "ä": torch.randn(3).to(dtype),
        "c": torch.empty(0, 2).to(dtype),
    }
    sha256 = write(tmp_path / "x.safetensors", tensors)
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    file = TensorFile(tmp_path, "x.safetensors")
    assert file.hash(lambda count: None) == (sha256, {n: tensor_sha256(t) for n, t in tensors.items()})


@given(st.data())
@settings(deadline=None, max_examples=40)
def test_any_rectangle_is_the_librarys_slice(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    shape = (data.draw(st.integers(1, 12)), data.draw(st.sampled_from([1, 3, 40, 5000])))
    dtype = data.draw(st.sampled_from(DTYPE_LIST))
    folder = tmp_path_factory.mktemp("x")
    save_file({"a": torch.randn(shape).to(dtype), "pad": torch.zeros(3)}, folder / "x.safetensors")
    top = data.draw(st.integers(0, shape[0] - 1))
    bottom = data.draw(st.integers(top + 1, shape[0]))
    left = data.draw(st.integers(0, shape[1] - 1))
    right = data.draw(st.integers(left + 1, shape[1]))
    file = TensorFile(folder, "x.safetensors")
    # inside a wider tensor, as a piece of a parameter lies
    around = torch.zeros(bottom - top + 2, right - left + 2, dtype=dtype)
    file.read_into(around[1:-1, 1:-1], "a", (top, bottom), (left, right))
    with safe_open(folder / "x.safetensors", "pt") as library:
        expected = library.get_slice("a")[top:bottom, left:right]
    assert torch.equal(around[1:-1, 1:-1], expected)
    around[1:-1, 1:-1] = 0
    assert not around.any(), "nothing written outside"
    file.close()


def test_a_file_cut_off_while_it_is_open_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path, {"a": torch.ones(100, 100)})
    file = TensorFile(tmp_path, "x.safetensors")
    path.open("r+b").truncate(20_000)
    with pytest.raises(DataError, match="too early"):
        file.read_into(torch.empty(100, 100), "a", (0, 100), (0, 100))


def header_file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def info(start: object, stop: object, shape: object = (1,), dtype: object = "F32", **more: object) -> Any:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop], **more}


MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated"),
    "short": (b"1234567", "truncated"),
    "html": (b"<!DOCTYPE html><html>", "not a safetensors file"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "not a safetensors file"),
    "header cut off": (header_file({}, length=1000), "truncated"),
    "data cut off": (header_file({"a": info(0, 4)}, b"123"), "truncated"),
    "data too long": (header_file({"a": info(0, 4)}, b"12345"), "follow the last tensor"),
    "not json": (header_file(b"{]"), "not valid JSON"),
    "a list": (header_file([1]), "JSON object"),
    "twice": (header_file(b'{"a": 1, "a": 2}'), "stands twice"),
    "overlap": (header_file({"a": info(0, 8, (2,)), "b": info(4, 8)}, b"x" * 8), "overlaps"),
    "gap": (header_file({"a": info(0, 4), "b": info(8, 12)}, b"x" * 12), "gap"),
    "starts late": (header_file({"a": info(4, 8)}, b"x" * 8), "gap"),
    "wrong size": (header_file({"a": info(0, 4, (2,))}, b"x" * 4), "takes 8 bytes"),
    "backwards": (header_file({"a": info(4, 0)}, b"x" * 4), "offsets span"),
    "negative": (header_file({"a": info(-4, 0)}, b""), "malformed"),
    "negative shape": (header_file({"a": info(0, 4, (-1, -1))}, b"x" * 4), "malformed"),
    "boolean": (header_file({"a": info(False, 4)}, b"x" * 4), "malformed"),
    "huge": (header_file({"a": info(0, 4, (2**62, 2**62))}, b"x" * 4), "offsets span"),
    "fraction": (header_file({"a": info(0, 4, (1.0,))}, b"x" * 4), "malformed"),
    "text": (header_file({"a": info("0", 4)}, b"x" * 4), "malformed"),
    "three offsets": (header_file({"a": info(0, 4) | {"data_offsets": [0, 4, 8]}}, b"x" * 4), "malformed"),
    "unknown format": (header_file({"a": info(0, 4, dtype="F31")}, b"x" * 4), "malformed"),
    "format a list": (header_file({"a": info(0, 4, dtype=[])}, b"x" * 4), "malformed"),
    "not an object": (header_file({"a": 3}), "malformed"),
    "null shape": (header_file({"a": info(0, 4, None)}, b"x" * 4), "malformed"),
    "more keys": (header_file({"a": info(0, 4, more=1)}, b"x" * 4), "malformed"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files(tmp_path: Path, case: str) -> None:
    raw, word = MALFORMED[case]
    (tmp_path / "x.safetensors").write_bytes(raw)
    with pytest.raises(DataError, match=word) as caught:
        TensorFile(tmp_path, "x.safetensors")
    assert "x.safetensors" in str(caught.value)


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_damaged_headers_raise_our_errors_only(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """Bytes of a good file changed at random: it opens or is refused, nothing else."""
    folder = tmp_path_factory.mktemp("x", numbered=True)
    good = header_file({"a": info(0, 16, (2, 2)), "b": info(16, 20)}, b"x" * 20)
    raw = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (folder / "x.safetensors").write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    try:
        file = TensorFile(folder, "x.safetensors")
    except SyneError:
        return
    assert all(t.stop <= file.size for t in file.tensors.values())


def test_the_writer_holds_to_what_was_announced(tmp_path: Path) -> None:
    writer = TensorWriter(tmp_path / "x", [TensorSpec("a", torch.float32, (2,))], {})
    with pytest.raises(AssertionError, match="announced"):
        writer.write("a", torch.zeros(3))
    writer.close()
