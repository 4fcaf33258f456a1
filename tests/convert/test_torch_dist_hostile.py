"""Damaged and hostile ``torch_dist`` folders: one clear error, no code run, nothing outside the folder opened."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torch_dist_toys import Evil
from unit.convert.format_toys import ToyWeights, toy_model, write

from megatron_syne.convert.formats.dcp_archive import plan_tensor_archive
from megatron_syne.convert.formats.dcp_metadata import Metadata, Slice, read_metadata, write_metadata
from megatron_syne.convert.formats.torch_dist import open_torch_dist, plan_torch_dist
from megatron_syne.errors import DataError, MissingInput, SecurityRefusal, SyneError

EMBEDDING = "embedding.word_embeddings.weight"
FILE = "__0_0.distcp"


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A good folder."""
    weights = ToyWeights(toy_model())
    folder = write(weights, plan_torch_dist(weights), tmp_path / "made")
    open_torch_dist(folder).close()
    return folder


def change(folder: Path, edit: Callable[[Metadata], None]) -> None:
    """Rewrite ``.metadata``."""
    metadata = read_metadata(folder)
    edit(metadata)
    (folder / ".metadata").write_bytes(write_metadata(metadata))


def redirect(folder: Path, to: Slice) -> None:
    """Have the embedding's one chunk lie elsewhere."""

    def edit(metadata: Metadata) -> None:
        tensor = metadata.tensors[EMBEDDING]
        tensor.chunks[0] = replace(tensor.chunks[0], slice=to)

    change(folder, edit)


def append(folder: Path, content: bytes) -> Slice:
    """More bytes at the end of the file."""
    path = folder / FILE
    start = path.stat().st_size
    with path.open("ab") as stream:
        stream.write(content)
    return Slice(FILE, start, len(content))


def zipped(records: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip as Python makes it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as file:
        for name, content in records.items():
            file.writestr(f"archive/{name}", content)
    return stream.getvalue()


def good_archive() -> tuple[bytearray, int]:
    """The embedding's own, and where its numbers lie."""
    plan = plan_tensor_archive("BF16", (31, 16))
    content = bytearray(plan.size)
    for at, part in plan.fixed:
        content[at : at + len(part)] = part
    return content, plan.data


def test_pickles_that_run_code(made: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    evil = pickle.dumps(Evil(canary))
    (made / "common.pt").write_bytes(evil)
    open_torch_dist(made).close()  # never read
    hostile = {"data.pkl": pickle.dumps(Evil(canary), 2), "data/0": bytes(992), "version": b"3"}
    redirect(made, append(made, zipped(hostile)))
    with pytest.raises(
        SecurityRefusal, match=rf"{FILE}: {EMBEDDING}: chunk at \[0, 0\]: .*holds posix.system"
    ):
        open_torch_dist(made)
    (made / ".metadata").write_bytes(evil)
    with pytest.raises(SecurityRefusal, match=r"\.metadata: holds posix\.system"):
        open_torch_dist(made)
    assert not canary.exists()
    pickle.loads(evil)
    assert canary.exists()  # the bait is alive


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "a/b", "..", "", "a\0b", "a\\b", "hf/config.json"]
)
def test_names_that_lead_elsewhere(made: Path, name: str) -> None:
    (made.parent / "outside").write_bytes((made / FILE).read_bytes())
    size = (made / FILE).stat().st_size
    redirect(made, Slice(name, 0, size))
    with pytest.raises(SecurityRefusal):
        open_torch_dist(made)


def test_links_and_pipes(made: Path) -> None:
    whole = (made / FILE).read_bytes()
    outside = made.parent / "outside"
    outside.write_bytes(whole)
    (made / FILE).unlink()
    with pytest.raises(MissingInput, match=FILE):
        open_torch_dist(made)
    (made / FILE).symlink_to(outside)
    with pytest.raises(SecurityRefusal, match="link that leads out"):
        open_torch_dist(made)
    (made / FILE).unlink()
    os.mkfifo(made / FILE)
    with pytest.raises(SecurityRefusal, match="not a regular file"):
        open_torch_dist(made)
    (made / FILE).unlink()
    (made / FILE).write_bytes(whole)
    (made / ".metadata").rename(made / "other")
    (made / ".metadata").symlink_to("/dev/zero")
    with pytest.raises(SecurityRefusal):
        open_torch_dist(made)


def test_cut_files_and_offsets_beyond_them(made: Path) -> None:
    size, original = (made / FILE).stat().st_size, (made / ".metadata").read_bytes()
    for offset, length in (
        (size, 100),
        (size - 10, 1000),
        (2**61, 2**61),
        (0, 2**61),
        (0, 0),
        (0, 30),
        (7, 900),
    ):
        redirect(made, Slice(FILE, offset, length))
        with pytest.raises(DataError, match=FILE):
            open_torch_dist(made)
    (made / ".metadata").write_bytes(original)
    os.truncate(made / FILE, size // 2)
    with pytest.raises(DataError, match="beyond the end"):
        open_torch_dist(made)


def test_chunks_that_overlap_or_leave_holes(made: Path) -> None:
    def half(metadata: Metadata) -> None:
        del metadata.tensors["decoder.layers.mlp.linear_fc1.weight"].chunks[3]

    def same_bytes(metadata: Metadata) -> None:
        chunks = metadata.tensors["decoder.layers.mlp.linear_fc2.weight"].chunks
        chunks[1] = replace(chunks[1], slice=chunks[0].slice)

    def twice(metadata: Metadata) -> None:
        chunks = metadata.tensors["decoder.layers.mlp.linear_fc1.weight"].chunks
        chunks[1] = replace(chunks[1], offsets=(0, 12, 0))

    original = (made / ".metadata").read_bytes()
    for edit, message in (
        (half, r"layers\.1\.mlp\.up_proj\.weight\[0:24, 0:16\] is not stored"),
        (same_bytes, r"linear_fc2\.weight share bytes"),
        (twice, r"gate_proj\.weight\[12:24, 0:16\] is stored more than once"),
    ):
        change(made, edit)
        with pytest.raises(DataError, match=message):
            open_torch_dist(made)
        (made / ".metadata").write_bytes(original)


def test_metadata_that_contradicts_itself(made: Path) -> None:
    def outside(metadata: Metadata) -> None:
        chunks = metadata.tensors[EMBEDDING].chunks
        chunks[0] = replace(chunks[0], offsets=(1, 0))

    def other_rank(metadata: Metadata) -> None:
        chunks = metadata.tensors[EMBEDDING].chunks
        chunks[0] = replace(chunks[0], offsets=(0,))

    def negative(metadata: Metadata) -> None:
        chunks = metadata.tensors[EMBEDDING].chunks
        chunks[0] = replace(chunks[0], slice=Slice(FILE, -64, 100))

    def other_dtype(metadata: Metadata) -> None:
        metadata.tensors[EMBEDDING].dtype = "F16"

    original = (made / ".metadata").read_bytes()
    for edit, message in (
        (outside, "is not within"),
        (other_rank, "is not within"),
        (negative, "sizes or offsets"),
        (other_dtype, r"BF16 \[31, 16\], \.metadata gives F16 \[31, 16\]"),
    ):
        change(made, edit)
        with pytest.raises(DataError, match=message):
            open_torch_dist(made)
        (made / ".metadata").write_bytes(original)
    for content in (b"", b"x", pickle.dumps([1, 2]), pickle.dumps(None), original[: len(original) // 2]):
        (made / ".metadata").write_bytes(content)
        with pytest.raises(DataError, match=r"\.metadata"):
            open_torch_dist(made)


def test_zips_that_are_not_what_torch_writes(made: Path) -> None:
    content, data = good_archive()
    file = zipfile.ZipFile(io.BytesIO(bytes(content)))
    inner = {name.partition("/")[2]: file.read(name) for name in file.namelist() if "data/0" not in name}
    numbers = {"data/0": bytes(992)}

    def directory(field: int, value: bytes) -> bytes:
        """The good one with a field of data/0's line in the directory changed."""
        changed = bytearray(content)
        at = changed.rindex(b"archive/data/0") - 46 + field
        changed[at : at + len(value)] = value
        return bytes(changed)

    for archive, message in {
        "compressed": (zipped(inner | numbers, zipfile.ZIP_DEFLATED), "compressed"),
        "bomb": (zipped(inner | {"data/0": bytes(2**24)}, zipfile.ZIP_DEFLATED), "compressed"),
        "no numbers": (zipped(inner), "has no record data/0"),
        "no pickle": (zipped(numbers), r"has no record data\.pkl"),
        "too few": (zipped(inner | {"data/0": bytes(990)}), "496 numbers are needed"),
        "big-endian": (zipped(inner | numbers | {"byteorder": b"big"}), "byte order b'big'"),
        "long pickle": (zipped(inner | numbers | {"data.pkl": bytes(2**21)}), "at most"),
        "size beyond": (directory(20, struct.pack("<II", 2**31, 2**31)), "run into what follows"),
        "header elsewhere": (directory(42, struct.pack("<I", 5)), "run into what follows at 5"),
        "header beyond": (directory(42, struct.pack("<I", 2**31)), "overlap|refers to bytes"),
        "encrypted": (directory(8, b"\1"), "encrypted"),
        "no end": (bytes(content[:-1]), "cut short"),
        "not a zip": (b"\x80\x02N." * 500, "cut short"),
    }.values():
        redirect(made, append(made, archive))
        with pytest.raises(DataError, match=message):
            open_torch_dist(made)
    redirect(made, append(made, zipped(inner | numbers)))
    open_torch_dist(made).close()  # the same with nothing wrong
    assert data


def test_other_descriptions_of_the_numbers(made: Path) -> None:
    import torch

    good = torch.zeros(31, 16, dtype=torch.bfloat16)
    for value, message in (
        (good.float(), r"F32 \[31, 16\], \.metadata gives BF16"),
        (good[:30], r"\[30, 16\], \.metadata gives BF16 \[31, 16\]"),
        (torch.zeros(16, 31, dtype=torch.bfloat16).t(), "is not contiguous"),
        (good.to(torch.float8_e4m3fn), "holds torch._utils._rebuild_tensor_v3|not supported"),
        (good.double(), "DoubleStorage are not supported"),
        ([good], "something other than a tensor"),
    ):
        stream = io.BytesIO()
        torch.save(value, stream)
        redirect(made, append(made, stream.getvalue()))
        with pytest.raises(SyneError, match=message):
            open_torch_dist(made)
    stream = io.BytesIO()
    torch.save(
        torch.arange(1000).to(torch.bfloat16)[4:500].view(31, 16), stream
    )  # a view is found in its storage
    redirect(made, append(made, stream.getvalue()))
    opened = open_torch_dist(made)
    (place,) = opened.places["model.embed_tokens.weight"]
    raw = (made / FILE).read_bytes()[place.offset :][:4]
    assert raw == torch.tensor([4, 5]).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()


def test_any_change_to_headers_is_an_error_of_ours_or_none(made: Path) -> None:
    dice = random.Random(0)
    for name in (".metadata", FILE):
        whole = (made / name).read_bytes()
        for _ in range(150):
            changed = bytearray(whole)
            for _ in range(dice.randint(1, 3)):
                changed[dice.randrange(len(whole))] = dice.randrange(256)
            (made / name).write_bytes(changed)
            with contextlib.suppress(SyneError):
                open_torch_dist(made).close()
        (made / name).write_bytes(whole)
