"""The tools as a user calls them: each command once from end to end, and what they say when they refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file


def tool(repository: Path, name: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repository / "tools" / f"{name}.py"), *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(repository)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)


def done(repository: Path, name: str, *words: object) -> str:
    """Output of a command that must succeed."""
    result = tool(repository, name, *words)
    assert result.returncode == 0, result.stderr
    return result.stdout


def weights_of(folder: Path) -> dict[str, Any]:
    return load_file(folder / "model.safetensors")


def test_every_format_leads_back(tmp_path: Path, toy: Path, repository: Path) -> None:
    """Hugging Face -> torch_dist -> shards -> shards of another layout -> Hugging Face."""
    convert = "convert_checkpoint"
    roads = [
        ("import", toy, tmp_path / "dist", "--format", "torch_dist", "--make-vocab-size-divisible-by", 16),
        ("import", tmp_path / "dist", tmp_path / "a", "--pipeline-model-parallel-size", 4),
        ("import", tmp_path / "a", tmp_path / "b", "--tensor-model-parallel-size", 8),
        ("export", tmp_path / "b", tmp_path / "hf"),
    ]
    for command, source, out, *more in roads:
        done(repository, convert, command, "--from", source, "--out", out, *more)
        assert "verified" in done(repository, convert, "verify", out, "--source", toy)
    before, after = weights_of(toy), weights_of(tmp_path / "hf")
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) and before[name].dtype == after[name].dtype for name in before)
    chain = json.loads((tmp_path / "hf" / "certificate.json").read_text())["source"]
    for kind in ("shards", "shards", "torch_dist", "hf"):
        assert chain["kind"] == kind
        chain = chain.get("certificate")
    assert chain is None


def test_dry_run_writes_nothing_and_tells_the_truth(tmp_path: Path, toy: Path, repository: Path) -> None:
    for words in (
        ["import", "--tensor-model-parallel-size", 2],
        ["import", "--format", "torch_dist"],
        ["export"],
    ):
        command, *more = words
        out = tmp_path / "out"
        words = [command, "--from", toy, "--out", out, *more]
        told = done(repository, "convert_checkpoint", *words, "--dry-run")
        assert os.listdir(tmp_path) == ["toy"]
        done(repository, "convert_checkpoint", *words)
        files = [path for path in out.rglob("*") if path.is_file() and path.name != "certificate.json"]
        assert f"{len(files) + 1} files" in told or f"{len(files)} files" in told
        for path in files:
            assert f"  {path.relative_to(out).as_posix()}  {path.stat().st_size:,}" in told
        for path in sorted(out.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        out.rmdir()


def test_changes_of_the_configuration_are_printed(tmp_path: Path, toy: Path, repository: Path) -> None:
    printed = done(
        repository, "convert_checkpoint", "export", "--from", toy, "--out", tmp_path / "hf", "--dtype", "bf16"
    )
    assert 'dtype: "float32" -> "bfloat16"' in printed or 'torch_dtype: "float32" -> "bfloat16"' in printed


def test_logits_agree_and_disagree(tmp_path: Path, toy: Path, repository: Path) -> None:
    import torch
    from safetensors.torch import save_file

    done(repository, "convert_checkpoint", "import", "--from", toy, "--out", tmp_path / "shards",
         "--tensor-model-parallel-size", 2)  # fmt: skip
    compare = ["verify", tmp_path / "shards", "--logits", "--reference", toy]
    assert "the models agree" in done(repository, "convert_checkpoint", *compare)
    tensors = weights_of(toy)
    name = "model.layers.2.self_attn.k_proj.weight"
    tensors[name] = torch.roll(tensors[name], 6, 0)  # the groups' heads exchanged
    save_file(tensors, toy / "model.safetensors", {"format": "pt"})
    result = tool(repository, "convert_checkpoint", *compare)
    assert result.returncode == 65 and "layer 2" in result.stderr, result.stderr


@pytest.mark.parametrize(
    ("words", "layers"),
    [(["expand-blocks", "--num-new", 2], 6), (["upscale-depth", "--layers-kept", 3], 6)],
)
def test_deeper(tmp_path: Path, toy: Path, repository: Path, words: list[Any], layers: int) -> None:
    command, *more = words
    done(repository, "edit_checkpoint", command, "--from", toy, "--out", tmp_path / "hf", *more)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_hidden_layers"] == layers
    assert json.loads((tmp_path / "hf" / "surgery.json").read_text())["new_layers"]
    assert "verified" in done(repository, "convert_checkpoint", "verify", tmp_path / "hf")


def test_merge_into_shards(tmp_path: Path, toy: Path, toy_maker: Any, repository: Path) -> None:
    other = toy_maker(tmp_path / "other", initializer_range=0.2)
    layout = ["--format", "shards", "--tensor-model-parallel-size", 2]
    ways = [
        ["linear", "--models", toy, other, "--scales", 1, 0],
        ["slerp", "--models", toy, other, "--t", 0],
        ["task-arithmetic", "--base", toy, "--models", toy, "--scales", 1],
    ]
    for number, way in enumerate(ways):
        out, hf = tmp_path / str(number), tmp_path / f"hf{number}"
        done(repository, "edit_checkpoint", "merge", *way, "--out", out, *layout)
        done(repository, "convert_checkpoint", "export", "--from", out, "--out", hf)
        before, after = weights_of(toy), weights_of(hf)
        assert all(before[name].equal(after[name]) for name in before)


def test_release(tmp_path: Path, toy: Path, repository: Path) -> None:
    out = tmp_path / "release"
    more = ["--licence", "apache-2.0", "--language", "en"]
    done(repository, "release_checkpoint", "--from", toy, "--name", "Toy-1", "--out", out, *more)
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=out, check=True)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert "verified" in done(repository, "convert_checkpoint", "verify", out)


@pytest.mark.parametrize(
    ("name", "words", "code", "message"),
    [
        ("convert_checkpoint", ["import", "--from", "TOY", "--out", "OUT", "--format", "torch_dist",
                                "--tensor-model-parallel-size", 2], 64, "loads in any"),
        ("convert_checkpoint", ["import", "--from", "TOY", "--out", "OUT", "--revision", "x"], 64, "hub id"),
        ("convert_checkpoint", ["import", "--from", "./no/where", "--out", "OUT"], 66, "no such folder"),
        ("edit_checkpoint", ["expand-blocks", "--from", "TOY", "--out", "OUT", "--num-new", 3], 64, "1, 2, 4"),
        ("edit_checkpoint", ["expand-blocks", "--from", "TOY", "--out", "TOY/x", "--num-new", 2], 73, "source"),
        ("edit_checkpoint", ["merge", "linear", "--models", "TOY", "--scales", 1, 2, "--out", "OUT"], 64, "one for"),
        ("edit_checkpoint", ["merge", "square", "--models", "TOY", "--out", "OUT"], 64, "square"),
        ("release_checkpoint", ["--from", "TOY", "--name", "a/b", "--out", "OUT"], 64, "a/b"),
    ],
)  # fmt: skip
def test_refusals(
    tmp_path: Path, toy: Path, repository: Path, name: str, words: list[Any], code: int, message: str
) -> None:
    known = {"TOY": toy, "TOY/x": toy / "x", "OUT": tmp_path / "out"}
    result = tool(repository, name, *[known.get(word, word) for word in words])
    assert result.returncode == code, result.stderr
    assert message in result.stderr and "Traceback" not in result.stderr
    assert os.listdir(tmp_path) == ["toy"]
