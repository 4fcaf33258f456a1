"""Hugging Face folders: what transformers writes is read, what we plan transformers reads, what is wrong is
refused. More bad folders in tests/convert/test_bad_input.py."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from format_toys import CONFIG, ToyWeights, read, same, toy_model, write
from safetensors.torch import load_file, save_file

from megatron_syne.convert.files import open_inside
from megatron_syne.convert.formats.detect import open_weights
from megatron_syne.convert.formats.hf import open_hf, parse_size, plan_hf
from megatron_syne.errors import ConfigError, DataError, MissingInput, SecurityRefusal


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A folder of one file."""
    weights = ToyWeights(toy_model())
    return write(weights, plan_hf(weights), tmp_path / "toy")


def change(path: Path, **changes: torch.Tensor) -> None:
    save_file(load_file(path) | changes, path, {"format": "pt"})


def test_what_transformers_writes(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).bfloat16()
    for shard in ("5GB", "8KB"):
        model.save_pretrained(tmp_path / shard, max_shard_size=shard)
        weights = open_hf(tmp_path / shard)
        expected = model.state_dict()
        assert weights.shapes.keys() == expected.keys()
        for name, tensor in expected.items():
            assert weights.dtypes[name] == "BF16"
            assert read(weights, name).tobytes() == tensor.view(torch.uint8).numpy().tobytes()
        assert (len(weights.files()) > 1) == (shard == "8KB")
        weights.close()


@pytest.mark.parametrize("shard", ["5GB", "4KB"])
def test_what_we_plan_transformers_reads(tmp_path: Path, shard: str) -> None:
    from transformers import LlamaForCausalLM

    weights = ToyWeights(toy_model(rope_theta=7777.0))
    folder = write(weights, plan_hf(weights, max_shard_size=shard), tmp_path / "out")
    model, info = LlamaForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.rope_theta == 7777.0 and model.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        assert read(weights, name).tobytes() == tensor.view(torch.uint8).numpy().tobytes()
    if shard == "4KB":
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        assert sorted(set(index["weight_map"].values())) == names and len(names) > 3
        assert index["weight_map"].keys() == weights.shapes.keys()
        assert index["metadata"]["total_size"] == sum(read(weights, name).nbytes for name in weights.shapes)
        for name in names:
            own = [tensor for tensor, file in index["weight_map"].items() if file == name]
            assert len(own) == 1 or sum(read(weights, tensor).nbytes for tensor in own) <= 4000


def test_formats_may_differ_and_be_changed(tmp_path: Path) -> None:
    mixed = ToyWeights(toy_model(), "BF16", **{"model.norm.weight": "F32", "lm_head.weight": "F16"})
    folder = write(mixed, plan_hf(mixed), tmp_path / "a")
    assert same(open_hf(folder), mixed)
    target = plan_hf(open_hf(folder), dtype="F32")
    assert set(target.dtypes.values()) == {"F32"}
    assert json.loads(target.documents["config.json"])["dtype"] == "float32"
    wide = open_hf(write(open_hf(folder), target, tmp_path / "b"))
    loaded, expected = load_file(tmp_path / "b/model.safetensors"), load_file(folder / "model.safetensors")
    assert all(torch.equal(loaded[name], expected[name].float()) for name in loaded)
    assert same(
        open_hf(write(wide, plan_hf(wide, dtype="BF16"), tmp_path / "c")), ToyWeights(mixed.model)
    ) is (
        False  # lm_head went through fp16
    )
    with pytest.raises(ConfigError, match=r"F8.*known"):
        plan_hf(mixed, dtype="F8")


def test_documents(tmp_path: Path, toy: Path) -> None:
    """The configuration keeps what the source's had; licence and tokenizer travel; a tokenizer is not mixed."""
    path = toy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": 7, "_name_or_path": "x/y"}))
    for name, text in {
        "LICENSE": "terms",
        "tokenizer.json": "{}",
        "merges.txt": "a b",
        "evil.py": "",
    }.items():
        (toy / name).write_text(text)
    (toy / "tokenizer_config.json").write_text('{"a": 1}')
    documents = plan_hf(open_hf(toy)).documents
    assert sorted(documents) == [
        "LICENSE",
        "config.json",
        "merges.txt",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert json.loads(documents["config.json"])["pad_token_id"] == 7
    own = tmp_path / "own"
    own.mkdir()
    (own / "tokenizer.model").write_bytes(b"spm")
    documents = plan_hf(open_hf(toy), tokenizer_dir=own).documents
    assert sorted(documents) == ["LICENSE", "config.json", "tokenizer.model", "tokenizer_config.json"]
    (own / "tokenizer_config.json").write_text('{"auto_map": {}}')
    with pytest.raises(SecurityRefusal, match="auto_map"):
        plan_hf(open_hf(toy), tokenizer_dir=own)


def test_documents_of_an_operation_go_first(toy: Path) -> None:
    weights = ToyWeights(toy_model())
    weights.artifacts_dir = toy
    (toy / "tokenizer.model").write_text("old")
    (toy / "LICENSE").write_text("terms")
    weights.documents = {"tokenizer.json": b"new", "surgery.json": b"{}"}
    documents = plan_hf(weights).documents
    assert sorted(documents) == ["LICENSE", "config.json", "surgery.json", "tokenizer.json"]


def test_tied_copies_and_old_buffers(tmp_path: Path) -> None:
    tied = ToyWeights(toy_model(tie_word_embeddings=True))
    folder = write(tied, plan_hf(tied), tmp_path / "toy")
    path = folder / "model.safetensors"
    copy = load_file(path)["model.embed_tokens.weight"].clone()
    change(path, **{"lm_head.weight": copy, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(3)})
    weights = open_hf(folder)
    assert weights.ignored == ["model.layers.0.self_attn.rotary_emb.inv_freq", "lm_head.weight"]
    assert same(weights, tied)
    assert [place.parameter for place in weights.replicas["model.embed_tokens.weight"]] == ["lm_head.weight"]
    for other in (
        copy.index_put((torch.tensor(30), torch.tensor(15)), torch.tensor(3.0).bfloat16()),
        copy.float(),
    ):
        change(path, **{"lm_head.weight": other})
        with pytest.raises(DataError, match=r"lm_head\.weight.*tie_word_embeddings"):
            open_hf(folder)


def test_no_descriptor_stays_open_after_a_refusal(toy: Path) -> None:
    before = os.listdir("/proc/self/fd")
    change(toy / "model.safetensors", extra=torch.zeros(3))
    with pytest.raises(DataError, match=r"extra: not a tensor of this model"):
        open_hf(toy)
    open_path = toy / "config.json"
    open_path.unlink()
    with pytest.raises(MissingInput):
        open_hf(toy)
    assert os.listdir("/proc/self/fd") == before


def test_a_file_cut_off_while_it_is_open_is_an_error(toy: Path) -> None:
    weights = open_hf(toy)
    os.truncate(toy / "model.safetensors", 5000)
    with pytest.raises(DataError, match="too early"):
        for name in weights.shapes:
            read(weights, name)


BLOB = "0123456789abcdef" * 4


@pytest.fixture
def cache(tmp_path: Path, toy: Path) -> Path:
    """The toy as the Hugging Face cache keeps it; its snapshot."""
    repository = tmp_path / "hub" / "models--some--toy"
    snapshot = repository / "snapshots" / BLOB[:40]
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for index, path in enumerate(sorted(toy.iterdir())):
        blob = f"{index:x}" + (BLOB[1:] if path.suffix == ".safetensors" else BLOB[1:40])
        path.rename(repository / "blobs" / blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob}")
    return snapshot


def test_the_hub_cache(cache: Path, tmp_path: Path) -> None:
    weights = open_weights(cache)
    assert same(weights, ToyWeights(toy_model()))
    assert weights.describe()["folder"] == BLOB[:40]
    (tmp_path / "link").symlink_to(cache)
    open_weights(tmp_path / "link").close()


def test_the_hub_caches_own_layout() -> None:
    """The library itself keeps files where we let links lead."""
    from huggingface_hub.file_download import repo_folder_name

    assert repo_folder_name(repo_id="some/toy", repo_type="model") == "models--some--toy"


@pytest.mark.parametrize(
    "case",
    ["elsewhere", "another repository", "not a hash", "a blob that leads out", "a folder of blobs elsewhere"],
)
def test_other_links_out_of_the_cache(cache: Path, tmp_path: Path, case: str) -> None:
    repository, link = cache.parent.parent, cache / "model.safetensors"
    blob = link.resolve()
    link.unlink()
    outside = tmp_path / "outside"
    outside.mkdir()
    if case == "elsewhere":
        blob.rename(repository / blob.name)
        link.symlink_to(f"../../{blob.name}")
    elif case == "another repository":
        other = repository.parent / "models--some--other" / "blobs"
        other.mkdir(parents=True)
        blob.rename(other / blob.name)
        link.symlink_to(other / blob.name)
    elif case == "not a hash":
        blob.rename(blob.with_name("secret"))
        link.symlink_to("../../blobs/secret")
    elif case == "a blob that leads out":
        blob.rename(outside / blob.name)
        blob.symlink_to(outside / blob.name)
        link.symlink_to(f"../../blobs/{blob.name}")
    else:
        link.symlink_to(f"../../blobs/{blob.name}")
        for path in (repository / "blobs").iterdir():
            path.rename(outside / path.name)
        (repository / "blobs").rmdir()
        (repository / "blobs").symlink_to(outside)
    with pytest.raises(SecurityRefusal, match="leads out"):
        os.close(open_inside(cache, "model.safetensors"))


def test_the_same_links_elsewhere_are_refused(cache: Path) -> None:
    """It is the cache's layout that is trusted, not the form of the link."""
    for name, new in (("snapshots", "shots"), ("models--some--toy", "some--toy")):
        folder = next(parent for parent in cache.parents if parent.name == name)
        moved = folder.rename(folder.with_name(new))
        with pytest.raises(SecurityRefusal, match="leads out"):
            os.close(open_inside(moved / cache.relative_to(folder), "config.json"))
        moved.rename(folder)
    os.close(open_inside(cache, "config.json"))


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), (7, 7), ("2k", 2000)])
def test_sizes(text: Any, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5XB", "0", "1e9", "5GB5"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="max_shard_size"):
        parse_size(text)
