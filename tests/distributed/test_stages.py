"""Stages that change length, RoPE base, rate, batch and what trains: INF-34B's three, scaled down; and branches.

One world of two pipeline stages trains all of it. What a run goes through is compared to the bit: undisturbed,
killed before, at and after a stage change, and as three runs of one stage each that branch off one another.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from .conftest import Bench
from .ranks import run_ranks

pytestmark = pytest.mark.slow

MIX = {"en": 0.75, "zh": 0.25}
ONE = {"name": "one", "tokens": 2048, "mixture": MIX, "rotary_base": 10000.0, "rampup_batch_size": [4, 4, 8]}
TWO = {
    **{"name": "two", "tokens": 2048, "mixture": MIX, "seq_length": 128, "global_batch_size": 4},
    **{"micro_batch_size": 1, "rotary_base": 500000.0, "schedule": {"lr": 1.5e-3}},
}
THREE = {"name": "three", "tokens": 1536, "mixture": MIX, "train_only": ["embedding.*"]}
ENDS = (5, 9, 12)
"""Step after which each stage is over: 2 steps of 4 samples and 3 of 8, 4 of 4, 3 of 8."""

CONSTANT = ["schedule.span=run", "schedule.lr_decay_style=constant", "schedule.lr_warmup_iters=0"]
PLAIN = {"tokens": 1024, "mixture": MIX}


def config(bench: Bench, folder: Path) -> Path:
    """The YAML of the run with three stages."""
    run = yaml.safe_load(bench.config.read_text())
    run["data"]["stages"] = [ONE, TWO, THREE]
    run["schedule"] = {"lr_decay_style": "constant", "lr_warmup_iters": 0, "span": "stage"}
    run["train"] |= {"eval_interval": 1, "eval_iters": 1}
    run["checkpoint"] |= {"save_interval": 2, "keep_latest": 0}
    run["parallel"] = {"pipeline_model_parallel_size": 2}
    file = folder / "stages.yaml"
    file.write_text(json.dumps(run, indent=1))  # which is YAML without anchors
    return file


def stages(*own: dict[str, Any]) -> str:
    return f"data.stages={json.dumps(list(own))}"


def at(root: Path, run: str, step: int) -> Path:
    return root / run / "checkpoints" / f"iter_{step:07d}"


@pytest.fixture(scope="module")
def runs(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(folder of the runs, what each job did)."""
    root = tmp_path_factory.mktemp("stages")
    file = config(bench, root)
    jobs: list[dict[str, Any]] = []

    def job(name: str, run: str, *overrides: str, **options: int) -> None:
        own = {"name": name, "config": str(file), "overrides": [f"run_dir={root / run}", *overrides]}
        jobs.append(own | options)

    def branch(name: str, run: str, step: int, *overrides: str) -> None:
        start = ["checkpoint.initialize_from=null", f"checkpoint.branch_from={at(root, run, step)}"]
        job(name, name, *start, *overrides)

    job("whole", "whole")
    job("killed in one", "killed", abandon_at=3)
    job("killed at the end of one", "killed", abandon_at=5)
    job("killed in two", "killed", abandon_at=7)
    job("stopped at the end of two", "killed", "checkpoint.save_interval=100", stop_at=9)
    job("finished", "killed", "checkpoint.save_interval=100")

    job("first", "first", stages(ONE))
    branch("second", "first", 5, stages(TWO))
    branch("third", "second", 9, stages({**THREE}), "model.rotary_base=500000")
    branch("old base", "first", 5, stages({**TWO, "rotary_base": 10000.0}))

    plain = [*CONSTANT, "train.eval_interval=null"]
    job("stable", "stable", *plain, stages({"name": "a", **PLAIN}, {"name": "b", **PLAIN}))
    branch("same", "stable", 2, *plain, stages({"name": "c", **PLAIN}))
    job("same again", "same", *plain, stages({"name": "c", **PLAIN, "tokens": 1536}))
    branch("other", "stable", 2, *plain, stages({"name": "c", **PLAIN, "mixture": {"zh": 1.0}}))

    job("hard base", "whole", "data.stages.2.rotary_base=77.0", "data.stages.2.tokens=4096")
    branch("silent base", "first", 5, stages({**TWO, "rotary_base": None}))
    branch("own name", "stable", 2, *plain, stages({"name": "a", **PLAIN}))
    branch(
        "other model", "stable", 2, *plain, stages({"name": "c", **PLAIN}), "model.layernorm_epsilon=1.0e-3"
    )
    zh = stages({"name": "c", **PLAIN, "mixture": {"zh": 1.0}})
    branch("no source", "stable", 2, *plain, "data.sources.en=null", zh)
    branch("nowhere", "nothing", 2, *plain, stages({"name": "c", **PLAIN}))
    job("nan", "nan", nan_at=2)
    (root / "jobs.json").write_text(json.dumps(jobs))
    run_ranks(2, ["-m", "distributed.stages_worker", str(root / "jobs.json")], timeout=1800)
    return root, json.loads((root / "results.json").read_text())


def losses(*results: dict[str, Any]) -> dict[int, str]:
    """Loss of each step; one that was trained again must give the same."""
    found: dict[int, str] = {}
    for row in (row for result in results for row in result["steps"]):
        assert found.setdefault(row["step"], row["loss"]) == row["loss"], row
    return found


def test_each_stage_is_trained_as_it_says(runs: tuple[Path, dict[str, Any]]) -> None:
    _, results = runs
    rows = results["whole"]["steps"]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["batch"] for row in rows] == [4, 4, 8, 8, 8] + [4] * 4 + [8] * 3
    assert [row["base"] for row in rows] == [1e4] * 5 + [5e5] * 7
    assert [row["rate"] for row in rows] == [3e-3] * 5 + [1.5e-3] * 4 + [3e-3] * 3
    details = [(each["step"], each["reason"], each["detail"]) for each in results["whole"]["changes"]]
    assert details == [
        (0, "stage", "rotary_base 500000 -> 10000"),
        (5, "stage", "rotary_base 10000 -> 500000"),
        (9, "stage", "trains only embedding.*"),
    ]


def test_a_checkpoint_has_the_base_that_it_was_trained_with(runs: tuple[Path, dict[str, Any]]) -> None:
    root, _ = runs
    for step, base in ((2, 1e4), (5, 1e4), (6, 5e5), (9, 5e5), (12, 5e5)):
        folder = at(root, "whole", step)
        assert json.loads((folder / "state.json").read_text())["model"]["rotary_base"] == base
        assert json.loads((folder / "hf" / "config.json").read_text())["rope_theta"] == base


def test_killed_around_stage_changes_it_is_the_same_run(runs: tuple[Path, dict[str, Any]]) -> None:
    _, results = runs
    names = ("in one", "at the end of one", "in two")
    lives = [*(results[f"killed {name}"] for name in names), results["stopped at the end of two"]]
    assert [life["steps"][0]["step"] for life in lives] == [1, 3, 5, 7]
    assert losses(*lives, results["finished"]) == losses(results["whole"])
    # the evaluation that the stop left undone was made up for by the engine that had trained up to it
    assert "9" not in lives[-1]["validation"]
    assert results["finished"]["validation"]["9"] == results["whole"]["validation"]["9"]
    reasons = [(each["step"], each["reason"]) for each in results["finished"]["changes"]]
    assert reasons == [(0, "stage"), (5, "stage"), (9, "stage")]


def test_three_runs_by_hand_are_the_same(runs: tuple[Path, dict[str, Any]]) -> None:
    _, results = runs
    chain = [results[name] for name in ("first", "second", "third")]
    assert not any(each["refused"] for each in chain)
    assert losses(*chain) == losses(results["whole"])
    assert losses(results["old base"])[6] != losses(results["whole"])[6]


def test_a_branch_that_goes_on_the_same_is_the_same_run(runs: tuple[Path, dict[str, Any]]) -> None:
    _, results = runs
    stable, same = losses(results["stable"]), losses(results["same"])
    assert list(same) == [3, 4] and same == {step: stable[step] for step in same}
    assert list(losses(results["same again"])) == [5]
    other = losses(results["other"])
    assert list(other) == [3, 4] and other[3] != stable[3]
    assert [each["reason"] for each in results["same again"]["changes"]] == ["branch", "configuration"]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (
            "hard base",
            ["ConfigError", "rotary_base: checkpoint 500000.0, configuration 77.0", "a new stage may"],
        ),
        ("silent base", ["ConfigError", "rotary_base: checkpoint 10000.0, configuration 500000.0"]),
        ("own name", ["ConfigError", "'a' is a stage of the run that this one branched off"]),
        ("other model", ["ConfigError", "layernorm_epsilon"]),
        ("no source", ["ConfigError", "data.sources.en is not there, but was read from"]),
        ("nowhere", ["MissingInput", "checkpoint.branch_from"]),
        ("nan", ["DataError", "step 2", "stage one, samples 4 to 7 (4: ", "document"]),
    ],
)
def test_what_cannot_be_is_refused(runs: tuple[Path, dict[str, Any]], name: str, parts: list[str]) -> None:
    refused = runs[1][name]["refused"]
    assert all(part in refused for part in parts), refused
