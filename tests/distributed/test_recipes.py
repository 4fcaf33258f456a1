"""Every recipe of examples/recipes trains: a few steps of each of its stages, over every change of stage.

The files are the users' own; only lengths are changed: budgets, and warm-ups so that they fit. One world of one
process trains all, one of two the recipe with context parallelism.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from distributed.ranks import REPOSITORY, run_ranks
from megatron_syne.config.loader import load_config
from megatron_syne.data.mixture.planning import stage_requests

pytestmark = pytest.mark.slow

RECIPES = REPOSITORY / "examples" / "recipes"
STEPS = 8
SHORT = {  # what else must be shorter than the file has it
    "llama3_syne": ["schedule.lr_warmup_tokens=4096"],
    "inf_34b": ["data.stages.0.schedule.lr_warmup_iters=2"],
}
STABLE = {"minicpm_decay": "minicpm_stable"} | {
    f"octothinker_{branch}": "octothinker_stable" for branch in ("long", "short", "hybrid")
}
SAVING = {"inf_34b", "vocabulary", "minicpm_stable", "octothinker_stable", "code_llama", "long_context"}
"""Recipes of several legs, or that others branch off; a checkpoint takes longer than the steps."""

JUDGED = {
    "llama3_syne": "zh_web",
    "inf_34b": "en_web",
    "llama_pro": "en_math",
    "solar": "en_web",
    "vocabulary": "zh_web",
    "straight_to_zero": "zh_web",
    "minicpm_stable": "zh_web",
    "octothinker_stable": "en_math",
    "stability_gap": "en_math",
    "code_llama": "en_code",
    "long_context": "en_code",
}
"""The text that a recipe is about: its held-out loss must fall."""


@dataclass
class Trained:
    """The folder of the runs and what each leg of each recipe did."""

    folder: Path
    legs: dict[str, list[dict[str, Any]]]

    def losses(self, name: str) -> list[float]:
        return [loss for leg in self.legs[name] for loss in leg["losses"]]

    def rates(self, name: str) -> list[float]:
        return [rate for leg in self.legs[name] for rate in leg["rates"]]


def small_texts(folder: Path) -> Path:
    """The first 200 documents of each of the demo's texts."""
    folder.mkdir()
    for file in (REPOSITORY / "examples" / "demo" / "texts").glob("*.jsonl"):
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / file.name).write_text("".join(lines[:200]), encoding="utf-8")
    return folder


def moved(path: str, folder: Path) -> Path:
    """A path below runs/recipes, below ``folder``."""
    return folder / Path(path).relative_to(REPOSITORY / "runs" / "recipes")


def job(name: str, folder: Path) -> dict[str, Any]:
    """A recipe with 8 steps for each stage, on the prepared files of ``folder``."""
    path = RECIPES / f"{name}.yaml"
    config = load_config(path)
    overrides = [f"run_dir={folder / name}", "train.eval_interval=null", "train.eval_iters=1"]
    overrides.append("monitor.tensorboard=false")
    for room in ("sources", "validation"):
        for key, source in getattr(config.data, room).items():
            if room == "validation" and key != JUDGED.get(name):
                overrides.append(f"data.validation.{key}=null")
                continue
            overrides.append(f"data.{room}.{key}.path={moved(source.path, folder)}")
    for key in ("data.tokenizer_path", "checkpoint.initialize_from"):
        given = getattr(getattr(config, key.split(".")[0]), key.split(".")[1])
        if "runs/recipes" in (given or ""):
            overrides.append(f"{key}={moved(given, folder)}")
    if name in STABLE:
        last = folder / STABLE[name] / "checkpoints" / f"iter_{STEPS:07d}"
        overrides.append(f"checkpoint.branch_from={last}")
    for number, stage in enumerate(stage_requests(config, ())):
        tokens = STEPS * stage.global_batch_size * stage.seq_length
        overrides.append(f"data.stages.{number}.tokens={tokens}")
        if config.schedule.lr_wsd_decay_tokens:
            overrides.append(f"schedule.lr_wsd_decay_tokens={tokens}")
    if config.schedule.lr_warmup_iters:
        overrides.append("schedule.lr_warmup_iters=2")
    return {
        "name": name,
        "config": str(path),
        "overrides": [*overrides, *SHORT.get(name, [])],
        "saves": name in SAVING or name == "code_llama_cp2",
    }


def train(world_size: int, names: list[str], folder: Path) -> dict[str, list[dict[str, Any]]]:
    where = folder / f"world_{world_size}"
    where.mkdir()
    (where / "jobs.json").write_text(json.dumps([job(name, folder) for name in names]))
    run_ranks(world_size, ["-m", "distributed.recipes_worker", str(where / "jobs.json")], timeout=1800)
    return json.loads((where / "results.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("recipes")
    texts = small_texts(folder / "texts")
    prepare = [sys.executable, str(RECIPES / "prepare.py"), "--texts", str(texts), "--out", str(folder)]
    subprocess.run(prepare, check=True, stdout=subprocess.DEVNULL)
    names = sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem != "common")
    alone = [name for name in names if name != "code_llama_cp2"]
    alone.sort(key=lambda name: name in STABLE)  # branches after what they branch off
    return Trained(folder, train(1, alone, folder) | train(2, ["code_llama_cp2"], folder))


LEGS = {"inf_34b": 2, "vocabulary": 2, "code_llama": 2, "code_llama_cp2": 2, "long_context": 2}
STAGES = {**LEGS, "llama3_syne": 2, "inf_34b": 3, "long_context": 3}


def test_every_recipe_trains_all_its_stages(trained: Trained) -> None:
    for name, legs in trained.legs.items():
        steps, first = STEPS * STAGES.get(name, 1), STEPS if name in STABLE else 0
        assert len(legs) == LEGS.get(name, 1), name
        assert len(trained.losses(name)) == steps, name
        assert all(math.isfinite(loss) for loss in trained.losses(name)), name
        assert legs[0]["first_step"] == first
        assert len(legs) == 1 or legs[1]["first_step"] == STEPS


def test_held_out_loss_falls(trained: Trained) -> None:
    """Of the text that the recipe is about, over its first leg; and long sequences do not undo it."""
    for name, source in JUDGED.items():
        for leg in trained.legs[name][:1]:
            before, after = (leg[f"validation_{when}"][source] for when in ("before", "after"))
            assert math.isfinite(before) and after < before, (name, before, after)
        last = trained.legs[name][-1]["validation_after"][source]
        assert last < trained.legs[name][0]["validation_before"][source], name


def test_stages_begin_with_the_weights_of_the_one_before(trained: Trained) -> None:
    for name in LEGS:
        before, after = trained.legs[name]
        assert before["after"] == after["before"], name
    for name, stable in STABLE.items():
        assert trained.legs[stable][-1]["after"] == trained.legs[name][0]["before"], name


def changed(leg: dict[str, Any]) -> set[str]:
    return {name for name, digest in leg["after"].items() if leg["before"][name] != digest}


def matrices(leg: dict[str, Any]) -> set[str]:
    return {name for name in leg["after"] if "norm" not in name}  # a norm may round to where it was in bf16


def test_only_new_blocks_change_in_llama_pro(trained: Trained) -> None:
    (leg,) = trained.legs["llama_pro"]
    new = {name for name in leg["after"] if re.search(r"\.layers\.(2|5)\.", name)}
    assert changed(leg) <= new and matrices(leg) & new <= changed(leg)
    (solar,) = trained.legs["solar"]
    assert matrices(solar) <= changed(solar)


def test_only_embeddings_change_in_the_first_stage_of_a_new_vocabulary(trained: Trained) -> None:
    first, second = trained.legs["vocabulary"]
    embeddings = {
        name for name in first["after"] if name.endswith(("word_embeddings.weight", "output_layer.weight"))
    }
    assert len(embeddings) == 2 and changed(first) == embeddings
    assert matrices(second) <= changed(second)


def test_branches_decay_and_differ(trained: Trained) -> None:
    for name, stable in STABLE.items():
        assert set(trained.rates(stable)[2:]) == {1e-3}
        rates = trained.rates(name)
        assert rates[0] == 1e-3 and rates == sorted(rates, reverse=True) and rates[-1] < 4e-4
    ends = [json.dumps(trained.legs[name][-1]["after"]) for name in STABLE]
    assert len(set(ends)) == len(STABLE)


def test_context_parallelism_changes_nothing_but_rounding(trained: Trained) -> None:
    """bf16 over 16 steps and a change of rope base: 3e-3 relative."""
    assert trained.losses("code_llama_cp2") == pytest.approx(trained.losses("code_llama"), rel=3e-3)


@pytest.mark.parametrize(("name", "step", "base", "positions"), [
    ("code_llama", 8, 500_000, 256),
    ("code_llama", 16, 1_000_000, 512),
    ("code_llama_cp2", 16, 1_000_000, 512),
    ("inf_34b", 8, 10_000, 64),
    ("inf_34b", 24, 500_000, 512),
    ("long_context", 24, 5_000_000, 512),
])  # fmt: skip
def test_checkpoints_tell_their_own_rope_base(
    trained: Trained, name: str, step: int, base: float, positions: int
) -> None:
    """The checkpoint's own Hugging Face configuration, which an export writes."""
    checkpoint = trained.folder / name / "checkpoints" / f"iter_{step:07d}"
    state = json.loads((checkpoint / "state.json").read_text())["model"]
    config = json.loads((checkpoint / "hf" / "config.json").read_text())
    for found in (state["rotary_base"], config["rope_theta"]):
        assert found == base
    for found in (state["max_position_embeddings"], config["max_position_embeddings"]):
        assert found == positions


def test_exported_long_context_model_has_its_rope_base(trained: Trained, tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, str(REPOSITORY / "tools/convert_checkpoint.py"), "export", "--from",
         str(trained.folder / "code_llama/checkpoints/iter_0000016"), "--out", str(tmp_path / "hf")],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["rope_theta"], config["max_position_embeddings"]) == (1_000_000, 512)
