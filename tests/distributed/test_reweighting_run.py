"""Shares that follow the validation perplexity: the same however often the run was stopped, and where."""

from __future__ import annotations

import math
from typing import Any

import pytest

from .conftest import Bench

pytestmark = pytest.mark.slow

MIXTURE = "{web: {share: 0.75, of: {en: 0.5, zh: 0.5}}, more: {share: 0.25, of: {en2: 0.8, zh2: 0.2}}}"  # two groups
STAGES = (
    f"[{{name: one, tokens: 6144, mixture: {MIXTURE}}}, {{name: two, tokens: 2048, mixture: {{en: 1.0}}}}]"
)
KILLED = {  # name -> (number of the run, how it ends, the step)
    "after_adjusting": ("exit", 8),
    "before_adjusting": ("exit", 7),
    "signalled": ("stop_at", 8),  # the evaluation of this step is left to the next run
    "killed": ("abandon_at", 9),  # goes on from step 6: adjusts at step 8 once more
    "killed_at_adjusting": ("abandon_at", 8),
}


def options(bench: Bench) -> list[str]:
    en, zh = bench.folder / "en", bench.folder / "zh"
    names = {"en": en, "zh": zh, "en2": en, "zh2": zh}
    sources = "".join(f"{name}: {{path: {path}, max_epochs: .inf}}, " for name, path in names.items())
    return [
        f"data.sources={{{sources}}}",
        f"data.validation={{{sources}}}",
        f"data.stages={STAGES}",
        "data.reweighting=[{group: web, interval: 4, alpha: 0.5}, {group: more, interval: 8, alpha: 0.5, "
        "weights: {en2: 0.5}}]",
        "train.eval_interval=2",
        "train.eval_iters=1",
    ]


@pytest.fixture(scope="module")
def results(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder, common = tmp_path_factory.mktemp("reweighting"), options(bench)
    jobs: dict[str, list[str]] = {"undisturbed": common}
    extra: dict[str, dict] = {}
    for name, (how, step) in KILLED.items():
        here = [*common, f"run_dir={folder / name}"]
        ends = {"exit": f"train.exit_interval={step}", "abandon_at": "checkpoint.save_interval=6"}
        jobs[f"{name}_1"] = [*here, ends[how]] if how in ends else here
        if how != "exit":
            extra[f"{name}_1"] = {how: step}
        jobs[f"{name}_2"] = here
    elsewhere = [*common, f"run_dir={folder / 'elsewhere'}"]
    jobs["elsewhere_1"] = [*elsewhere, "train.exit_interval=7"]
    found = bench.train(2, jobs, extra)
    return found | bench.train(1, {"elsewhere_2": elsewhere})


def losses(result: dict) -> list[str]:
    return [row["loss"] for row in result["steps"]]


def test_the_shares_follow_the_perplexity(results: dict[str, dict]) -> None:
    found = results["undisturbed"]
    assert len(found["steps"]) == 16
    plan: dict[str, Any] = found["plan"]
    web = [c for c in found["changes"] if c["reason"] == "reweighting web"]
    assert [(c["step"], c["sample"]) for c in web] == [(4, 32), (8, 64)]  # at step 12 stage two has no groups
    assert "shares" not in web[0]  # nothing to compare with yet
    before, now = web[0]["perplexity"], web[1]["perplexity"]
    for number, row in enumerate(found["validation"]):
        if number in (1, 3):
            assert web[number // 2]["perplexity"]["zh"] == math.exp(row["zh"])
    deltas = {name: now[name] - before[name] for name in ("en", "zh")}
    largest = max(abs(d) for d in deltas.values())
    factors = {name: 1 + 0.5 * delta / largest for name, delta in deltas.items()}
    norm = 0.375 * sum(factors.values())
    expected = {name: 0.75 * 0.375 * factor / norm for name, factor in factors.items()}
    assert web[1]["shares"] == pytest.approx(expected, rel=1e-12)
    column = {name: plan["sources"].index(name) for name in plan["sources"]}
    used = [(s["first_sample"], s["shares"][column["en"]]) for s in plan["segments"]]
    assert (64, web[1]["shares"]["en"]) in used and (0, 0.375) in used
    assert web[1]["shares"]["en"] != 0.375


@pytest.mark.parametrize("name", list(KILLED))
def test_a_stopped_run_goes_on_to_the_bit(results: dict[str, dict], name: str) -> None:
    whole, first, second = (results[key] for key in ("undisturbed", f"{name}_1", f"{name}_2"))
    how, step = KILLED[name]
    kept = 6 if how == "abandon_at" else step
    assert second["first_step"] == kept
    assert losses(first)[:kept] + losses(second) == losses(whole)
    assert second["plan"] == whole["plan"] and second["changes"] == whole["changes"]
    evaluated = [*first["validation"][: kept // 2 - (how == "stop_at")], *second["validation"]]
    assert evaluated == whole["validation"]


def test_another_layout_goes_on_with_the_same_samples(results: dict[str, dict]) -> None:
    whole, second = results["undisturbed"], results["elsewhere_2"]
    found = [float.fromhex(x) for x in losses(second)]
    assert found == pytest.approx([float.fromhex(x) for x in losses(whole)[7:]], abs=5e-6)
    for mine, theirs in zip(second["plan"]["segments"], whole["plan"]["segments"], strict=True):
        assert mine["counts"] == theirs["counts"] and mine["bases"] == theirs["bases"]
        assert mine["shares"] == pytest.approx(theirs["shares"], rel=1e-5)
