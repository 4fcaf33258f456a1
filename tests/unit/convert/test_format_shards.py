"""Shards that are not what their manifest says; what the plan refuses."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from format_toys import ToyWeights, same, toy_model, write
from safetensors.torch import load_file, save_file

from megatron_syne.config.schema import ParallelConfig
from megatron_syne.convert.formats.detect import open_weights
from megatron_syne.convert.formats.shards import open_shards, plan_shards
from megatron_syne.errors import ConfigError, DataError, MissingInput, SecurityRefusal, SyneError

LAST = "mp_rank_01_001/model.safetensors"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """TP 2 x PP 2."""
    weights = ToyWeights(toy_model())
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    return write(weights, plan_shards(weights, parallel), tmp_path / "shards")


def manifest(**changes: Any) -> Callable[[Path], None]:
    return edit("manifest.json", lambda value: value.update(changes))


def inside(key: str, **changes: Any) -> Callable[[Path], None]:
    return edit("manifest.json", lambda value: value[key].update(changes))


def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        change(value)
        (folder / name).write_text(json.dumps(value))

    return apply


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        found = load_file(folder / LAST)
        change(found)
        save_file(found, folder / LAST)

    return apply


def widen(found: dict[str, torch.Tensor]) -> None:
    found["decoder.layers.3.mlp.linear_fc2.weight"] = found["decoder.layers.3.mlp.linear_fc2.weight"].float()


def several(found: dict[str, torch.Tensor]) -> None:
    widen(found)
    del found["output_layer.weight"]
    found["decoder.layers.3.mlp.linear_fc2.bias"] = torch.zeros(3)
    found["decoder.layers.2.mlp.linear_fc1.weight"] = torch.zeros(24, 17, dtype=torch.bfloat16)


def link_out(folder: Path) -> None:
    (folder / LAST).rename(folder.parent / "x")
    (folder / LAST).symlink_to(folder.parent / "x")


BAD: dict[str, tuple[Callable[[Path], object], type[SyneError], list[str]]] = {
    "version 1": (manifest(version=1), DataError, ["version 1", "convert the source again"]),
    "another program's": (manifest(format="x"), DataError, ["'x'", "megatron_syne.shards"]),
    "other layers": (manifest(layers=[[[0]], [[1, 2, 3]]]), DataError, ["do not follow"]),
    "other padding": (manifest(padded_vocab_size=64), DataError, ["do not follow"]),
    "other padding rule": (inside("model", make_vocab_size_divisible_by=64), DataError, ["do not follow"]),
    "no layers": (edit("manifest.json", lambda m: m.pop("layers")), DataError, ["malformed", "layers"]),
    "no formats": (edit("manifest.json", lambda m: m.pop("dtype")), DataError, ["malformed", "dtype"]),
    "unknown format": (manifest(dtype="F8"), DataError, ["'F8'", "BF16"]),
    "format a list": (manifest(dtype=[]), DataError, ["manifest.json"]),
    "formats not an object": (manifest(other_dtypes=3), DataError, ["malformed"]),
    "format of a stranger": (manifest(other_dtypes={"x": "F32"}), DataError, ["does not have"]),
    "model a list": (manifest(model=[]), DataError, ["malformed"]),
    "unknown option": (inside("parallel", x=3), DataError, ["malformed", "x"]),
    "text for a size": (inside("parallel", tensor_model_parallel_size="2"), DataError, ["'2'"]),
    "text for layers": (inside("parallel", num_layers_in_first_pipeline_stage="1"), DataError, ["malformed"]),
    "a layout that is none": (inside("parallel", pipeline_model_parallel_layout="E|x"), DataError, ["E|x"]),
    "TP that does not fit": (inside("parallel", tensor_model_parallel_size=3), DataError, ["3"]),
    "endless TP": (inside("parallel", tensor_model_parallel_size=10**7), DataError, ["10000000"]),
    "another model": (inside("model", hidden_size=8), DataError, ["hidden_size: 8 against 16"]),
    "no configuration": (lambda f: (f / "hf/config.json").unlink(), MissingInput, ["hf/config.json"]),
    "code": (edit("hf/config.json", lambda c: c.update(auto_map={})), SecurityRefusal, ["auto_map"]),
    "a file missing": (lambda f: (f / LAST).unlink(), MissingInput, [LAST]),
    "a file cut off": (lambda f: os.truncate(f / LAST, 900), DataError, [LAST, "truncated"]),
    "a link": (link_out, SecurityRefusal, ["leads out"]),
    "another format": (tensors(widen), DataError, ["linear_fc2.weight: F32", "BF16", LAST]),
    "several": (
        tensors(several),
        DataError,
        ["(4)", "output_layer.weight: missing", "linear_fc2.bias: unexpected", "[24, 17]", "[24, 16]", "F32"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_shards(shards: Path, case: str) -> None:
    damage, error, words = BAD[case]
    damage(shards)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(SyneError) as caught:
        open_shards(shards)
    assert type(caught.value) is error and all(word in str(caught.value) for word in words), caught.value
    assert os.listdir("/proc/self/fd") == before


def test_the_configuration_is_the_sources_own(tmp_path: Path, shards: Path) -> None:
    """Word for word while it describes the weights; with what is new where it no longer does."""
    edit("hf/config.json", lambda config: (config.pop("rope_parameters"), config.update(pad_token_id=7)))(
        shards
    )
    stored = open_shards(shards)
    kept = plan_shards(stored, ParallelConfig()).documents["hf/config.json"]
    assert json.loads(kept) == stored.config and "rope_parameters" not in stored.config
    new = json.loads(plan_shards(stored, ParallelConfig(), dtype="F32").documents["hf/config.json"])
    assert (new["dtype"], new["pad_token_id"]) == ("float32", 7)
    written = write(stored, plan_shards(stored, ParallelConfig(), dtype="F16"), tmp_path / "f16")
    assert set(open_shards(written).dtypes.values()) == {"F16"}


def test_q_k_and_v_in_different_formats(tmp_path: Path) -> None:
    name = "model.layers.{}.self_attn.{}_proj.weight"
    mixed = ToyWeights(toy_model(), **{name.format(1, "k"): "F32", name.format(3, "v"): "F16"})
    with pytest.raises(DataError) as caught:
        plan_shards(mixed, ParallelConfig())
    for word in (
        "(2)",
        "layers.1.self_attention.linear_qkv.weight",
        "k_proj.weight F32",
        "v_proj.weight F16",
    ):
        assert word in str(caught.value)
    target = plan_shards(mixed, ParallelConfig(), dtype="BF16")
    assert set(open_shards(write(mixed, target, tmp_path / "x")).dtypes.values()) == {"BF16"}
    single = ToyWeights(toy_model(), **{"model.norm.weight": "F32", "lm_head.weight": "F16"})
    target = plan_shards(single, ParallelConfig(tensor_model_parallel_size=2))
    assert same(single, open_shards(write(single, target, tmp_path / "y")))


@pytest.mark.parametrize(
    ("parallel", "options", "words"),
    [
        ({"tensor_model_parallel_size": 3}, {}, ["num_attention_heads 4", "1, 2"]),
        ({"tensor_model_parallel_size": 0}, {}, ["0"]),
        ({"pipeline_model_parallel_size": 5}, {}, ["5 stages", "4 layers"]),
        ({"pipeline_model_parallel_size": True}, {}, ["True"]),
        ({}, {"make_vocab_size_divisible_by": 0}, ["make_vocab_size_divisible_by"]),
        ({}, {"dtype": "bf16"}, ["'bf16'", "BF16"]),
    ],
)
def test_bad_plans(parallel: dict[str, int], options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_shards(ToyWeights(toy_model()), ParallelConfig(**parallel), **options)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_ranks_file_opens_in_the_library(shards: Path) -> None:
    """The explicit shards are plain files that anything reads."""
    found = load_file(shards / LAST)
    assert found["output_layer.weight"].shape == (16, 16)
    assert not found["output_layer.weight"][15].any(), "the row above the vocabulary"
    assert "embedding.word_embeddings.weight" not in found
    assert sorted({int(name.split(".")[2]) for name in found if "layers" in name}) == [2, 3]


def test_which_format_a_folder_holds(tmp_path: Path, shards: Path) -> None:
    weights = open_weights(shards)
    assert weights.kind == "shards" and weights.certificate is None
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, word in (
        (empty, "holds no weights"),
        (tmp_path / "none", "no such folder"),
        (shards / LAST, "file"),
    ):
        with pytest.raises(MissingInput, match=word) as caught:
            open_weights(path)
        assert "config.json" in str(caught.value) and ".metadata" in str(caught.value)
    with pytest.raises(ConfigError, match="of its own"):
        open_weights(shards, hf_config=empty)
    (shards / "certificate.json").write_text('{"format": "of another program"}')
    assert open_weights(shards).certificate is None
