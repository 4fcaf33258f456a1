"""What is frozen does not move and has no optimizer state; what trains may change from one checkpoint to the next."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Bench, make_seed
from .ranks import run_ranks
from .stored import stored_tensor

pytestmark = pytest.mark.slow

TP2, PP2 = "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"
SP, VPP2 = "parallel.sequence_parallel=true", "parallel.virtual_pipeline_model_parallel_size=2"
PLAIN = "parallel.use_distributed_optimizer=false"
BF16 = "precision.params_dtype=bf16"
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
ONLY_EMBEDDING, ONLY_OUTPUT = "optimizer.train_only=[embedding.*]", "optimizer.train_only=[output_layer.*]"
PRO = "optimizer.train_only=[layers.new]"
GROUPS = (
    "optimizer.groups=[{match: 'decoder.*', lr_mult: 0.5}, {match: embedding.*, lr_mult: 2.0, wd_mult: 0}]"
)
NEW_LAYERS = [1, 3]

Trained = tuple[dict[str, dict], dict[str, list[dict]]]


def until(step: int) -> str:
    return f"train.exit_interval={step}"


def losses(result: dict) -> list[float]:
    return [float.fromhex(row["loss"]) for row in result["steps"]]


def largest_gap(a: dict, b: dict) -> float:
    return max(abs(x - y) for x, y in zip(losses(a), losses(b), strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("freezing")


@pytest.fixture(scope="module")
def train(bench: Bench, folder: Path) -> Callable[[int, dict[str, list[str]]], Trained]:
    """Train jobs in one world; a job ``name`` or ``name/anything`` has the run folder of that name."""

    def _train(world_size: int, jobs: dict[str, list[str]]) -> Trained:
        where = folder / f"jobs_{len(list(folder.glob('jobs_*')))}"
        where.mkdir()
        listed = [
            {
                "name": name,
                "config": str(bench.config),
                "overrides": [f"run_dir={folder / name.split('/')[0]}", *overrides],
            }
            for name, overrides in jobs.items()
        ]
        (where / "jobs.json").write_text(json.dumps(listed))
        run_ranks(world_size, ["-m", "distributed.trainable_worker", str(where / "jobs.json")], timeout=1800)
        return tuple(json.loads((where / f"{kind}.json").read_text()) for kind in ("results", "facts"))

    return _train


@pytest.fixture(scope="module")
def pro(bench: Bench, folder: Path) -> str:
    """The seed as a block expansion would leave it: layers 1 and 3 are new."""
    seed = folder / "seed_pro"
    shutil.copytree(bench.folder / "seed", seed)
    record = {"format": "megatron_syne.surgery", "version": 1, "operations": [], "new_tokens": []}
    (seed / "surgery.json").write_text(json.dumps({**record, "new_layers": NEW_LAYERS}))
    return f"checkpoint.initialize_from={seed}"


@pytest.fixture(scope="module")
def tied(folder: Path) -> list[str]:
    seed = make_seed(folder / "seed_tied", tie_word_embeddings=True)
    return [f"model.hf_path={seed}", f"checkpoint.initialize_from={seed}"]


@pytest.fixture(scope="module")
def one(train, pro: str, tied: list[str]) -> Trained:
    """Everything in a single process: what the layouts are held to."""
    return train(
        1,
        {
            "s_embedding": [ONLY_EMBEDDING, until(3)],
            "s_embedding/all": [until(6)],
            "s_longer": [ONLY_EMBEDDING, until(4)],
            "s_embedding/output": [ONLY_OUTPUT, until(9)],
            "s_output": [ONLY_OUTPUT, until(3)],
            "s_pro": [pro, PRO, until(3)],
            "s_pro/all": [pro, until(6)],
            "s_pro/again": [pro, PRO, until(9)],
            "s_tied": [*tied, "optimizer.freeze=[embedding.*]", until(3)],
            "s_groups": [GROUPS, until(3)],
            "s_groups/changed": ["optimizer.decay_norms_and_biases=true", until(6)],
            "s_reset": [until(3)],
            "s_reset/2": [until(6)],
            "s_body": ["optimizer.freeze=[embedding.*]", until(3)],
            "s_recomputed": ["optimizer.freeze=[embedding.*]", "memory.recompute_granularity=full",
                             "memory.recompute_method=uniform", until(3)],
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def two(train, pro: str, tied: list[str]) -> Trained:
    """The same on two ranks, each continued in another layout."""
    return train(
        2,
        {
            "embedding": [PP2, ONLY_EMBEDDING, until(3)],
            "embedding/all": [TP2, SP, until(6)],
            "embedding/output": [PP2, VPP2, ONLY_OUTPUT, until(9)],
            "output": [PP2, ONLY_OUTPUT, until(3)],
            "pro": [TP2, pro, PRO, until(3)],
            "pro/all": [PP2, pro, until(6)],
            "pro/again": [pro, PRO, until(9)],  # DP 2
            "tied": [PP2, *tied, "optimizer.freeze=[embedding.*]", until(3)],
            "groups": [PP2, GROUPS, until(3)],
            "groups/changed": [TP2, "optimizer.decay_norms_and_biases=true", until(6)],
            "plain": [PP2, PLAIN, ONLY_EMBEDDING, until(3)],
            "plain/all": [PP2, PLAIN, until(6)],
            "undisturbed": [PP2, BF16, pro, PRO, until(6)],
            "halves": [PP2, BF16, pro, PRO, until(3)],
            "halves/2": [PP2, BF16, pro, PRO, until(6)],
        },
    )


@pytest.mark.parametrize(
    "name",
    ["embedding", "embedding/all", "embedding/output", "output", "pro", "pro/all", "pro/again", "tied", "groups",
     "groups/changed"],
)  # fmt: skip
def test_every_layout_trains_the_same(one: Trained, two: Trained, name: str) -> None:
    """Also where a pipeline stage trains nothing, and going on in another layout with other parameters."""
    single, layout = one[0][f"s_{name}"], two[0][name]
    assert single["first_step"] == layout["first_step"]
    gap = largest_gap(single, layout)
    print(f"{name}: largest loss difference {gap:.1e}")
    assert gap <= 5e-6
    for a, b in zip(single["steps"], layout["steps"], strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)


def test_weights_stay_as_they_are_where_what_trains_changes(one: Trained) -> None:
    """The first loss of what follows is that of weights which nothing has touched."""
    assert one[0]["s_embedding/all"]["steps"][0]["loss"] == one[0]["s_longer"]["steps"][3]["loss"]


def test_without_the_sharded_optimizer_too(one: Trained, two: Trained) -> None:
    assert largest_gap(one[0]["s_embedding"], two[0]["plain"]) <= 5e-6
    assert largest_gap(one[0]["s_embedding/all"], two[0]["plain/all"]) <= 5e-6


def test_only_what_trains_moves_and_has_state(one: Trained, two: Trained) -> None:
    """fp32: two moments of 4 bytes to each number that trains; and the chosen parameters are all that train."""
    patterns = {
        "embedding": r"embedding\..*",
        "output": r"output_layer\..*",
        "pro": r"decoder\.layers\.[13]\..*",
        "tied": r"decoder\..*",
    }
    for name, pattern in patterns.items():
        for ranks in (one[1][f"s_{name}"], two[1][name]):
            for rank in ranks:
                chosen = {n for n in rank["names"] if re.fullmatch(pattern, n)}
                assert set(rank["trains"]) == chosen
                assert set(rank["changed"]) == chosen
                assert rank["bytes"] == 8 * sum(rank["trains"].values())
    assert two[1]["output"][0]["bytes"] == 0
    assert two[1]["embedding"][1]["bytes"] == 0


def keys_of(checkpoint: Path) -> set[str]:
    import torch.distributed.checkpoint as dcp

    return set(dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata)


def test_checkpoint_has_all_weights_and_state_of_what_trains(
    bench: Bench, one: Trained, two: Trained, folder: Path
) -> None:
    from safetensors.torch import load_file

    seed = load_file(bench.folder / "seed" / "model.safetensors")
    for run, step in (("s_pro", 3), ("pro", 3), ("pro", 9)):
        stored = folder / run / "checkpoints" / f"iter_{step:07d}"
        keys = keys_of(stored)
        states = {key for key in keys if key.startswith("optimizer.state.exp_avg.")}
        assert {re.sub(r".*layers\.(\d+)\..*", r"\1", key) for key in states} == {"1", "3"}
        assert stored_tensor(stored, EMBEDDING).equal(seed["model.embed_tokens.weight"]) == (step == 3)
        down = stored_tensor(stored, "decoder.layers.mlp.linear_fc2.weight")  # [layers, ...]
        for layer in range(4):
            same = down[layer].equal(seed[f"model.layers.{layer}.mlp.down_proj.weight"])
            assert same == (step == 3 and layer not in NEW_LAYERS)


def test_a_resume_goes_on_to_the_bit(two: Trained) -> None:
    """bf16: master weights and moments of the new blocks come back whole."""
    results, _ = two
    halves = [row["loss"] for name in ("halves", "halves/2") for row in results[name]["steps"]]
    assert halves == [row["loss"] for row in results["undisturbed"]["steps"]]


def test_adam_counts_on_while_something_goes_on(one: Trained) -> None:
    def steps(name: str) -> set[int]:
        return {group["step"] for group in one[1][name][0]["groups"]}

    assert steps("s_embedding/all") == {6}  # the embedding goes on
    assert steps("s_pro/again") == {9}
    assert steps("s_embedding/output") == {9}  # the output layer trained in between


def test_groups_have_their_own_rates(one: Trained, two: Trained) -> None:
    for ranks in (one[1]["s_groups"], two[1]["groups"]):
        for rank in ranks:
            found = {(g["lr_mult"], g["wd_mult"]) for g in rank["groups"]}
            assert found == {(1.0, 1.0), (0.5, 1.0), (0.5, 0.0), (2.0, 0.0)}
            base = next(g["lr"] for g in rank["groups"] if g["lr_mult"] == 1.0)
            for group in rank["groups"]:
                assert group["lr"] == pytest.approx(base * group["lr_mult"], rel=1e-12)
                assert group["weight_decay"] == pytest.approx(0.1 * group["wd_mult"], rel=1e-12)
    for ranks in (one[1]["s_groups/changed"], two[1]["groups/changed"]):  # not the file's groups
        assert {(g["lr_mult"], g["wd_mult"]) for rank in ranks for g in rank["groups"]} == {(1.0, 1.0)}


def test_recomputed_layers_train_behind_a_frozen_embedding(one: Trained) -> None:
    assert losses(one[0]["s_recomputed"]) == losses(one[0]["s_body"])
    assert one[1]["s_recomputed"][0]["changed"] == one[1]["s_body"][0]["changed"]


def test_new_moments_where_asked_for(one: Trained) -> None:
    assert {group["step"] for group in one[1]["s_reset/2"][0]["groups"]} == {3}
    assert one[0]["s_reset/2"]["first_step"] == 3


def test_names_need_no_model(bench: Bench, one: Trained, folder: Path) -> None:
    """What the rules look patterns up in is what the engine builds."""
    from megatron_syne.config.schema import ModelConfig
    from megatron_syne.models.config import resolve_model
    from megatron_syne.models.parameter_names import parameter_names

    for job, seed in (("s_embedding", bench.folder / "seed"), ("s_tied", folder / "seed_tied")):
        expected = parameter_names(resolve_model(ModelConfig(hf_path=str(seed))))
        assert sorted(one[1][job][0]["names"]) == sorted(expected)
