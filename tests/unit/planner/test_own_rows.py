"""Measurements of our own beside the planner: hand-made records of known constants are found again, tables add up."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks" / "gpu"))

import planned
import predictions
from cases import CASES, HELD_OUT, Case, case_named
from ours import told
from record import Record

from megatron_syne.models.config import resolve_model
from megatron_syne.planner.hardware import GPUS
from megatron_syne.planner.refit import SPREAD, Observation, in_use, refit, with_constants
from megatron_syne.planner.speed import PARTS
from megatron_syne.planner.stacks import CUDA_PLATFORM
from megatron_syne.preflight.rules import check

H200 = GPUS["h200"]
TRUE = {
    "bf16_share": 0.66,
    "memory_share": 0.80,
    "attention": 1.2,
    "chunked_passes": 2.0,
    "delayed": 0.58,
    "tensorwise": 0.70,
    "blockwise": 0.45,
}
"""What a made-up machine reaches."""


BASE = case_named("8l-bf16")
NATIVE = replace(
    BASE,
    name="native",
    engine=(("cross_entropy_loss_fusion", True), ("cross_entropy_fusion_impl", "native")),
)
LONG = replace(case_named("32k-4l-bf16"), name="long", precision="tensorwise")
EIGHT_B = replace(
    BASE,
    name="8b",
    num_layers=32,
    overrides=(
        "precision.accumulate_allreduce_grads_in_fp32=false",
        "optimizer.use_precision_aware_optimizer=true",
        "optimizer.main_grads_dtype=bf16",
        "memory.recompute_granularity=full",
        "memory.recompute_method=uniform",
    ),
)


def record(case: Case, memory: float = 1.1) -> Record:
    """As ``ours.py`` would leave it on the made-up machine, which takes ``memory`` times the planned tensors."""
    config = planned.config_of_case(case)
    stack = with_constants(planned.stack_of(dict(case.engine)), TRUE)
    plan = planned.planned(config, H200, stack)
    return Record(
        case=case.name,
        kind="ours",
        command="-",
        step_seconds=[plan.time.seconds * noise for noise in (1.0, 0.99, 1.02)],
        tokens_per_step=plan.time.tokens_per_step,
        model_flops_per_token=plan.time.model_flops_per_token,
        peak_allocated_bytes=int(memory * plan.tensors),
        peak_reserved_bytes=int(memory * plan.tensors) + plan.components["activations"] // 4,
        config=told(config),
        found={"engine": {key: str(value) for key, value in case.engine}},
        environment={"device": "NVIDIA H200"},
    )


@pytest.fixture(scope="module")
def records() -> dict[str, Record]:
    """Of the cases that constants are fitted to, the held-out one, and three others."""
    cases = [*map(case_named, planned.FITTED), case_named(HELD_OUT), EIGHT_B, LONG, NATIVE]
    return {case.name: record(case) for case in cases}


@pytest.fixture(scope="module")
def constants(records: dict[str, Record]) -> dict[str, float]:
    seen = planned.observations(planned.rows_of(records, H200), H200)
    assert [one.name for one in seen] == list(planned.FITTED)
    return refit(seen)


def test_known_constants_are_found_again(constants: dict[str, float]) -> None:
    assert constants == pytest.approx(TRUE, rel=0.01)


def test_what_was_not_fitted_is_met_with_them(
    records: dict[str, Record], constants: dict[str, float]
) -> None:
    """The held-out case too."""
    before, after = (planned.rows_of(records, H200, given) for given in (None, constants))
    others = [name for name in records if name not in planned.FITTED]
    for name in others:
        errors = [next(row.error for row in rows if row.record.case == name) for rows in (before, after)]
        assert errors[0] is not None and abs(errors[0]) > 0.005, name
        assert errors[1] == pytest.approx(0, abs=0.003), name
    assert {row.record.case: row.use for row in after}[HELD_OUT] == "held out"


def test_noise_of_the_rows_is_not_blown_up(records: dict[str, Record]) -> None:
    """0.3 % of each row: constants that share a step trade with each other, what they predict together stays."""
    seen = planned.observations(planned.rows_of(records, H200), H200)
    held = planned.config_of_case(case_named(HELD_OUT))
    true = planned.planned(held, H200, with_constants(CUDA_PLATFORM, TRUE)).time.seconds
    for sign in (1, -1):
        noisy = [
            replace(one, seconds=one.seconds * (1 + sign * 0.003 * (-1) ** number))
            for number, one in enumerate(seen)
        ]
        found = planned.planned(held, H200, with_constants(CUDA_PLATFORM, refit(noisy))).time.seconds
        assert found == pytest.approx(true, rel=0.02)


def test_few_rows_leave_the_rest_as_it_is() -> None:
    """One bf16 row: no FP8 constant, and those that it cannot tell apart move together, by less than they are off."""
    config, known = planned.config_of_case(case_named("8l-bf16")), in_use(CUDA_PLATFORM)
    slower = with_constants(CUDA_PLATFORM, {"bf16_share": 0.9 * known["bf16_share"]})
    seconds = planned.planned(config, H200, slower).time.seconds
    found = refit([Observation("one", config, seconds, H200, CUDA_PLATFORM)])
    assert set(found) == set(SPREAD) - {"delayed", "tensorwise", "blockwise", "chunked_passes"}
    assert 0.9 * known["bf16_share"] < found["bf16_share"] < known["bf16_share"]
    again = planned.planned(config, H200, with_constants(CUDA_PLATFORM, found)).time.seconds
    assert again == pytest.approx(seconds, rel=1e-3)
    with pytest.raises(ValueError, match="no measured row"):
        refit([])


def test_a_recipe_of_its_own_leaves_the_others() -> None:
    stack = with_constants(CUDA_PLATFORM, {"blockwise": 0.3})
    times = {
        name: [
            planned.planned(planned.config_of_case(case_named(name)), H200, one).time.seconds
            for one in (CUDA_PLATFORM, stack)
        ]
        for name in ("8l-bf16", "8l-tensorwise", "8l-blockwise")
    }
    assert times["8l-bf16"][0] == times["8l-bf16"][1]
    assert times["8l-tensorwise"][0] == times["8l-tensorwise"][1]
    assert times["8l-blockwise"][0] < times["8l-blockwise"][1]


def test_the_table_says_what_the_records_say(records: dict[str, Record]) -> None:
    rows = planned.rows_of({"8l-bf16": records["8l-bf16"]}, H200)
    (row,) = rows
    assert row.plan is not None and row.memory_error is not None
    assert row.memory_error == pytest.approx(1 / 1.1 - 1, rel=1e-6)
    cells = [cell.strip() for cell in planned.table(rows).splitlines()[-1].split("|")[1:-1]]
    measured = records["8l-bf16"].median_seconds
    assert measured is not None
    assert cells[:2] == ["8l-bf16", "fitted"]
    assert float(cells[2]) == pytest.approx(measured, abs=1e-4)
    assert float(cells[3]) == pytest.approx(row.plan.time.seconds, abs=1e-4)
    assert cells[4] == f"{row.plan.time.seconds / measured - 1:+.1%}"
    assert cells[5] == f"{8192 / measured:,.0f}"
    assert cells[9] == "-9.1%"
    assert len(cells) == len(planned.table(rows).splitlines()[0].split("|")) - 2


def test_the_gpu_is_the_records(records: dict[str, Record]) -> None:
    one = replace(records["8l-bf16"], environment={"device": "NVIDIA H100 80GB HBM3"})
    (there,), (here,) = (planned.rows_of({"8l-bf16": each}, H200) for each in (one, records["8l-bf16"]))
    assert there.plan and here.plan and there.plan.time.seconds > here.plan.time.seconds


def test_a_failed_case_is_listed_and_not_counted(records: dict[str, Record]) -> None:
    failed = Record("8l-delayed", "ours", "-", error="Traceback\nRuntimeError: out of memory")
    other = Record("machine", "machine", "-", step_seconds=[1.0])
    some = {name: records[name] for name in ("8l-bf16", "native")}
    rows = planned.rows_of({**some, "8l-delayed": failed, "machine": other}, H200)
    lines = planned.table(rows).splitlines()
    assert len(lines) == 2 + 3
    assert "| 8l-delayed | failed |" in lines[-1] and "RuntimeError: out of memory |" in lines[-1]
    assert lines[-1].count("|") == lines[0].count("|")
    assert [one.name for one in planned.observations(rows, H200)] == ["8l-bf16"]
    counts = [line.split("|")[2].strip() for line in planned.summary(rows).splitlines()[2:]]
    assert counts == ["1", "1", "0"]


def test_what_the_planner_has_not_is_no_error_of_its(records: dict[str, Record]) -> None:
    """A change that it does not know is shown with its error, and said so; the summary leaves it out."""
    odd = record(replace(BASE, name="graphs", engine=(("cuda_graph_impl", "local"),)))
    odd.step_seconds = [2 * seconds for seconds in odd.step_seconds]
    rows = planned.rows_of({"graphs": odd, "native": records["native"]}, H200)
    assert "not in the planner: cuda_graph_impl" in planned.table(rows)
    good = next(row.error for row in rows if row.record.case == "native")
    assert good is not None
    assert planned.summary(rows).splitlines()[3].split("|")[4].strip() == f"{good:+.1%}"


def test_from_a_folder_to_the_constants(
    records: dict[str, Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line as on the day: a folder of JSON in, the tables out."""
    assert planned.main([str(tmp_path), "--fit"]) == 1
    assert "no measured row" in capsys.readouterr().err
    for one in records.values():
        one.write(tmp_path)
    assert planned.main([str(tmp_path), "--fit", "--output", str(tmp_path / "planned.md")]) == 0
    text = (tmp_path / "planned.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    before, _, after = text.partition("## Recalibrated")
    assert "| held out | 1 |" in before and "| held out | 1 |" in after
    assert "| bf16_share | " in after and "Held out: held-out is predicted at" in after
    assert "| memory.FRAGMENTATION (median) | 0.050 | 0." in after


def test_what_rests_on_nothing_measured_is_said() -> None:
    for case, word in (
        (case_named("8l-blockwise"), "blockwise"),
        (LONG, "long sequence"),
        (case_named("bf16-loss-chunks"), "in parts"),
        (replace(EIGHT_B, overrides=(*EIGHT_B.overrides, "optimizer.optimizer_cpu_offload=true")), "offload"),
        (replace(BASE, overrides=("train.deterministic_mode=true",)), "not in the planner: determ"),
        (replace(BASE, engine=(("apply_rope_fusion", False),)), "not in the planner: apply_rope_fusion"),
    ):
        found = planned.notes(planned.config_of_case(case), dict(case.engine))
        assert any(word in note for note in found), word
    assert planned.notes(planned.config_of_case(BASE), {}) == []
    assert planned.notes(planned.config_of_case(NATIVE), dict(NATIVE.engine)) == []


def test_every_case_of_ours_may_run_on_a_gpu() -> None:
    """A rehearsal, of short sequences on a CPU, does not see what the rules forbid there."""
    for case in CASES:
        if case.kind == "ours":
            config = planned.config_of_case(case)
            check(config, resolve_model(config.model), 1, "cuda")


def test_every_case_of_ours_is_predicted() -> None:
    """The page that is written before the measurement names each once; its parts of a step are the whole step."""
    text = predictions.page()
    names = [case.name for case in CASES if case.kind == "ours"]
    assert set(planned.FITTED) | {HELD_OUT} <= set(names)
    section = text.partition("## Every case")[2].partition("## The goals")[0]
    assert [line.split("|")[1].strip() for line in section.splitlines() if line.startswith("| ")][1:] == names
    for name in ("8l-tensorwise", "8b-bf16"):
        config = planned.config_of_case(case_named(name))
        parts = predictions.parts_of(config, CUDA_PLATFORM)
        whole = planned.planned(config, H200, CUDA_PLATFORM).time
        assert sum(parts.values()) == pytest.approx(whole.seconds, rel=1e-6)
        assert set(whole.parts) == set(PARTS)
