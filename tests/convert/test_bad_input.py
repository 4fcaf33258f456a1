"""Bad input: the right error, a message that names it, and no output at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from roads import to_hf, to_shards
from safetensors.torch import load_file, save_file

from megatron_syne.config.schema import ParallelConfig
from megatron_syne.convert.certificate import verify
from megatron_syne.convert.formats.detect import open_weights
from megatron_syne.errors import (
    CannotCreate,
    ConfigError,
    DataError,
    IOFault,
    MissingInput,
    SecurityRefusal,
    SyneError,
)

INDEX = "model.safetensors.index.json"


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def change_index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / INDEX
        index = json.loads(path.read_text())
        path.write_text(json.dumps(change(index) or index))

    return apply


def change_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Change the tensors of the file that holds the embedding, and the index with them."""

    def apply(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        name = index["weight_map"]["model.embed_tokens.weight"]
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name, {"format": "pt"})
        kept = {t: f for t, f in index["weight_map"].items() if f != name}
        index["weight_map"] = kept | dict.fromkeys(tensors, name)
        (folder / INDEX).write_text(json.dumps(index))

    return apply


def first_file(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def truncate(folder: Path) -> None:
    path = first_file(folder)
    os.truncate(path, path.stat().st_size - 1)


def link_outside(folder: Path) -> None:
    path = first_file(folder)
    path.rename(folder.parent / "elsewhere")
    path.symlink_to("../elsewhere")


def fifo(folder: Path) -> None:
    path = first_file(folder)
    path.unlink()
    os.mkfifo(path)


def only_pickles(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")


def wrong_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.embed_tokens.weight"] = torch.zeros(130, 40)


def extra(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(48)


def wrong_format(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.embed_tokens.weight"] = torch.zeros(131, 40, dtype=torch.int8)


def to_first(name: str) -> Callable[[dict[str, Any]], None]:
    def change(index: dict[str, Any]) -> None:
        index["weight_map"]["model.embed_tokens.weight"] = name

    return change


def move(index: dict[str, Any]) -> None:
    """The index sends a tensor to a file that lacks it."""
    names = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.embed_tokens.weight"] = names[-1]


BAD: dict[str, tuple[Callable[[Path], object], type[SyneError], list[str]]] = {
    "truncated file": (truncate, DataError, ["model-00001", "truncated"]),
    "missing file": (lambda f: first_file(f).unlink(), MissingInput, ["model-00001"]),
    "no weights": (lambda f: [p.unlink() for p in f.glob("model*")], MissingInput, ["no weights", INDEX]),
    "no config": (lambda f: (f / "config.json").unlink(), MissingInput, ["config.json", "manifest.json"]),
    "config cut off": (lambda f: os.truncate(f / "config.json", 50), DataError, ["config.json", "JSON"]),
    "index cut off": (lambda f: os.truncate(f / INDEX, 50), DataError, [INDEX, "JSON"]),
    "index without a map": (change_index(lambda i: {"a": 1}), DataError, ["weight_map"]),
    "index not to text": (change_index(to_first(3)), SecurityRefusal, ["3"]),  # type: ignore[arg-type]
    "index to parent": (change_index(to_first("../x.safetensors")), SecurityRefusal, ["../x"]),
    "index to root": (change_index(to_first("/etc/passwd")), SecurityRefusal, ["/etc/passwd"]),
    "index to a pickle": (change_index(to_first("x.bin")), SecurityRefusal, ["x.bin", "pickle"]),
    "index to another file": (change_index(move), DataError, ["model.embed_tokens.weight", "lacks"]),
    "link to outside": (link_outside, SecurityRefusal, ["leads out", "cp -rL"]),
    "fifo": (fifo, SecurityRefusal, ["regular file"]),
    "pickle": (only_pickles, SecurityRefusal, ["pytorch_model.bin", "pickle"]),
    "both kinds": (lambda f: (f / "model.safetensors").touch(), DataError, ["both", "model.safetensors"]),
    "missing tensor": (
        change_tensors(lambda t: t.pop("model.embed_tokens.weight")),
        DataError,
        ["model.embed_tokens.weight: missing"],
    ),
    "extra tensor": (change_tensors(extra), DataError, ["q_proj.bias", "dropped"]),
    "misshapen tensor": (change_tensors(wrong_shape), DataError, ["[130, 40]", "[131, 40]"]),
    "integer tensor": (change_tensors(wrong_format), DataError, ["I8", "BF16"]),
    "all at once": (
        change_tensors(lambda t: (extra(t), t.pop("model.embed_tokens.weight"))),
        DataError,
        ["q_proj.bias", "embed_tokens.weight: missing", "(2)"],
    ),
    "fewer layers in the config": (
        change_config(num_hidden_layers=3),
        DataError,
        ["model.layers.3.mlp.down_proj.weight", "dropped"],
    ),
    "unknown architecture": (
        change_config(architectures=["GPT2LMHeadModel"]),
        DataError,
        ["GPT2LMHeadModel"],
    ),
    "rope type": (change_config(rope_scaling={"type": "dynamic", "factor": 2.0}), DataError, ["dynamic"]),
    "unknown key": (change_config(logit_softcap=30.0), DataError, ["logit_softcap", "30.0"]),
    "code": (change_config(auto_map={"AutoConfig": "evil.Evil"}), SecurityRefusal, ["auto_map"]),
    "tokenizer code": (
        lambda f: (f / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "evil.Evil"}}'),
        SecurityRefusal,
        ["tokenizer_config.json"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folder(tmp_path: Path, sharded_toy: Path, case: str) -> None:
    damage, error, words = BAD[case]
    damage(sharded_toy)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(SyneError) as caught:
        to_shards(sharded_toy, tmp_path / "out", ParallelConfig())
    assert type(caught.value) is error
    assert all(word in str(caught.value) for word in words), caught.value
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    ("parallel", "words"),
    [
        (ParallelConfig(tensor_model_parallel_size=3), ["3", "num_attention_heads 8", "1, 2, 4, 8"]),
        (ParallelConfig(tensor_model_parallel_size=16), ["num_attention_heads 8", "1, 2, 4, 8"]),
        (ParallelConfig(pipeline_model_parallel_size=5), ["5 stages", "4 layers"]),
        (ParallelConfig(tensor_model_parallel_size=-1), ["-1"]),
    ],
)
def test_bad_layout(tmp_path: Path, toy: Path, parallel: ParallelConfig, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        to_shards(toy, tmp_path / "out", parallel)
    assert all(word in str(caught.value) for word in words), caught.value
    assert os.listdir(tmp_path) == ["toy"]


def test_existing_output(tmp_path: Path, toy: Path) -> None:
    shards = to_shards(toy, tmp_path / "shards", ParallelConfig())
    out = to_hf(shards, tmp_path / "hf")
    before = (out / "certificate.json").read_bytes()
    with pytest.raises(CannotCreate, match="exists already"):
        to_shards(toy, tmp_path / "shards", ParallelConfig())
    with pytest.raises(CannotCreate, match="exists already"):
        to_hf(shards, out)
    for inside in (toy, toy / "new", tmp_path / "shards" / "hf" / "new"):
        with pytest.raises(CannotCreate):
            to_hf(tmp_path / "shards" if "shards" in str(inside) else toy, inside)
    with pytest.raises(CannotCreate, match="source"):
        to_shards(toy, toy / "new", ParallelConfig())
    assert (out / "certificate.json").read_bytes() == before
    to_hf(shards, out, dtype="bf16", overwrite=True)
    assert (out / "certificate.json").read_bytes() != before
    with pytest.raises(CannotCreate, match="not written by this program"):
        to_hf(shards, toy, overwrite=True)


def test_too_little_space_is_known_before(tmp_path: Path, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(IOFault, match="1,000 are free"):
        to_shards(toy, tmp_path / "out", ParallelConfig())
    assert os.listdir(tmp_path) == ["toy"]


def flip(path: Path, where: int) -> None:
    """Change one bit of a file."""
    raw = bytearray(path.read_bytes())
    raw[where] ^= 1
    path.write_bytes(raw)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: flip(f / "mp_rank_01_001/model.safetensors", -1), ["mp_rank_01_001", "padding"]),
        (lambda f: flip(f / "hf/LICENSE", 0), ["LICENSE", "the certificate says"]),
        (lambda f: edit(f / "manifest.json", lambda m: m.update(padded_vocab_size=7)), ["manifest.json"]),
        (
            lambda f: edit(f / "certificate.json", lambda c: c["tensors"].pop("lm_head.weight")),
            ["not in the certificate"],
        ),
        (
            lambda f: edit(
                f / "certificate.json", lambda c: c["tensors"]["lm_head.weight"].update(blake3="0")
            ),
            ["lm_head.weight"],
        ),
        (
            lambda f: edit(
                f / "certificate.json", lambda c: c["tensors"]["model.norm.weight"].update(blake3="0")
            ),
            ["model.norm.weight"],
        ),
        (
            lambda f: edit(
                f / "certificate.json", lambda c: c["slices"]["mp_rank_00_000/model.safetensors"].popitem()
            ),
            ["mp_rank_00_000"],
        ),
        (lambda f: edit(f / "certificate.json", lambda c: c.update(version=9)), ["version 9"]),
        (lambda f: edit(f / "certificate.json", lambda c: c.update(tensors=3)), ["malformed"]),
        (lambda f: edit(f / "certificate.json", lambda c: c.update(slices=[])), ["malformed"]),
        (lambda f: edit(f / "certificate.json", lambda c: c["files"].update(x=3)), ["malformed"]),
    ],
)
def test_verify_names_the_first_difference(
    tmp_path: Path, toy: Path, damage: Callable[[Path], object], words: list[str]
) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    to_shards(toy, tmp_path / "shards", parallel)
    damage(tmp_path / "shards")
    with pytest.raises(DataError) as caught:
        verify(tmp_path / "shards")
    assert all(word in str(caught.value) for word in words), caught.value


def test_verify_sees_dirty_padding(tmp_path: Path, toy: Path) -> None:
    folder = to_shards(toy, tmp_path / "shards", ParallelConfig(tensor_model_parallel_size=2))
    path = folder / "mp_rank_01_000" / "model.safetensors"
    tensors = load_file(path)
    tensors["embedding.word_embeddings.weight"][-1].fill_(1)
    save_file(tensors, path)
    with pytest.raises(DataError, match="mp_rank_01_000"):
        verify(folder)


def test_verify_against_another_source(tmp_path: Path, toy: Path) -> None:
    to_shards(toy, tmp_path / "shards", ParallelConfig())
    verify(tmp_path / "shards", toy)
    flip(toy / "model.safetensors", -1)
    with pytest.raises(DataError, match="not the file that"):
        verify(tmp_path / "shards", toy)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda m: m.update(format="x"), "format"),
        (lambda m: m.pop("model"), "malformed"),
        (lambda m: m["model"].update(surprise=1), "malformed"),
        (lambda m: m["model"].update(rotary_base=1.0), "rotary_base"),
        (lambda m: m["parallel"].update(tensor_model_parallel_size=3), "does not divide"),
        (lambda m: m["parallel"].update(tensor_model_parallel_size="2"), "whole number"),
        (lambda m: m["parallel"].update(tensor_model_parallel_size=1.0), "whole number"),
        (lambda m: m["model"].update(make_vocab_size_divisible_by=0), "whole number"),
        (lambda m: m.update(layers=[[[3, 2, 1, 0]]]), "layers"),
    ],
)
def test_bad_manifest(
    tmp_path: Path, toy: Path, change: Callable[[dict[str, Any]], object], word: str
) -> None:
    to_shards(toy, tmp_path / "shards", ParallelConfig())
    edit(tmp_path / "shards" / "manifest.json", change)
    with pytest.raises(DataError, match=word):
        open_weights(tmp_path / "shards")


def test_shards_lacking_a_rank_or_a_tensor(tmp_path: Path, toy: Path) -> None:
    folder = tmp_path / "shards"
    to_shards(toy, folder, ParallelConfig(tensor_model_parallel_size=2))
    path = folder / "mp_rank_01_000" / "model.safetensors"
    tensors = load_file(path)
    save_file({n: t for n, t in tensors.items() if "fc2" not in n} | {"more": torch.zeros(1)}, path)
    with pytest.raises(DataError) as caught:
        open_weights(folder)
    for word in ("decoder.layers.0.mlp.linear_fc2.weight: missing", "more: unexpected"):
        assert word in str(caught.value)
    path.unlink()
    with pytest.raises(MissingInput, match="mp_rank_01_000"):
        open_weights(folder)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="no such folder"):
        open_weights(tmp_path / "nowhere")
    with pytest.raises(MissingInput, match="looked for"):
        open_weights(tmp_path)


def tool(repository: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command-line tool as a user does."""
    command = [sys.executable, str(repository / "tools" / "convert_checkpoint.py"), *words]
    environment = os.environ | {"PYTHONPATH": str(repository)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)


def test_tool_from_end_to_end(tmp_path: Path, toy: Path, repository: Path) -> None:
    shards, hf = str(tmp_path / "shards"), str(tmp_path / "hf")
    layout = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    for words in (
        ["import", "--from", str(toy), "--out", shards, *layout, "--make-vocab-size-divisible-by", "64"],
        ["verify", shards, "--source", str(toy)],
        ["export", "--from", shards, "--out", hf, "--max-shard-size", "60KB"],
        ["verify", hf],
        ["inspect", shards],
    ):
        done = tool(repository, *words)
        assert done.returncode == 0, done.stderr
    assert "TP 2 x PP 2" in done.stdout and "padded to 256" in done.stdout


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["import", "--from", "TOY", "--out", "OUT", "--tensor-model-parallel-size", "3"], 64, "1, 2, 4"),
        (["import", "--from", "TOY", "--out", "OUT", "--tensor-model-parallel-size", "two"], 64, "two"),
        (["export", "--from", "TOY", "--out", "OUT", "--max-shard-size", "big"], 64, "big"),
        (["import", "--from", "nowhere", "--out", "OUT"], 66, "nowhere"),
        (["import", "--from", "TOY", "--out", "TOY"], 73, "source"),
        (["import", "--from", "PICKLE", "--out", "OUT"], 77, "pickle"),
        (["import", "--from", "SHORT", "--out", "OUT"], 65, "truncated"),
        (["verify", "TOY"], 66, "certificate.json"),
    ],
)
def test_tool_exit_codes(
    tmp_path: Path, toy: Path, toy_maker: Any, repository: Path, words: list[str], code: int, message: str
) -> None:
    names = {"TOY": toy, "OUT": tmp_path / "out", "PICKLE": tmp_path / "pickle", "SHORT": tmp_path / "short"}
    if "PICKLE" in words:
        only_pickles(toy_maker(names["PICKLE"], shard="50KB"))
    if "SHORT" in words:
        truncate(toy_maker(names["SHORT"]))
    done = tool(repository, *[str(names.get(word, word)) for word in words])
    assert done.returncode == code, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
