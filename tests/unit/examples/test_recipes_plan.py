"""Each recipe of examples/recipes can be looked at, passes all rules, and plans what its paper says."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_syne.config.learning_rate import LearningRate
from megatron_syne.config.loader import load_config
from megatron_syne.config.schema import RunConfig
from megatron_syne.config.stages import leg_config, legs, stage_model, trains
from megatron_syne.data.mixture.ledger import make_ledger
from megatron_syne.data.mixture.planning import MixturePlan, plan_mixture
from megatron_syne.models.config import resolve_model
from megatron_syne.parallel.topology import world_size_of
from megatron_syne.preflight.launch_rules import check_launch
from megatron_syne.preflight.report import dry_run_report
from megatron_syne.preflight.rules import check

RECIPES = Path(__file__).resolve().parents[3] / "examples" / "recipes"
BRANCHES = {
    "minicpm_decay": "minicpm_stable",
    "octothinker_long": "octothinker_stable",
    "octothinker_short": "octothinker_stable",
    "octothinker_hybrid": "octothinker_stable",
}


def recipe(name: str, folder: Path, *overrides: str) -> tuple[RunConfig, MixturePlan]:
    """A recipe and its plan; a branch is planned from the state that its stable run leaves at its end."""
    overrides = (f"run_dir={folder / name}", *overrides)
    if name in BRANCHES:
        _, plan = recipe(BRANCHES[name], folder)
        checkpoint = folder / BRANCHES[name] / "checkpoints" / f"iter_{plan.train_iters:07d}"
        checkpoint.mkdir(parents=True, exist_ok=True)
        state = {
            "data": make_ledger(plan, plan.num_samples, {}),
            "state": {"consumed_samples": plan.num_samples},
        }
        (checkpoint / "state.json").write_text(json.dumps(state))
        overrides = (f"checkpoint.branch_from={checkpoint}", *overrides)
    if name == "llama_pro":
        overrides = (f"checkpoint.initialize_from={expanded(folder / 'expanded', [2, 5])}", *overrides)
    config = load_config(RECIPES / f"{name}.yaml", overrides)
    return config, plan_mixture(config)


def expanded(folder: Path, new_layers: list[int]) -> Path:
    """A folder that says which layers a block expansion added, and holds nothing else."""
    folder.mkdir(exist_ok=True)
    record = {"format": "megatron_syne.surgery", "version": 1, "operations": [], "new_tokens": []}
    (folder / "surgery.json").write_text(json.dumps({**record, "new_layers": new_layers}))
    return folder


def rates(config: RunConfig, plan: MixturePlan, stage: int) -> list[float]:
    """The learning rate of every step of a stage."""
    rate, own = LearningRate(config, plan), plan.stages[stage]
    first = plan.iteration_at(own.first_sample)
    return [rate.at(plan.sample_at(step)) for step in range(first, first + own.iterations)]


def shares(plan: MixturePlan, stage: int) -> dict[str, float]:
    return dict(plan.asked[stage].shares)


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem != "common")
)
def test_recipe_passes_all_rules_and_says_its_command(name: str, tmp_path: Path) -> None:
    config, _ = recipe(name, tmp_path)
    model = resolve_model(config.model)
    check(config, model, world_size_of(config.parallel), "cpu")
    check_launch(config)
    report = dry_run_report(config, model, "cpu")
    for stage in config.data.stages:
        assert f"\n{stage.name} " in report.split("== stages ==")[1].split("== learning rate ==")[0]
    assert not [line for line in report.splitlines() if line.startswith("- ") and "not used" in line]
    header = (RECIPES / f"{name}.yaml").read_text().split("\nbase:")[0]
    assert f"launch/local.sh examples/recipes/{name}.yaml" in header
    assert config.run_dir == str(tmp_path / name)
    table = (RECIPES / "README.md").read_text()
    assert f"[{name}.yaml]({name}.yaml)" in table


def test_branches_begin_where_their_stable_run_ends(tmp_path: Path) -> None:
    """The name of the checkpoint in the file is that of the stable run's last one."""
    for name, stable in BRANCHES.items():
        given = load_config(RECIPES / f"{name}.yaml").checkpoint.branch_from
        assert given is not None and Path(given).name == f"iter_{recipe(stable, tmp_path)[1].train_iters:07d}"


def test_syne(tmp_path: Path) -> None:
    """recipes: 92.5 : 7.5; zh:en 2:8, then zh:en:synthetic 1:7:2; warm-up of 10 of 100 billion tokens from 1 %."""
    config, plan = recipe("llama3_syne", tmp_path)
    first, second = (stage.tokens for stage in plan.asked)
    assert first / second == pytest.approx(92.5 / 7.5)
    own = shares(plan, 0)
    assert own["zh_web"] + own["zh_book"] == pytest.approx(0.2)
    assert own["zh_book"] == pytest.approx(0.2 * 0.20) and own["en_code"] == pytest.approx(0.8 * 0.15)
    assert own["en_math"] == pytest.approx(0.8 * 0.10)
    later = shares(plan, 1)
    assert later["zh_web"] + later["zh_book"] == pytest.approx(0.1) and later["synth_qa"] == 0.2
    assert config.schedule.lr_warmup_tokens == (first + second) / 10
    assert config.schedule.lr_warmup_init / config.optimizer.lr == pytest.approx(1e-7 / 1e-5)
    risen = rates(config, plan, 0)
    batch = 16 * 128
    assert risen[:21] == pytest.approx(
        [1e-5 + (1e-3 - 1e-5) * min(1, step * batch / 40_000) for step in range(21)], rel=1e-12
    )
    assert set(risen[20:] + rates(config, plan, 1)) == {1e-3}
    assert legs(config) == [["bilingual_adaptation", "synthetic_enhancement"]]


def test_inf(tmp_path: Path) -> None:
    config, plan = recipe("inf_34b", tmp_path)
    model = resolve_model(config.model)
    assert model.normalization == "LayerNorm" and model.layernorm_zero_centered_gamma
    assert model.num_attention_heads == 8 * (model.num_query_groups or 0)
    assert [stage.tokens / plan.asked[2].tokens for stage in plan.asked] == [4, 2, 1]  # 2T : 1T : 0.5T
    assert [stage.seq_length / plan.asked[0].seq_length for stage in plan.asked] == [1, 8, 1]  # 4k : 32k : 4k
    assert {each.global_batch_size * each.seq_length for each in plan.segments} == {4096}
    bases = [stage_model(config, model, stage.name).rotary_base for stage in plan.stages]
    assert bases == [10_000, 500_000, 500_000]
    assert legs(config) == [["general"], ["long_context", "enhancement"]]
    ends = [(2.25e-4, 1e-4), (1e-4, 1.5e-5), (5e-5, 5e-6)]
    for number, (top, bottom) in enumerate(ends):
        own = rates(config, plan, number)
        assert max(own) == top and own[0 if number else 10] == top
        assert bottom < own[-1] < bottom + 0.02 * top
    long = shares(plan, 1)
    assert long["zh_book"] + long["en_code"] > shares(plan, 0)["zh_book"] + shares(plan, 0)["en_code"]


def test_llama_pro_and_solar(tmp_path: Path) -> None:
    config, _ = recipe("llama_pro", tmp_path)
    assert trains(leg_config(config, "code_and_mathematics")) == "trains only layers.new"
    assert set(config.data.sources) == {"en_code", "en_math"}
    assert resolve_model(config.model).num_layers == 4 + 2
    solar, _ = recipe("solar", tmp_path)
    assert resolve_model(solar.model).num_layers == 2 * 3 and 48 / 32 == 6 / 4
    assert trains(leg_config(solar, "recovery")) == "trains all"


def test_vocabulary(tmp_path: Path) -> None:
    config, plan = recipe("vocabulary", tmp_path)
    assert legs(config) == [["embeddings"], ["bilingual"]]
    assert trains(leg_config(config, "embeddings")) == "trains only embedding.*, output_layer.*"
    assert trains(leg_config(config, "bilingual")) == "trains all"
    assert set(shares(plan, 0)) == {"zh_web", "zh_book"} and shares(plan, 1)["en_web"] == 0.5
    assert (max(rates(config, plan, 0)), max(rates(config, plan, 1))) == (2e-3, 1e-3)
    assert resolve_model(config.model).vocab_size == 2560 + 256


def test_straight_to_zero(tmp_path: Path) -> None:
    config, plan = recipe("straight_to_zero", tmp_path)
    own, steps = rates(config, plan, 0), plan.train_iters
    expected = [1e-3 * min(n / 10, (steps - n) / (steps - 10)) for n in range(steps)]
    assert own == pytest.approx(expected, rel=1e-12)
    assert LearningRate(config, plan).at(plan.num_samples) == 0
    cosine = recipe("straight_to_zero", tmp_path, "schedule.lr_decay_style=cosine", "optimizer.min_lr=1.0e-4")
    assert rates(*cosine, 0)[-1] == pytest.approx(1e-4, rel=1e-2)


@pytest.mark.parametrize("name", BRANCHES)
def test_branch_decays_from_the_stable_rate(name: str, tmp_path: Path) -> None:
    stable, plan = recipe(BRANCHES[name], tmp_path)
    assert set(rates(stable, plan, 0)[10:]) == {1e-3}
    config, branch = recipe(name, tmp_path)
    assert branch.stages[0] == plan.stages[0]
    assert branch.stages[1].tokens * 10 == plan.num_tokens  # a tenth; OctoThinker: 200 and 20 billion
    assert rates(config, branch, 0) == rates(stable, plan, 0)
    own = rates(config, branch, 1)
    assert own[0] == 1e-3 and all(a > b for a, b in pairwise(own))
    assert LearningRate(config, branch).at(branch.num_samples) == pytest.approx(1e-4)
    others = [recipe(each, tmp_path)[1].asked[1].shares for each in BRANCHES if each != name]
    assert branch.asked[1].shares not in others


def test_branch_of_an_earlier_checkpoint(tmp_path: Path) -> None:
    """The stable run ended at step 50: the branch's decay is as long, from there."""
    _, plan = recipe("minicpm_stable", tmp_path)
    sample = plan.sample_at(50)
    folder = tmp_path / "early"
    folder.mkdir()
    state = {"data": make_ledger(plan, sample, {}), "state": {"consumed_samples": sample}}
    (folder / "state.json").write_text(json.dumps(state))
    overrides = [f"run_dir={tmp_path / 'b'}", f"checkpoint.branch_from={folder}"]
    config = load_config(RECIPES / "minicpm_decay.yaml", overrides)
    branch = plan_mixture(config)
    assert [stage.iterations for stage in branch.stages] == [50, 10]
    assert rates(config, branch, 0)[10:] == [1e-3] * 40
    full = recipe("minicpm_decay", tmp_path)
    assert rates(config, branch, 1) == pytest.approx(rates(*full, 1), rel=1e-9)


def test_stability_gap(tmp_path: Path) -> None:
    config, plan = recipe("stability_gap", tmp_path)
    best = config.data.sources["best_math"]
    assert (best.top_fraction, best.top_by, best.top_is) == (0.1, "perplexity", "lowest")
    epochs = plan.consumed(plan.num_samples)["best_math"] / (193_970 * 0.1)
    assert 4 < epochs < 5 == best.max_epochs
    assert shares(plan, 0)["en_web"] + shares(plan, 0)["en_code"] == pytest.approx(0.2)  # replay


def test_long_contexts(tmp_path: Path) -> None:
    for name in ("code_llama", "code_llama_cp2"):
        config, plan = recipe(name, tmp_path)
        model = resolve_model(config.model)
        assert [stage.seq_length for stage in plan.asked] == [128, 512]  # 4k, 16k
        assert stage_model(config, model, "code").rotary_base == 500_000
        assert stage_model(config, model, "long_context").rotary_base == 1_000_000
        assert legs(config) == [["code"], ["long_context"]]
        assert config.parallel.context_parallel_size == (2 if name == "code_llama_cp2" else 1)
    config, plan = recipe("long_context", tmp_path)
    assert [stage.seq_length for stage in plan.asked] == [128, 256, 512]
    assert {each.global_batch_size * each.seq_length for each in plan.segments} == {2048}
    assert legs(config) == [["short"], ["medium", "long"]]
    long = [shares(plan, n)["en_code"] + shares(plan, n)["zh_book"] for n in range(3)]
    assert long == pytest.approx([0.2, 0.4, 0.6])
