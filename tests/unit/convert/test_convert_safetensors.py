"""Our header reader and builder against the safetensors library, and files that are not what they claim."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_syne.convert.formats.safetensors import TensorInfo, TensorSpec, build_header, read_header
from megatron_syne.errors import DataError, SyneError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def header_of(path: Path) -> dict[str, TensorInfo]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return read_header(descriptor, str(path))
    finally:
        os.close(descriptor)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_library_reads_what_we_write(tmp_path: Path, dtype: str) -> None:
    tensors = {
        "b": torch.randn(5, 7).to(DTYPES[dtype]),
        "ä": torch.randn(3).to(DTYPES[dtype]),
        "c": torch.empty(0, 2).to(DTYPES[dtype]),
    }
    specs = [TensorSpec(name, dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    header, infos, size = build_header(specs, {"format": "pt"})
    raw = header + b"".join(map(raw_bytes, tensors.values()))
    assert len(raw) == size and len(header) % 8 == 0
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert header_of(path) == infos


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3)),
        max_size=5,
    )
)
@settings(deadline=None, max_examples=50)
def test_we_read_what_the_library_writes(tmp_path_factory: pytest.TempPathFactory, specs: Any) -> None:
    path = tmp_path_factory.mktemp("x") / "x.safetensors"
    tensors = {name: torch.randn(shape).to(DTYPES[dtype]) for name, (dtype, shape) in specs.items()}
    save_file(tensors, path)
    found, raw = header_of(path), path.read_bytes()
    assert found.keys() == tensors.keys()
    for name, (dtype, shape) in specs.items():
        assert (found[name].dtype, found[name].shape) == (dtype, tuple(shape))
        assert raw[found[name].start : found[name].stop] == raw_bytes(tensors[name])


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
        header_of(tmp_path / "x.safetensors")
    assert "x.safetensors" in str(caught.value)


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_damaged_headers_raise_our_errors_only(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """Bytes of a good file changed at random: it opens or is refused, nothing else."""
    path = tmp_path_factory.mktemp("x", numbered=True) / "x.safetensors"
    raw = bytearray(header_file({"a": info(0, 16, (2, 2)), "b": info(16, 20)}, b"x" * 20))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    try:
        tensors = header_of(path)
    except SyneError:
        return
    assert all(tensor.stop <= path.stat().st_size for tensor in tensors.values())
