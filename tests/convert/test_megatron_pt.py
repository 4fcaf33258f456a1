"""Megatron-LM's ``model_optim_rng.pt`` files: layers numbered over stages, ranks put together, nothing run.

State dicts of real megatron-core modules are read in ``tests/distributed/test_torch_dist_layouts.py``.
"""

from __future__ import annotations

import argparse
import json
import pickle
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch_dist_toys import Evil, stated
from unit.convert.format_toys import ToyWeights, same, toy_model

from megatron_syne.config.schema import ModelConfig
from megatron_syne.convert.formats.detect import open_weights
from megatron_syne.convert.formats.megatron_pt import open_megatron_pt
from megatron_syne.convert.pieces import Kind, local_shape, pieces
from megatron_syne.convert.table import entries, table_of
from megatron_syne.errors import DataError, MissingInput, SecurityRefusal

FILE = "model_optim_rng.pt"
Edit = Callable[[dict[str, Any], int, int], None]


def local(weights: ToyWeights, model: ModelConfig, entry: Any, tp: int, tp_size: int) -> torch.Tensor:
    """One rank's part of a parameter, assembled from its pieces."""
    whole = {name: torch.from_numpy(np.array(rows)) for name, rows in weights.rows.items()}
    shape = local_shape(entry, model, tp_size)
    out = torch.zeros((shape[0], int(np.prod(shape[1:], dtype=int))), dtype=torch.bfloat16)
    for piece in pieces(entry, model, tp, tp_size):
        part = whole[piece.source].view(torch.bfloat16)[slice(*piece.rows), slice(*piece.cols)]
        down, right = piece.at
        out[down : down + part.shape[0], right : right + part.shape[1]] = part
    return out.view(shape)


def save(
    weights: ToyWeights,
    folder: Path,
    tp_size: int,
    stages: list[list[int]],
    te: bool = False,
    multiple: int = 1,
    edit: Edit | None = None,
) -> Path:
    """A checkpoint. ``stages[pp][chunk]`` is the number of layers of a model chunk."""
    from dataclasses import replace

    model = replace(weights.model, make_vocab_size_divisible_by=multiple)
    order = [(chunk, pp) for chunk in range(len(stages[0])) for pp in range(len(stages))]
    first = {place: sum(stages[pp][chunk] for chunk, pp in order[:i]) for i, place in enumerate(order)}
    table = table_of(model)
    tied = bool(model.share_embeddings_and_output_weights)
    for pp in range(len(stages)):
        for tp in range(tp_size):
            chunks: list[dict[str, Any]] = []
            for chunk, count in enumerate(stages[pp]):
                found: dict[str, Any] = OrderedDict()
                start = first[chunk, pp]
                head, last = (chunk, pp) == order[0], (chunk, pp) == order[-1]
                for entry in entries(model, list(range(start, start + count))):
                    ends = (*table.final_norm, table.output)
                    if (entry == table.embedding and not head) or (entry in ends and not last):
                        continue
                    name = (te and entry.te) or entry.megatron
                    parts = name.split(".")
                    if parts[:2] == ["decoder", "layers"]:
                        parts[2] = str(int(parts[2]) - start)
                    found[".".join(parts)] = local(weights, model, entry, tp, tp_size)
                    if entry.kind is Kind.COLUMNS:
                        found[".".join([*parts[:-1], "_extra_state"])] = None
                if tied and last and not head:
                    found[table.output.megatron] = local(weights, model, table.tied_output, tp, tp_size)
                chunks.append(found)
            models = (
                {"model": chunks[0]} if len(chunks) == 1 else {f"model{i}": c for i, c in enumerate(chunks)}
            )
            state: dict[str, Any] = {"checkpoint_version": 3.0, "iteration": 5, **models}
            state["args"] = argparse.Namespace(num_layers=4, hidden_size=16, padded_vocab_size=None)
            if edit is not None:
                edit(state, tp, pp)
            rank = folder / (f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if len(stages) > 1 else ""))
            rank.mkdir(parents=True, exist_ok=True)
            torch.save(state, rank / FILE)
    return folder


@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from([1, 2, 4]),
    st.sampled_from([[[4]], [[3], [1]], [[1], [2], [1]], [[1, 1], [1, 1]], [[2, 0], [1, 1]], [[0, 2], [1, 1]]]),
    st.booleans(), st.booleans(), st.sampled_from([1, 7]),
)  # fmt: skip
def test_any_layout_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    tp_size: int,
    stages: list[list[int]],
    te: bool,
    tied: bool,
    multiple: int,
) -> None:
    folder = tmp_path_factory.mktemp("pt")
    weights = ToyWeights(toy_model(tie_word_embeddings=tied))
    save(weights, folder / "theirs", tp_size, stages, te, multiple)
    opened = open_megatron_pt(folder / "theirs", stated(weights, folder / "config"))
    assert same(opened, weights)
    assert bool(opened.replicas) == (tp_size > 1 or (tied and len(stages) > 1))
    assert {"_extra_state", "args", "iteration"} <= set(opened.ignored)
    opened.close()


@pytest.fixture
def toy(tmp_path: Path) -> tuple[ToyWeights, Path]:
    """Weights, and a folder with their configuration."""
    weights = ToyWeights(toy_model())
    return weights, stated(weights, tmp_path / "config")


def test_it_is_found_below_its_iteration(toy: tuple[ToyWeights, Path], tmp_path: Path) -> None:
    weights, config = toy
    save(weights, tmp_path / "run" / "iter_0000005", 2, [[2], [2]])
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("5")
    opened = open_weights(tmp_path / "run", config)
    assert (opened.kind, opened.folder.name) == ("megatron_pt", "iter_0000005")
    assert sorted(opened.files())[0] == f"mp_rank_00_000/{FILE}"


def test_all_problems_are_told_at_once(toy: tuple[ToyWeights, Path], tmp_path: Path) -> None:
    weights, config = toy

    def damage(state: dict[str, Any], tp: int, pp: int) -> None:
        model = state["model"]
        if (tp, pp) == (1, 1):
            del model["decoder.layers.0.mlp.linear_fc2.weight"]
            model["decoder.layers.1.mlp.linear_fc1.weight"] = torch.ones(3, 3, dtype=torch.bfloat16)
            model["decoder.layers.0.mlp.router.weight"] = torch.ones(2)
            model["output_layer.weight"] = "text"

    with pytest.raises(DataError) as error:
        open_megatron_pt(save(weights, tmp_path / "theirs", 2, [[2], [2]], edit=damage), config)
    for line in (
        "decoder.layers.1.mlp.linear_fc1.weight: shape [3, 3], the model gives [24, 16]",
        "decoder.layers.0.mlp.router.weight: not a tensor of this model",
        "output_layer.weight: not a tensor",
    ):
        assert line in str(error.value)

    def less(state: dict[str, Any], tp: int, pp: int) -> None:
        if (tp, pp) == (1, 1):
            del state["model"]["decoder.layers.0.mlp.linear_fc2.weight"]

    shutil.rmtree(tmp_path / "theirs")
    with pytest.raises(DataError, match=r"layers\.2\.mlp\.down_proj\.weight\[0:16, 12:24\] is not stored"):
        open_megatron_pt(save(weights, tmp_path / "theirs", 2, [[2], [2]], edit=less), config)


def test_copies_that_differ(tmp_path: Path) -> None:
    weights = ToyWeights(toy_model(tie_word_embeddings=True))
    config = stated(weights, tmp_path / "config")

    def norm(state: dict[str, Any], tp: int, pp: int) -> None:
        if (tp, pp) == (1, 0):
            state["model"]["decoder.layers.1.input_layernorm.weight"][3] += 1

    def output(state: dict[str, Any], tp: int, pp: int) -> None:
        if (tp, pp) == (1, 1):
            state["model"]["output_layer.weight"][0, 0] += 1

    for edit, message in (
        (norm, r"layers\.1\.input_layernorm\.weight: .* in mp_rank_01_000/"),
        (output, r"embed_tokens\.weight: output_layer\.weight in mp_rank_01_001/"),
    ):
        shutil.rmtree(tmp_path / "theirs", ignore_errors=True)
        with pytest.raises(DataError, match=message):
            open_megatron_pt(save(weights, tmp_path / "theirs", 2, [[2], [2]], edit=edit), config)


def test_ranks_that_are_missing_or_too_many(toy: tuple[ToyWeights, Path], tmp_path: Path) -> None:
    weights, config = toy
    theirs = save(weights, tmp_path / "theirs", 2, [[2], [2]])
    with pytest.raises(MissingInput, match="--hf-config"):
        open_megatron_pt(theirs)
    (theirs / "mp_rank_01_000").rename(tmp_path / "away")
    with pytest.raises(MissingInput, match="mp_rank_01_000"):
        open_megatron_pt(theirs, config)
    (tmp_path / "away").rename(theirs / "mp_rank_01")
    (theirs / "mp_rank_00").mkdir()
    shutil.copy(theirs / "mp_rank_00_000" / FILE, theirs / "mp_rank_00" / FILE)
    with pytest.raises(DataError, match="of one rank"):
        open_megatron_pt(theirs, config)
    shutil.rmtree(theirs / "mp_rank_00")
    (theirs / "mp_rank_01").rename(theirs / "mp_rank_01_000_000")
    with pytest.raises(DataError, match="expert"):
        open_megatron_pt(theirs, config)
    (theirs / "mp_rank_01_000_000").rename(theirs / "mp_rank_01_000")
    open_megatron_pt(theirs, config).close()


def test_another_model_than_the_configuration_says(toy: tuple[ToyWeights, Path], tmp_path: Path) -> None:
    weights, config = toy

    def arguments(state: dict[str, Any], tp: int, pp: int) -> None:
        state["args"] = argparse.Namespace(
            num_layers=4, rotary_base=77, use_rope_scaling=True, normalization="LayerNorm", kv_channels=None
        )

    with pytest.raises(DataError) as error:
        open_megatron_pt(save(weights, tmp_path / "theirs", 1, [[4]], edit=arguments), config)
    for name in (
        "args.rotary_base is 77",
        "args.use_rope_scaling is True",
        "args.normalization is 'LayerNorm'",
    ):
        assert name in str(error.value)
    assert "(3):" in str(error.value)
    raw = json.loads((config / "config.json").read_text())
    (config / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": 5}))
    with pytest.raises(DataError, match="4 layers are stored, the model has 5"):
        open_megatron_pt(save(weights, tmp_path / "five", 2, [[2], [2]]), config)


def test_old_model_classes_and_old_versions(toy: tuple[ToyWeights, Path], tmp_path: Path) -> None:
    weights, config = toy

    def legacy(state: dict[str, Any], tp: int, pp: int) -> None:
        state["model"] = {"language_model": {"embedding": {}}}

    def version(state: dict[str, Any], tp: int, pp: int) -> None:
        state["checkpoint_version"] = 2.0

    def empty(state: dict[str, Any], tp: int, pp: int) -> None:
        del state["model"]

    for edit, message in (
        (legacy, "convert.py --saver core"),
        (version, "checkpoint_version 2.0"),
        (empty, "no 'model'"),
    ):
        with pytest.raises(DataError, match=message):
            open_megatron_pt(save(weights, tmp_path / "theirs", 1, [[4]], edit=edit), config)


@pytest.mark.parametrize("where", ["args", "optimizer", "rng_state", "model"])
def test_pickles_that_run_code(toy: tuple[ToyWeights, Path], tmp_path: Path, where: str) -> None:
    weights, config = toy
    canary = tmp_path / "canary"

    def poison(state: dict[str, Any], tp: int, pp: int) -> None:
        if tp == 1:
            state[where] = {"x": [Evil(canary)], **(state[where] if where == "model" else {})}

    theirs = save(weights, tmp_path / "theirs", 2, [[4]], edit=poison)
    with pytest.raises(SecurityRefusal, match=rf"mp_rank_01/{FILE}: holds posix\.system"):
        open_megatron_pt(theirs, config)
    assert not canary.exists()


def test_bare_pickles_and_cut_files(toy: tuple[ToyWeights, Path], tmp_path: Path) -> None:
    weights, config = toy
    theirs = save(weights, tmp_path / "theirs", 1, [[4]])
    path = theirs / "mp_rank_00" / FILE
    whole = path.read_bytes()
    for content in (pickle.dumps(Evil(tmp_path / "canary"), 2), pickle.dumps({"model": {}}, 4)):
        path.write_bytes(content)
        with pytest.raises(SecurityRefusal, match="bare pickle"):
            open_megatron_pt(theirs, config)
    path.write_bytes(whole[:-50])
    with pytest.raises(DataError, match="cut short"):
        open_megatron_pt(theirs, config)
    path.unlink()
    outside = tmp_path / "outside"
    outside.write_bytes(whole)
    path.symlink_to(outside)
    with pytest.raises(SecurityRefusal, match="leads out"):
        open_megatron_pt(theirs, config)
