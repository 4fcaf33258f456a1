"""``torch_dist`` folders that do not fit: every problem in one error, and nothing is guessed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch_dist_toys import save, state_dict, stated
from unit.convert.format_toys import ToyWeights, toy_model, write

from megatron_syne.convert.formats.torch_dist import open_torch_dist, plan_torch_dist
from megatron_syne.errors import ConfigError, DataError, MissingInput, SecurityRefusal

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # torch: no process group, as is meant


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    weights = ToyWeights(toy_model(), "F32")
    state = state_dict(weights)
    del state["decoder.final_layernorm.weight"]
    del state["decoder.layers.mlp.linear_fc2.weight"]
    state["decoder.layers.self_attention.linear_qkv.bias"] = torch.ones(4, 3)
    state["output_layer.weight"] = state["output_layer.weight"][:30]
    state["decoder.layers.self_attention.linear_proj.weight"] = torch.ones(3, 16, 24)
    state["decoder.layers.9.mlp.linear_fc1.weight"] = torch.ones(48, 16)
    state["embedding.word_embeddings.weight"] = torch.ones(31, 16, dtype=torch.int32)
    with pytest.raises(DataError) as error:
        open_torch_dist(save(state, tmp_path / "theirs"), stated(weights, tmp_path / "config"))
    for line in (
        "decoder.final_layernorm.weight: missing",
        "decoder.layers.0.mlp.linear_fc2.weight: missing",
        "decoder.layers.3.mlp.linear_fc2.weight: missing",
        "decoder.layers.self_attention.linear_qkv.bias: not a tensor of this model",
        "output_layer.weight: 30 rows, the model's vocabulary has 31",
        "linear_proj.weight: shape [3, 16, 24], the model gives [4, 16, 24]",
        "decoder.layers.9.mlp.linear_fc1.weight: not a tensor of this model",
        "embedding.word_embeddings.weight: format torch.int32 is not supported",
    ):
        assert line in str(error.value)


def test_a_parameter_there_twice_and_a_tied_copy_that_differs(tmp_path: Path) -> None:
    weights = ToyWeights(toy_model(tie_word_embeddings=True), "F32")
    config, state = stated(weights, tmp_path / "config"), state_dict(weights)
    state["decoder.layers.2.mlp.linear_fc2.weight"] = state["decoder.layers.mlp.linear_fc2.weight"][2]
    with pytest.raises(
        DataError, match=r"layers\.2\.mlp\.down_proj\.weight\[0:16, 0:24\] is stored more than once"
    ):
        open_torch_dist(save(state, tmp_path / "twice"), config)
    del state["decoder.layers.2.mlp.linear_fc2.weight"]
    state["output_layer.weight"] = state["embedding.word_embeddings.weight"].clone()
    state["output_layer.weight"][30, 15] += 1
    with pytest.raises(DataError, match="copies of one tensor differ"):
        open_torch_dist(save(state, tmp_path / "differ"), config)


def test_the_model_must_be_known_once(tmp_path: Path) -> None:
    weights = ToyWeights(toy_model(), "F32")
    config = stated(weights, tmp_path / "config")
    theirs = save(state_dict(weights), tmp_path / "theirs")
    with pytest.raises(MissingInput, match="--hf-config"):
        open_torch_dist(theirs)
    with pytest.raises(MissingInput, match=r"config\.json"):
        open_torch_dist(theirs, tmp_path)
    ours = write(weights, plan_torch_dist(weights), tmp_path / "ours")
    with pytest.raises(ConfigError, match="of its own"):
        open_torch_dist(ours, config)
    (config / "config.json").write_text(json.dumps({"auto_map": {}, "model_type": "llama"}))
    with pytest.raises(SecurityRefusal, match="auto_map"):
        open_torch_dist(theirs, config)


def test_our_own_statements_must_agree(tmp_path: Path) -> None:
    weights = ToyWeights(toy_model())
    folder = write(weights, plan_torch_dist(weights), tmp_path / "made")
    statement = json.loads((folder / "weights.json").read_text())
    for change, message in (
        ({"version": 9}, "version 9"),
        ({"model": statement["model"] | {"num_layers": 5}}, "num_layers: 5 against 4"),
        ({"model": statement["model"] | {"surprise": 5}}, "surprise"),
        ({"dtype": "F32"}, "BF16, weights.json gives F32"),
        ({"other_dtypes": {"x": "F32"}}, "x: 'F32'"),
    ):
        (folder / "weights.json").write_text(json.dumps(statement | change))
        with pytest.raises(DataError, match=message):
            open_torch_dist(folder)


def test_other_backends_and_mixed_formats_are_refused(tmp_path: Path) -> None:
    weights = ToyWeights(toy_model())
    folder = write(weights, plan_torch_dist(weights), tmp_path / "made")
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(DataError, match="zarr"):
        open_torch_dist(folder)
    mixed = ToyWeights(toy_model(), **{"model.layers.2.mlp.down_proj.weight": "F32"})
    with pytest.raises(DataError, match=r"linear_fc2\.weight: BF16, F32 in different layers"):
        plan_torch_dist(mixed)
    assert plan_torch_dist(mixed, dtype="F32").dtypes["model.norm.weight"] == "F32"
    with pytest.raises(ConfigError, match="divisible"):
        plan_torch_dist(weights, make_vocab_size_divisible_by=0)
