"""Every example configuration can be looked at before anything is there, and says what its recipe says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_syne.config.learning_rate import LearningRate
from megatron_syne.config.loader import load_config
from megatron_syne.config.schema import RunConfig
from megatron_syne.config.stages import legs, stage_model
from megatron_syne.data.mixture.planning import MixturePlan, plan_mixture
from megatron_syne.models.config import resolve_model
from megatron_syne.parallel.topology import world_size_of
from megatron_syne.preflight.launch_rules import check_launch
from megatron_syne.preflight.report import dry_run_report
from megatron_syne.preflight.rules import check

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
RUNS = sorted(str(path.relative_to(EXAMPLES)) for path in EXAMPLES.glob("*/*.yaml"))
RUNS.remove("recipes/common.yaml")  # no run of its own
RUNS = [name for name in RUNS if "branch_from:" not in (EXAMPLES / name).read_text()]  # test_recipes_plan.py
NEW_LAYERS = {"llama_pro/llama_pro_8b.yaml": [4, 9, 14, 19, 24, 29, 34, 39], "recipes/llama_pro.yaml": [2, 5]}


def example(name: str, *overrides: str) -> tuple[RunConfig, MixturePlan]:
    config = load_config(EXAMPLES / name, overrides)
    return config, plan_mixture(config)


@pytest.mark.parametrize("name", RUNS)
def test_example_passes_all_rules_and_its_dry_run_is_whole(name: str, tmp_path: Path) -> None:
    overrides = [f"run_dir={tmp_path / 'run'}"]
    if name in NEW_LAYERS:  # what tells the new layers from the others lies beside the weights
        record = {"format": "megatron_syne.surgery", "version": 1, "operations": [], "new_tokens": []}
        (tmp_path / "weights").mkdir()
        (tmp_path / "weights" / "surgery.json").write_text(
            json.dumps({**record, "new_layers": NEW_LAYERS[name]})
        )
        overrides.append(f"checkpoint.initialize_from={tmp_path / 'weights'}")
    config, plan = example(name, *overrides)
    model = resolve_model(config.model)
    platform = "cpu" if config.platform == "cpu" else "cuda"
    check(config, model, world_size_of(config.parallel), platform)
    check_launch(config)
    text = dry_run_report(config, model, platform)
    for name, source in config.data.sources.items():
        assert f"  {name} " in text
        if not Path(source.path + ".json").exists():  # told, and no reason to stop
            assert f"{name}: no manifest" in text
    assert f"{plan.num_tokens:,}" in text
    assert not [line for line in text.splitlines() if line.startswith("- ") and "not used" in line]


def test_dry_run_command_of_an_example(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_syne.train", "--config", str(EXAMPLES / "inf_34b/inf_34b.yaml"), "--dry-run"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "stage enhancement" in done.stdout


def shares(plan: MixturePlan, stage: int) -> dict[str, float]:
    return dict(plan.asked[stage].shares)


def test_syne_by_topics_keeps_the_shares_of_syne() -> None:
    config, topics = example("llama3_8b/syne_topics.yaml")
    _, plain = example("llama3_8b/syne.yaml")
    assert [stage.tokens for stage in topics.asked] == [92_500_000_000, 7_500_000_000]
    for stage in (0, 1):
        own = shares(topics, stage)
        for language in ("cn", "en"):
            members = [name for name in own if name.startswith(f"web-{language}-")]
            assert len(members) == 11
            own[f"web-{language}"] = sum(own.pop(name) for name in members)
        assert own == pytest.approx(shares(plain, stage), abs=1e-12)
    chinese = {name for name, source in config.data.sources.items() if source.order == "ordered"}
    assert chinese == {name for name in config.data.sources if "-cn" in name} and len(chinese) == 14
    assert [each.group for each in config.data.reweighting] == ["web-cn", "web-en"]


def test_inf_34b_is_three_stages_of_eight_million_tokens_a_step() -> None:
    facts = [
        (2e12, 4096, 1e4, 2.25e-4, 1e-4),
        (1e12, 32768, 5e5, 1e-4, 1.5e-5),
        (5e11, 4096, 5e5, 5e-5, 5e-6),
    ]
    config, plan = example("inf_34b/inf_34b.yaml")
    rate = LearningRate(config, plan)
    assert legs(config) == [["general"], ["long_context", "enhancement"]]
    for number, (tokens, length, base, top, bottom) in enumerate(facts):
        asked, stage = plan.asked[number], plan.stages[number]
        assert (asked.tokens, asked.seq_length) == (tokens, length)
        segment = plan.segment_at(stage.first_sample)
        assert segment.global_batch_size * length == 2**23
        assert stage_model(config, resolve_model(config.model), stage.name).rotary_base == base
        first = stage.first_sample + (2000 * segment.global_batch_size if number == 0 else 0)
        last = stage.first_sample + stage.samples - segment.global_batch_size
        assert rate.at(first) == top
        assert rate.at(last) == pytest.approx(bottom, rel=1e-4)


def test_stability_gap_reads_its_subset_five_times() -> None:
    config, plan = example("stability_gap/llama3_8b_medicine.yaml")
    medicine = config.data.sources["medicine"]
    epochs = plan.consumed(plan.num_samples)["medicine"] / (50e9 * (medicine.top_fraction or 0))
    assert 4.9 < epochs <= medicine.max_epochs
