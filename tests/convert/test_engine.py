"""The engine writes what the plan says, whatever the tiles; the certificate is true; nothing else is left."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from engine_toys import PLANS, contents, make_source, opened, read_all, several_files, shards, write_naively

from megatron_syne.convert import engine, outfile, tiles
from megatron_syne.convert.certificate import CERTIFICATE, read_certificate
from megatron_syne.convert.engine import convert, estimate
from megatron_syne.convert.formats.detect import open_weights
from megatron_syne.convert.formats.hf import plan_hf
from megatron_syne.convert.numbers import from_float32, to_float32
from megatron_syne.errors import CannotCreate, DataError, StoppedCleanly


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("engine") / "source")


@pytest.fixture(params=["as it is", "small", "tiny", "no direct writes"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Tiles and stages: as used, a few rows, and less than one row; and a file system without O_DIRECT."""
    if request.param in ("small", "tiny"):
        page = outfile.PAGE
        monkeypatch.setattr(tiles, "TILE_BYTES", 9000 if request.param == "small" else 100)
        monkeypatch.setattr(tiles, "HASH_BLOCK_BYTES", 1000)
        monkeypatch.setattr(outfile, "_LEAST_STAGE", 2 * page)
        monkeypatch.setattr(outfile, "STAGE_BYTES", 3 * page)
        monkeypatch.setattr(outfile, "STAGES_BYTES", 7 * page)
    if request.param == "no direct writes":
        monkeypatch.setattr(os, "O_DIRECT", 0)
    return str(request.param)


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize("plan", PLANS)
def test_every_byte_is_where_the_plan_says(
    source: Path, tmp_path: Path, sizes: str, plan: str, jobs: int
) -> None:
    weights = opened(source)
    target = PLANS[plan](weights)
    certificate = convert(weights, target, tmp_path / "out", jobs=jobs)
    found = contents(tmp_path / "out")
    assert json.loads(found.pop(CERTIFICATE)) == certificate == read_certificate(tmp_path / "out")
    expected = write_naively(weights, target)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(("before", "after"), [("F32", "BF16"), ("BF16", "F32"), ("F16", "BF16")])
@pytest.mark.parametrize("plan", PLANS)
def test_formats_are_converted(tmp_path: Path, plan: str, before: str, after: str) -> None:
    weights = opened(make_source(tmp_path / "source", before))
    target = PLANS[plan](weights, dtype=after)
    certificate = convert(weights, target, tmp_path / "out")
    found = contents(tmp_path / "out")
    del found[CERTIFICATE]
    assert found == write_naively(weights, target)
    assert {tensor["dtype"] for tensor in certificate["tensors"].values()} == {after}


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_values_stored_in_another_form(tmp_path: Path, dtype: str) -> None:
    """Weights that lie in fp32 and less 1, as the norms of a zero-centred model do: the certificate is of the
    numbers that a reader gets, names those that are not as they were, and a bit below bf16's last one is not
    let through either."""
    weights = opened(make_source(tmp_path / "source", dtype))
    target = plan_hf(weights, dtype="F32")
    target.dtypes = dict(weights.dtypes)
    target.places = {n: [replace(p, shift=-1.0) for p in own] for n, own in target.places.items()}
    certificate = convert(weights, target, tmp_path / "out")
    found = contents(tmp_path / "out")
    del found[CERTIFICATE]
    assert found == write_naively(weights, target)
    name = "model.norm.weight"
    numbers = to_float32(read_all(weights, name), dtype)
    seen = from_float32((numbers - np.float32(1)) + np.float32(1), dtype)
    assert certificate["tensors"][name]["blake3"] == blake3(seen.tobytes()).hexdigest()
    assert (name in certificate["source"].get("rounded", [])) == (dtype == "F32")
    assert (seen != read_all(weights, name)).any() == (dtype == "F32")
    path = tmp_path / "out" / "model.safetensors"
    with path.open("r+b") as stream:
        stored = replace(
            weights, folder=path.parent, places=target.places, descriptors={path.name: stream.fileno()}
        )
        options = (name, dtype, target.places[name], tiles.Buffers(), lambda size: None)
        assert tiles.hash_tensor(stored, *options) == certificate["tensors"][name]["blake3"]
        stream.seek(target.places[name][0].offset)
        low = stream.read(1)[0]
        stream.seek(target.places[name][0].offset)
        stream.write(bytes([low ^ 1]))
        stream.flush()
        if dtype == "F32":
            assert tiles.hash_tensor(stored, *options) != certificate["tensors"][name]["blake3"]
        else:
            with pytest.raises(DataError, match="not the same as in its other places"):
                tiles.hash_tensor(stored, *options)


@pytest.mark.parametrize("plan", PLANS)
def test_the_certificate_is_true(source: Path, tmp_path: Path, plan: str) -> None:
    """Recomputed here from the definitions."""
    weights = opened(source)
    target = PLANS[plan](weights)
    certificate = convert(weights, target, tmp_path / "out")
    for name, tensor in certificate["tensors"].items():
        assert tensor["blake3"] == blake3(read_all(weights, name).tobytes()).hexdigest()
    assert certificate["source"]["files"]["model.safetensors"] == {
        "size": (source / "model.safetensors").stat().st_size,
        "sha256": hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest(),
    }
    for name, entry in certificate["documents"].items():
        raw = (tmp_path / "out" / name).read_bytes()
        assert entry == {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    for name, entry in certificate["files"].items():
        raw = (tmp_path / "out" / name).read_bytes()
        mask = bytearray(len(raw))
        for place in (p for own in target.places.values() for p in own if p.file == name):
            start, stride = place.rows_at(place.piece.rows)
            width = (place.piece.cols[1] - place.piece.cols[0]) * 2
            for row in range(place.piece.rows[1] - place.piece.rows[0]):
                at = start + row * stride
                assert not any(mask[at : at + width]), "two places overlap"
                mask[at : at + width] = b"\1" * width
        rest = bytes(byte for byte, taken in zip(raw, mask, strict=True) if not taken)
        assert entry == {"size": len(raw), "rest": blake3(rest).hexdigest()}


def test_padding_and_pieces_are_named(source: Path, tmp_path: Path) -> None:
    certificate = convert(opened(source), shards(opened(source)), tmp_path / "out")
    embedding = "embedding.word_embeddings.weight"
    first, second = (certificate["slices"][f"mp_rank_0{i}_000/model.safetensors"][embedding] for i in (0, 1))
    assert first == {"pieces": ["model.embed_tokens.weight[0:512, 0:128] at (0, 0)"], "padding_rows": None}
    assert second == {
        "pieces": ["model.embed_tokens.weight[512:1001, 0:128] at (0, 0)"],
        "padding_rows": [489, 512],
    }


def test_the_same_again_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for name, jobs in (("a", 1), ("b", 4)):
        convert(opened(source), shards(opened(source)), tmp_path / name, jobs=jobs)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def insert_buffer(path: Path, name: str) -> None:
    """Put 100 bytes of another tensor behind the first one of a safetensors file."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    at = min(entry["data_offsets"][1] for tensor, entry in header.items() if tensor != "__metadata__")
    for entry in (entry for tensor, entry in header.items() if tensor != "__metadata__"):
        if entry["data_offsets"][0] >= at:
            entry["data_offsets"] = [offset + 100 for offset in entry["data_offsets"]]
    header[name] = {"dtype": "F32", "shape": [25], "data_offsets": [at, at + 100]}
    text = json.dumps(header).encode()
    path.write_bytes(
        len(text).to_bytes(8, "little") + text + raw[start : start + at] + bytes(100) + raw[start + at :]
    )


def test_source_files_are_hashed_as_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several files, with tensors that are not the model's between, finished in part by an earlier run."""
    source = make_source(tmp_path / "source")
    weights = opened(source)
    convert(weights, several_files(weights), tmp_path / "several")
    (tmp_path / "several" / CERTIFICATE).unlink()
    index = tmp_path / "several" / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    first = tmp_path / "several" / min(raw["weight_map"].values())
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    insert_buffer(first, buffer)
    raw["weight_map"][buffer] = first.name
    index.write_text(json.dumps(raw))

    def stop_at(step: int) -> None:
        real, calls = engine.write_tensor, 0

        def call(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == step:
                raise KeyboardInterrupt
            return real(*arguments)

        with monkeypatch.context() as patch, pytest.raises(StoppedCleanly):
            patch.setattr(engine, "write_tensor", call)
            convert(opened(folder), shards(opened(folder)), tmp_path / "out", jobs=1)

    folder = tmp_path / "several"
    assert opened(folder).ignored == [buffer]
    stop_at(4)
    stop_at(9)
    found = convert(opened(folder), shards(opened(folder)), tmp_path / "out")
    assert found["source"]["files"] == {
        path.name: {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.glob("*.safetensors")
    }
    assert found["tensors"] == convert(weights, shards(weights), tmp_path / "plain")["tensors"]


def test_the_chain_leads_to_the_first_source(source: Path, tmp_path: Path) -> None:
    first = convert(opened(source), shards(opened(source)), tmp_path / "shards")
    weights = open_weights(tmp_path / "shards")
    second = convert(weights, several_files(weights), tmp_path / "hf")
    assert second["source"]["certificate"] == first["source"]
    assert second["tensors"] == first["tensors"]


def test_progress_counts_written_bytes(source: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    target = several_files(opened(source))
    convert(opened(source), target, tmp_path / "out", progress=lambda *call: calls.append(call))
    assert {call[0] for call in calls} == {"writing"}
    total = 2 * _elements(opened(source))
    assert calls[-1][1:] == (total, total)
    assert [call[1] for call in calls] == sorted(call[1] for call in calls)


def _elements(weights: Any) -> int:
    return sum(read_all(weights, name).size // 2 for name in weights.shapes)


def test_estimate(source: Path, tmp_path: Path) -> None:
    target = shards(opened(source))
    found = estimate(opened(source), target, 2)
    convert(opened(source), target, tmp_path / "out")
    written = contents(tmp_path / "out")
    assert found.files == len(written)
    assert found.write_bytes == sum(map(len, written.values())) - len(written[CERTIFICATE])
    size = 2 * _elements(opened(source))
    assert found.read_bytes == size, "each file once, for its tensors and its own hash"
    stored = open_weights(tmp_path / "out")
    assert estimate(stored, several_files(stored), 2).read_bytes == size, "certified: no hash of files"
    stored.certificate = None
    files = sum(path.stat().st_size for path in stored.files().values())
    assert estimate(stored, several_files(stored), 2).read_bytes == size + files
    assert estimate(opened(source), target, 4).memory_bytes > found.memory_bytes


class TestRefusals:
    """Nothing is written, nothing is left."""

    def test_a_plan_that_leaves_weights_out(self, source: Path, tmp_path: Path) -> None:
        weights = opened(source)
        target = several_files(weights)
        target.places["model.norm.weight"] = []
        target.places["lm_head.weight"] = [*shards(weights).places["lm_head.weight"][:1]]
        target.places["more"] = []
        with pytest.raises(DataError) as error:
            convert(weights, target, tmp_path / "out")
        text = str(error.value)
        assert "(3):" in text and "more: no tensor" in text
        assert "model.norm.weight: 0 of 128" in text and "lm_head.weight: 65536 of 128128" in text
        assert os.listdir(tmp_path) == []

    def test_values_that_do_not_fit(self, tmp_path: Path) -> None:
        source = make_source(tmp_path / "source", "F32")
        with (source / "model.safetensors").open("r+b") as stream:
            stream.seek(-4, os.SEEK_END)
            stream.write(b"\0\0\x80\x4f")  # 2**32
        with pytest.raises(DataError, match=r"lm_head\.weight.*fp16"):
            convert(opened(source), several_files(opened(source), dtype="F16"), tmp_path / "out")
        assert os.listdir(tmp_path) == ["source"]

    def test_a_source_that_changes(self, tmp_path: Path) -> None:
        source = make_source(tmp_path / "source")

        def touch(what: str, done: int, total: int) -> None:
            with (source / "model.safetensors").open("r+b") as stream:
                stream.seek(-1, os.SEEK_END)
                stream.write(b"\0")

        with pytest.raises(DataError, match="the source changed while it was read"):
            convert(opened(source), shards(opened(source)), tmp_path / "out", progress=touch)
        assert os.listdir(tmp_path) == ["source"]

    def test_a_source_that_is_cut_short(self, tmp_path: Path) -> None:
        source = make_source(tmp_path / "source")
        weights = opened(source)
        target = shards(weights)
        os.truncate(source / "model.safetensors", 400_000)
        with pytest.raises(DataError, match="too early"):
            convert(weights, target, tmp_path / "out")
        assert os.listdir(tmp_path) == ["source"]

    def test_outputs_that_may_not_be(self, source: Path, tmp_path: Path) -> None:
        weights = opened(source)
        for out, why in (
            (source, "is, holds or lies inside"),
            (source / "out", "is, holds or lies inside"),
            (source.parent, "is, holds or lies inside"),
            (tmp_path / "no" / "out", "no folder"),
        ):
            with pytest.raises(CannotCreate, match=why):
                convert(weights, shards(weights), out, overwrite=True)
        (tmp_path / "out").mkdir()
        with pytest.raises(CannotCreate, match="exists already"):
            convert(weights, shards(weights), tmp_path / "out")
        with pytest.raises(CannotCreate, match="was not written by this program"):
            convert(weights, shards(weights), tmp_path / "out", overwrite=True)
        assert os.listdir(tmp_path) == ["out"] and sorted(os.listdir(source)) == [
            "LICENSE",
            "config.json",
            "model.safetensors",
        ]

    def test_what_lies_in_the_way_of_the_scratch_folder(self, source: Path, tmp_path: Path) -> None:
        """A planted link or a folder that others can write to is not worked in."""
        weights, scratch = opened(source), tmp_path / ".out.partial"
        victim = tmp_path / "victim"
        victim.mkdir()
        (victim / "file").write_text("keep")
        scratch.symlink_to(victim)
        with pytest.raises(CannotCreate, match="in the way"):
            convert(weights, shards(weights), tmp_path / "out")
        scratch.unlink()
        scratch.mkdir()
        scratch.chmod(0o777)
        with pytest.raises(CannotCreate, match="in the way"):
            convert(weights, shards(weights), tmp_path / "out")
        assert contents(victim) == {"file": b"keep"} and not list(scratch.iterdir())


def test_overwrite_replaces_all(source: Path, tmp_path: Path) -> None:
    weights, out = opened(source), tmp_path / "out"
    convert(weights, shards(weights), out)
    convert(weights, several_files(weights), out, overwrite=True)
    found = contents(out)
    assert found.keys() == write_naively(weights, several_files(weights)).keys() | {CERTIFICATE}
    assert os.listdir(tmp_path) == ["out"]


def test_an_output_made_meanwhile_is_not_replaced(source: Path, tmp_path: Path) -> None:
    def meanwhile(*_: Any) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)

    with pytest.raises(CannotCreate, match="exists already"):
        convert(opened(source), shards(opened(source)), tmp_path / "out", progress=meanwhile)
    assert os.listdir(tmp_path) == ["out"] and not os.listdir(tmp_path / "out")
