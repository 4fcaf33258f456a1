"""``torch_dist`` written and read by us, with torch itself as the judge, in all the forms that others write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import FileSystemReader
from torch_dist_toys import load, save, state_dict, stated
from unit.convert.format_toys import ToyWeights, read, same, toy_model, write

from megatron_syne.config.schema import ModelConfig
from megatron_syne.convert.engine import convert
from megatron_syne.convert.formats import dcp_plan
from megatron_syne.convert.formats.hf import open_hf, plan_hf
from megatron_syne.convert.formats.torch_dist import open_torch_dist, plan_torch_dist
from megatron_syne.convert.table import entries
from megatron_syne.errors import DataError, MissingInput

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # torch: no process group, as is meant
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


MODELS = st.fixed_dictionaries(
    {
        "hidden_size": st.sampled_from([8, 24]),
        "intermediate_size": st.sampled_from([8, 20]),
        "num_hidden_layers": st.integers(1, 3),
        "num_attention_heads": st.sampled_from([4, 8]),
        "num_key_value_heads": st.sampled_from([1, 2, 4]),
        "head_dim": st.sampled_from([2, 6]),
        "vocab_size": st.integers(1, 40),
        "tie_word_embeddings": st.booleans(),
        "model_type": st.sampled_from(["llama", "qwen2"]),
    }
)


@settings(deadline=None, max_examples=30, suppress_health_check=list(HealthCheck))
@given(
    MODELS, st.sampled_from(["BF16", "F16", "F32"]), st.integers(1, 16), st.sampled_from([1, 200, 2**20]),
    st.sampled_from([1000, 2**27]),
)  # fmt: skip
def test_round_trip_of_any_shape_and_torch_reads_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    shape: dict[str, Any],
    dtype: str,
    multiple: int,
    chunk_bytes: int,
    least_file_bytes: int,
) -> None:
    if shape["model_type"] == "qwen2":
        shape = shape | {"architectures": ["Qwen2ForCausalLM"]}
        del shape["head_dim"]
    weights = (
        ToyWeights(toy_model(**shape), dtype) if "head_dim" in shape else ToyWeights(qwen2(shape), dtype)
    )
    folder = tmp_path_factory.mktemp("any")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcp_plan, "_CHUNK_BYTES", chunk_bytes)
        patch.setattr(dcp_plan, "_LEAST_FILE_BYTES", least_file_bytes)
        target = plan_torch_dist(weights, make_vocab_size_divisible_by=multiple)
    check_places(target)
    write(weights, target, folder / "made")
    opened = open_torch_dist(folder / "made")
    assert same(opened, weights)
    assert opened.model.make_vocab_size_divisible_by == multiple
    opened.close()
    found = load(folder / "made")
    expected = state_dict(ToyWeights(target.model, dtype))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == TORCH[dtype]
        assert torch.equal(found[name].float(), value), name


def qwen2(shape: dict[str, Any]) -> ModelConfig:
    """The same as a Qwen2, whose heads divide the hidden size."""
    from megatron_syne.models.hf_config import model_config_from_hf

    config = {"hidden_act": "silu", "max_position_embeddings": 64, "rms_norm_eps": 1e-6, **shape}
    return model_config_from_hf(config | {"hidden_size": 8 * shape["num_attention_heads"]}, "toy")


def check_places(target: Any) -> None:
    """Fixed bytes and numbers lie apart from each other and within their file."""
    for file in target.files:
        used = np.zeros(file.size, np.int8)
        for at, content in file.fixed:
            assert 0 <= at <= at + len(content) <= file.size
            used[at : at + len(content)] += 1
        for places in target.places.values():
            for place in places:
                if place.file != file.path:
                    continue
                assert place.offset % 64 == 0
                (top, bottom), (left, right) = place.piece.rows, place.piece.cols
                for row in range(top, bottom):
                    at, _ = place.rows_at((row, row + 1))
                    used[at : at + (right - left) * {"F32": 4}.get(place.dtype, 2)] += 1
        assert used.max() <= 1


def test_what_torch_and_the_engine_expect_beside_the_tensors(tmp_path: Path) -> None:
    weights = ToyWeights(toy_model())
    folder = write(weights, plan_torch_dist(weights), tmp_path / "made")
    assert torch.load(folder / "common.pt", weights_only=True) == {"checkpoint_version": 3.0, "iteration": 0}
    assert json.loads((folder / "metadata.json").read_text()) == {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    metadata = FileSystemReader(folder).read_metadata()
    for index, info in metadata.storage_data.items():
        raw = (folder / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
        (tmp_path / "slice").write_bytes(raw)
        value = torch.load(tmp_path / "slice", weights_only=True)
        if index.offset is None:
            assert value == [None]
        else:
            assert value.is_contiguous()
    objects = {index.fqn for index in metadata.storage_data if index.offset is None}
    projections = (
        "self_attention.linear_qkv",
        "self_attention.linear_proj",
        "mlp.linear_fc1",
        "mlp.linear_fc2",
    )
    for module in (*projections, "self_attention.core_attention"):
        for layer in range(4):
            assert f"decoder.layers.{module}._extra_state/shard_{layer}_4" in objects
    assert "decoder.final_layernorm._extra_state/shard_0_1" in objects


def test_a_zero_centred_norm_keeps_its_bits(tmp_path: Path) -> None:
    pytest.importorskip("megatron_syne.convert.families.inflm")
    from megatron_syne.models.hf_config import model_config_from_hf

    model = model_config_from_hf(INFLM, "toy")
    weights = ToyWeights(model)
    norm = "model.norm.weight"
    assert any(entry.shift for entry in entries(model) if norm in entry.hf)
    folder = write(weights, plan_torch_dist(weights), tmp_path / "made")
    assert (load(folder)["decoder.final_layernorm.weight"].dtype) == torch.float32
    opened = open_torch_dist(folder)
    assert opened.dtypes[norm] == "BF16"
    assert same(opened, weights)
    (folder / "weights.json").unlink()  # and without our own statement: as the embedding
    assert same(open_torch_dist(folder), weights)


INFLM = {
    "architectures": ["INFLMForCausalLM"],
    "model_type": "inflm",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "layer_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("prefix", ["", "model.", "model.module."])
@pytest.mark.parametrize("form", [{}, {"stacked": False}, {"te": False}, {"halves": True, "stacked": False}])
def test_forms_that_others_write(tmp_path: Path, form: dict[str, bool], prefix: str, tied: bool) -> None:
    weights = ToyWeights(toy_model(tie_word_embeddings=tied), "F32")
    state = {prefix + name: value for name, value in state_dict(weights, **form).items()}
    state |= {"optimizer.state.exp_avg.embedding.word_embeddings.weight": torch.ones(3)}
    state |= {"chained_0.optimizer.param": torch.ones(3), "rng_state.x": torch.ones(2, dtype=torch.uint8)}
    if tied:
        state[prefix + "output_layer.weight"] = state[prefix + "embedding.word_embeddings.weight"].clone()
    opened = open_torch_dist(save(state, tmp_path / "theirs"), stated(weights, tmp_path / "config"))
    assert same(opened, weights)
    assert opened.ignored == ["chained_0 (1)", "optimizer (1)", "rng_state (1)"]
    assert bool(opened.replicas) == tied


def test_a_padded_vocabulary_is_trimmed_whatever_stands_in_it(tmp_path: Path) -> None:
    weights = ToyWeights(toy_model(), "F32")
    state = state_dict(weights)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        state[name] = torch.cat([state[name], torch.full((9, 16), 5.0)])
    opened = open_torch_dist(save(state, tmp_path / "theirs"), stated(weights, tmp_path / "config"))
    assert same(opened, weights)


def test_a_training_checkpoint_is_held_to_its_manifest_and_state(tmp_path: Path) -> None:
    weights = ToyWeights(toy_model())
    folder = write(weights, plan_torch_dist(weights), tmp_path / "run" / "iter_0000007")
    statement = json.loads((folder / "weights.json").read_text())
    (folder / "weights.json").unlink()
    sizes = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file()
    }
    (folder / "manifest.json").write_text(json.dumps({"files": sizes}))
    (folder / "state.json").write_text(json.dumps({"model": statement["model"]}))
    opened = open_torch_dist(tmp_path / "run")  # the newest below it
    assert opened.folder == folder
    assert same(opened, weights)
    (folder / "state.json").write_text(json.dumps({"model": statement["model"] | {"rotary_base": 7.0}}))
    with pytest.raises(
        DataError, match=r"state\.json: model disagrees with hf/config\.json: rotary_base: 7\.0"
    ):
        open_torch_dist(folder)
    (folder / "state.json").write_text(json.dumps({"model": statement["model"]}))
    with (folder / "__0_0.distcp").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(DataError, match=r"damaged.*\n.*__0_0\.distcp: "):
        open_torch_dist(folder)


def test_the_iteration_that_the_tracker_names(tmp_path: Path) -> None:
    for number in (1, 2, 10):
        weights = ToyWeights(toy_model(vocab_size=30 + number))
        write(weights, plan_torch_dist(weights), tmp_path / f"iter_{number:07d}")
    assert open_torch_dist(tmp_path).model.vocab_size == 40
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("2\n")
    assert open_torch_dist(tmp_path).model.vocab_size == 32
    tracker.write_text("release")
    with pytest.raises(MissingInput, match="release"):
        open_torch_dist(tmp_path)
    (tmp_path / "iter_0000001").rename(tmp_path / "release")
    assert open_torch_dist(tmp_path).model.vocab_size == 31
    for wrong in ("../2", "3" * 40, ""):
        tracker.write_text(wrong)
        with pytest.raises(DataError, match="expected an iteration"):
            open_torch_dist(tmp_path)
    with pytest.raises(MissingInput, match="no such folder"):
        open_torch_dist(tmp_path / "absent")


def test_there_and_back_again_with_the_engine(toy_maker: Any, tmp_path: Path) -> None:
    source = toy_maker(tmp_path / "toy", torch.bfloat16)
    weights = open_hf(source)
    convert(weights, plan_torch_dist(weights, make_vocab_size_divisible_by=16), tmp_path / "made")
    opened = open_torch_dist(tmp_path / "made")
    assert same(opened, weights)
    convert(opened, plan_hf(opened), tmp_path / "back")
    assert same(open_hf(tmp_path / "back"), weights)
    assert (tmp_path / "back" / "LICENSE").read_text() == "the licence\n"


def test_trained_weights(shared_data: Path, tmp_path: Path) -> None:
    weights = open_hf(shared_data / "stories260k")
    convert(weights, plan_torch_dist(weights), tmp_path / "made")
    opened = open_torch_dist(tmp_path / "made")
    assert same(opened, weights)
    assert read(opened, "model.norm.weight").any()
