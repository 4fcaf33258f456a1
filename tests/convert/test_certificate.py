"""A certificate is derived from the files again, and whatever was changed is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_toys import PLANS, make_source, opened, several_files, shards

from megatron_syne.convert.certificate import CERTIFICATE, read_certificate, verify, weights_fingerprint
from megatron_syne.convert.engine import convert
from megatron_syne.convert.formats.detect import open_weights
from megatron_syne.convert.formats.hf import plan_hf
from megatron_syne.convert.streams import StoredWeights
from megatron_syne.errors import DataError, MissingInput, SyneError


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``source`` and a folder of every kind made from it; ``again`` is a Hugging Face folder from the shards."""
    root = tmp_path_factory.mktemp("certificates")
    source = make_source(root / "source")
    for name, plan in PLANS.items():
        convert(opened(source), plan(opened(source)), root / name)
    weights = open_weights(root / "shards")
    convert(weights, several_files(weights), root / "again")
    return root


@pytest.fixture
def copy(folders: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one of them, to be damaged."""
    return lambda name: Path(shutil.copytree(folders / name, tmp_path / name))


@pytest.mark.parametrize("name", [*PLANS, "again"])
def test_what_was_converted_verifies(folders: Path, name: str) -> None:
    calls: list[tuple[str, int, int]] = []
    found = verify(folders / name, folders / "source", progress=lambda *call: calls.append(call))
    certificate = read_certificate(folders / name)
    assert found.kind == certificate["kind"]
    assert found.tensors == len(certificate["tensors"]) == len(opened(folders / "source").shapes)
    assert found.fingerprint == weights_fingerprint(certificate["tensors"]) and found.notes == []
    assert {what for what, _, _ in calls} == {"verifying", "source"}
    assert all(done <= total for _, done, total in calls)


def test_one_fingerprint_in_every_format(folders: Path) -> None:
    assert len({verify(folders / name).fingerprint for name in [*PLANS, "again"]}) == 1


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)
        stream.seek(at)
        stream.write(bytes([byte[0] ^ 0x40]))


@pytest.mark.parametrize("name", PLANS)
def test_a_flipped_byte_of_every_tensor_is_named(copy: Callable[[str], Path], name: str) -> None:
    """In every place that it has: the replicas of other ranks too."""
    folder = copy(name)
    weights = open_weights(folder)
    checked = 0
    for tensor in (
        "model.norm.weight",
        "model.layers.2.mlp.down_proj.weight",
        "model.layers.0.self_attn.k_proj.weight",
    ):
        for place in [*weights.places[tensor], *weights.replicas.get(tensor, [])]:
            at = place.rows_at(place.piece.rows)[0] + 1
            flip(folder / place.file, at)
            with pytest.raises(DataError, match=tensor) as error:
                verify(folder)
            assert place.file in str(error.value) or place.parameter in str(error.value)
            flip(folder / place.file, at)
            checked += 1
    weights.close()
    assert checked >= 3 and verify(folder).kind == name


@pytest.mark.parametrize("name", PLANS)
def test_no_byte_goes_unchecked(copy: Callable[[str], Path], name: str) -> None:
    """Header, padding, the ends of an archive, documents: bytes from all over every file."""
    folder = copy(name)
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CERTIFICATE):
        size = path.stat().st_size
        for at in sorted({0, 7, size // 3, size // 2, max(0, size - 30), size - 1}):
            if at < size:
                flip(path, at)
                with pytest.raises(SyneError) as error:
                    verify(folder)
                assert str(folder) in str(error.value)
                flip(path, at)
    verify(folder)


def test_padding_that_is_not_zero(copy: Callable[[str], Path]) -> None:
    folder = copy("shards")
    weights = open_weights(folder)
    last = weights.places["model.embed_tokens.weight"][-1]
    weights.close()
    flip(folder / last.file, last.rows_at(last.piece.rows)[0] + 489 * 256)
    with pytest.raises(DataError, match=r"rows \[489, 512\] are padding, but not zero"):
        verify(folder)


def test_files_that_came_or_went(copy: Callable[[str], Path]) -> None:
    folder = copy("shards")
    (folder / "hf" / "more.json").write_text("{}")
    with pytest.raises(DataError, match=r"hf/more.json: not in the certificate"):
        verify(folder)
    (folder / "hf" / "more.json").unlink()
    (folder / "hf" / "LICENSE").unlink()
    with pytest.raises(DataError, match=r"hf/LICENSE: missing"):
        verify(folder)
    (folder / CERTIFICATE).unlink()
    with pytest.raises(MissingInput, match="no such file"):
        verify(folder)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda c: c["slices"]["mp_rank_01_000/model.safetensors"].popitem(), "slices"),
        (
            lambda c: c["slices"]["mp_rank_01_000/model.safetensors"][
                "embedding.word_embeddings.weight"
            ].update(padding_rows=[489, 513]),
            "slices",
        ),
        (lambda c: c["slices"].pop("mp_rank_01_001/model.safetensors"), "mp_rank_01_001"),
        (lambda c: c["tensors"].pop("model.norm.weight"), "model.norm.weight is not in the certificate"),
        (lambda c: c["tensors"]["model.norm.weight"].update(shape=[127]), "model.norm.weight"),
        (lambda c: c["tensors"]["model.norm.weight"].update(dtype="F16"), "model.norm.weight"),
        (lambda c: c["tensors"]["model.norm.weight"].update(blake3="00"), "model.norm.weight"),
        (lambda c: c["files"]["mp_rank_01_001/model.safetensors"].update(rest="00"), "header, padding"),
        (lambda c: c["files"]["mp_rank_01_001/model.safetensors"].update(size=3), "size"),
        (lambda c: c["documents"]["manifest.json"].update(sha256="00"), "manifest.json: sha256"),
        (lambda c: c.update(kind="hf"), "kind"),
    ],
)
def test_a_certificate_that_says_something_else(
    copy: Callable[[str], Path], edit: Callable[[dict[str, Any]], None], named: str
) -> None:
    folder = copy("shards")
    raw = json.loads((folder / CERTIFICATE).read_text())
    edit(raw)
    (folder / CERTIFICATE).write_text(json.dumps(raw))
    with pytest.raises(DataError, match=named):
        verify(folder)


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: c.update(version=3),
        lambda c: c.update(format="other"),
        lambda c: c.update(kind="other"),
        lambda c: c.update(ignored=None),
        lambda c: c.pop("slices"),
        lambda c: c.update(tensors=[]),
        lambda c: c["tensors"].update(x={"dtype": "F16"}),
        lambda c: c["files"].update(x=3),
        lambda c: c["source"].pop("files"),
        lambda c: c["source"].update(files={"x": {"size": "1", "sha256": ""}}),
        lambda c: c["slices"].update(x={"y": {"pieces": "z", "padding_rows": None}}),
    ],
)
def test_malformed_certificates(copy: Callable[[str], Path], edit: Callable[[dict[str, Any]], None]) -> None:
    folder = copy("hf")
    raw = json.loads((folder / CERTIFICATE).read_text())
    edit(raw)
    (folder / CERTIFICATE).write_text(json.dumps(raw))
    with pytest.raises(DataError, match=CERTIFICATE):
        read_certificate(folder)


def test_an_old_certificate_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / CERTIFICATE).write_text('{"format": "megatron_syne.certificate", "version": 1}')
    with pytest.raises(DataError, match="convert the source again"):
        read_certificate(tmp_path)


class TestSource:
    """With the folder that it should be made from."""

    def test_another_source(self, folders: Path, tmp_path: Path) -> None:
        other = Path(shutil.copytree(folders / "source", tmp_path / "source"))
        flip(other / "model.safetensors", (other / "model.safetensors").stat().st_size - 1)
        for name in [*PLANS, "again"]:
            with pytest.raises(DataError, match=r"model\.safetensors is not the file that .* was made from"):
                verify(folders / name, other)
        smaller = make_source(tmp_path / "smaller", vocab_size=1000)
        with pytest.raises(DataError, match="shape"):
            verify(folders / "shards", smaller)

    def test_the_source_one_step_back(self, folders: Path) -> None:
        assert verify(folders / "again", folders / "shards").notes == []
        with pytest.raises(DataError, match=r"is not there, but .* was made from a file of that name"):
            verify(folders / "again", folders / "torch_dist")

    def test_formats_that_were_changed(self, tmp_path: Path) -> None:
        source = make_source(tmp_path / "source", "F32")
        convert(opened(source), plan_hf(opened(source), dtype="BF16"), tmp_path / "hf")
        number = len(opened(source).shapes)
        assert verify(tmp_path / "hf", source).notes == [f"{number} tensors were converted from F32 to BF16"]

    def test_weights_that_an_operation_changed(self, tmp_path: Path) -> None:
        class Halved(StoredWeights):
            def describe(self) -> dict[str, Any]:
                return {"kind": "halving", "certificate": None}

        source = make_source(tmp_path / "source")
        weights = opened(source)
        changed = Halved(**{key: getattr(weights, key) for key in weights.__dataclass_fields__})
        convert(changed, shards(changed), tmp_path / "shards")
        (note,) = verify(tmp_path / "shards", source).notes
        assert "halving changed the weights" in note
