"""From a configuration to its pictures: what stands on them is what the run has."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from drawn import collisions, page_figures, recorded

from megatron_syne.config.learning_rate import LearningRate
from megatron_syne.config.schema import (
    DataConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    SourceConfig,
    StageConfig,
    TrainConfig,
)
from megatron_syne.data.mixture.planning import plan_mixture
from megatron_syne.models.config import resolve_model
from megatron_syne.pictures import frontier, learning_rate, memory, mixture, pipeline, ranks
from megatron_syne.planner import drawings
from megatron_syne.planner.drawings import draw_plan
from megatron_syne.planner.hardware import gpu_named
from megatron_syne.planner.search import evaluate
from megatron_syne.planner.shapes import shapes
from megatron_syne.planner.timeline import timeline, waiting_shares

ROOT = Path(__file__).resolve().parents[3]
GIB = 2**30
H100 = gpu_named("h100")


def mock(preset: str, **parallel: Any) -> RunConfig:
    """A run of made-up tokens."""
    return RunConfig(
        run_dir="run",
        model=ModelConfig(preset=preset),
        parallel=ParallelConfig(**parallel),
        data=DataConfig(seq_length=4096, mock=True),
        train=TrainConfig(global_batch_size=32, train_iters=10),
    )


def everything(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Axes of every kind of picture drawn from now on."""
    modules = (frontier, learning_rate, memory, mixture, pipeline, ranks)
    return {module.__name__.rpartition(".")[2]: recorded(monkeypatch, module) for module in modules}


def test_a_plan_of_eight_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = everything(monkeypatch)
    config = mock(
        "llama3_8b", tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True
    )
    model = resolve_model(config.model)
    stages = shapes(config, model)
    others = [
        replace(config, memory=MemoryConfig("full", "uniform", 1)),
        replace(config, train=replace(config.train, micro_batch_size=8)),
    ]
    candidates = [evaluate(each, stages, 8, H100) for each in (config, *others)]
    written = draw_plan(tmp_path, config, model, 8, H100, candidates)
    names = ["memory.png", "ranks.png", "timeline.png", "frontier.png", "frontier.html", "plan.html"]
    assert [path.name for path in written] == names and all(path.is_file() for path in written)

    (axis,) = seen["memory"]
    own = candidates[0]
    assert "llama3_8b on 8 x h100, TP2 PP2 DP2" in axis.get_title()
    for number, stage in enumerate(own.memory):
        total = sum(group[number].get_width() for group in axis.containers)
        assert total == pytest.approx(stage.total / GIB)
    assert [label.get_text() for label in axis.get_yticklabels()] == [
        "stage 0: 16 layers\n+ embedding",
        "stage 1: 16 layers\n+ output",
    ]

    grid, table = seen["ranks"]
    assert [label.get_text() for label in grid.get_yticklabels()] == [
        "stage 0: embedding, layers 0-15",
        "stage 1: layers 16-31, output",
    ]
    cells = [cell.get_text().get_text() for _, cell in sorted(table.tables[0].get_celld().items())]
    assert cells[5:] == [
        *("tp 0", "0-15", "0-3", "0-7,167", "0-64,127"),
        *("tp 1", "16-31", "4-7", "7,168-14,335", "64,128-128,255"),
    ]

    (line,) = seen["pipeline"]
    assert "1F1B, 2 stages, 16 micro-batches" in line.figure.get_suptitle()
    assert own.time.num_microbatches == 16

    dots = {tuple(map(float, row)) for c in seen["frontier"][0].collections for row in c.get_offsets()}
    asked = {(each.peak_bytes / GIB, each.time.tokens_per_second_per_gpu) for each in candidates}
    for drawn, expected in zip(sorted(dots), sorted(asked), strict=True):
        assert drawn == pytest.approx(expected)
    assert not seen["mixture"] and not seen["learning_rate"], "made-up tokens have neither"
    assert len(page_figures(tmp_path / "plan.html")) == 3
    for axes in seen.values():
        assert not axes or not collisions(axes[0].figure)


@pytest.mark.parametrize(
    ("preset", "world", "parallel"),
    [
        (
            "llama3_70b",
            64,
            {
                "tensor_model_parallel_size": 4,
                "pipeline_model_parallel_size": 8,
                "virtual_pipeline_model_parallel_size": 5,
            },
        ),
        (
            "llama3_1_405b",
            1024,
            {
                "tensor_model_parallel_size": 8,
                "pipeline_model_parallel_size": 16,
                "pipeline_model_parallel_layout": "Et*7|" + "t*8|" * 14 + "t*7L",
            },
        ),
        ("llama3_2_1b", 1, {}),
    ],
)
def test_no_text_lies_over_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str, world: int, parallel: dict[str, Any]
) -> None:
    """Large and small worlds; made twice, the same bytes."""
    seen = everything(monkeypatch)
    config = mock(preset, **parallel)
    config.train.global_batch_size = 128
    model = resolve_model(config.model)
    first = {path: path.read_bytes() for path in draw_plan(tmp_path, config, model, world, H100)}
    for name, axes in seen.items():
        assert not axes or not collisions(axes[0].figure), name
    assert any(path.name == "timeline.png" for path in first) is (world > 1)
    if world == 64:
        texts = [label.get_text() for label in seen["ranks"][0].get_yticklabels()]
        assert texts[7].replace("\n", " ") == "stage 7: layers 14-15 | 30-31 | 46-47 | 62-63 | 78-79, output"
    if world == 1:
        draw_plan(tmp_path, config, model, world, H100)
        assert all(path.read_bytes() == before for path, before in first.items())


def staged(tmp_path: Path, **schedule: Any) -> RunConfig:
    """Two stages of two sources that nobody has prepared, the second of longer sequences in smaller batches."""
    config = mock("llama3_2_1b")
    config.data = DataConfig(
        seq_length=1024,
        sources={name: SourceConfig(path=str(tmp_path / name), max_epochs=9) for name in ("en", "zh")},
        stages=[
            StageConfig(name="bilingual", tokens=4_000_000, mixture={"en": 0.75, "zh": 0.25}),
            StageConfig(
                name="long", tokens=2_000_000, mixture={"zh": 1.0}, seq_length=4096, global_batch_size=4
            ),
        ],
    )
    config.train = TrainConfig(global_batch_size=32)
    config.optimizer = OptimizerConfig(lr=1e-4, min_lr=1e-5)
    config.schedule = ScheduleConfig(**schedule)
    return config


def test_stages_and_learning_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = everything(monkeypatch)
    config = staged(tmp_path, lr_decay_style="WSD", lr_warmup_tokens=500_000, lr_wsd_decay_iters=30)
    plan, model = plan_mixture(config), resolve_model(config.model)
    written = [path.name for path in draw_plan(tmp_path / "new", config, model, 1, H100)]
    assert written[2:] == [
        "mixture.png",
        "mixture.html",
        "learning_rate.png",
        "learning_rate.html",
        "plan.html",
    ]
    assert "of the run's stages the fullest" in seen["memory"][0].get_title()

    (mix,) = seen["mixture"]
    assert {"en 75%", "zh 25%", "zh 100%"} <= {text.get_text() for text in mix.texts}
    axis, below = seen["learning_rate"]
    cells = {place: cell.get_text().get_text() for place, cell in below.tables[0].get_celld().items()}
    rows = [[cells[row, column] for column in range(1, 5)] for row in range(1, max(cells)[0] + 1)]
    assert [row[0] for row in rows] == [
        *("first step", "end of warm-up", "long: first step", "start of decay", "last step"),
    ]
    border = plan.stages[0].tokens
    assert rows[2][1] == f"{border:,}" and rows[2][2] == str(plan.stages[0].iterations)
    assert rows[3][2] == str(plan.train_iters - 30) and rows[1][3] == "0.0001"
    assert rows[4][1] == f"{plan.num_tokens - 4 * 4096:,}"
    rate, curve = LearningRate(config, plan), axis.get_lines()[0]
    values = dict(zip(curve.get_xdata(), curve.get_ydata(), strict=True))
    assert len(values) == plan.train_iters
    for step in range(plan.train_iters):
        before = min(step, plan.stages[0].iterations) * 32 * 1024
        before += max(0, step - plan.stages[0].iterations) * 4 * 4096
        assert values[before] == rate.at(plan.sample_at(step))
    for axes in seen.values():
        assert not axes or not collisions(axes[0].figure)
    assert len(page_figures(tmp_path / "new" / "plan.html")) == 3


def test_a_schedule_of_each_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = everything(monkeypatch)
    config = staged(tmp_path, lr_decay_style="cosine", span="stage", lr_warmup_iters=5)
    model = resolve_model(config.model)
    config.model = replace(model, preset=None, hf_path="models/" + "a-name-that-is-long-" * 8)
    config.parallel.pipeline_model_parallel_size = 4
    draw_plan(tmp_path, config, model, 4, H100, [evaluate(config, shapes(config, model), 4, H100)])
    axis, below = seen["learning_rate"]
    assert "cosine, begun anew in each stage" in axis.get_title()
    cells = {place: cell.get_text().get_text() for place, cell in below.tables[0].get_celld().items()}
    names = [cells[row, 1] for row in range(1, max(cells)[0] + 1)]
    points = ("first step", "end of warm-up", "last step")
    assert names == [f"{stage}: {point}" for stage in ("bilingual", "long") for point in points]
    for name, axes in seen.items():
        assert axes and not collisions(axes[0].figure), name


@pytest.mark.parametrize("name", ["w$x_{$", os.fsdecode(b"bad\xff")])
def test_a_name_is_no_formula_and_may_be_no_utf8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    seen = everything(monkeypatch)
    config = mock("llama3_8b", pipeline_model_parallel_size=2)
    model = resolve_model(config.model)
    config.model = replace(model, preset=None, hf_path=str(tmp_path / name))
    draw_plan(tmp_path / "plan", config, model, 2, H100, [evaluate(config, shapes(config, model), 2, H100)])
    shown = name.replace("\udcff", "?")
    for kind in ("memory", "ranks", "pipeline", "frontier"):
        figure = seen[kind][0].figure
        assert f"{shown} on 2 x h100" in (figure.get_suptitle() or seen[kind][0].get_title()), kind


def test_a_long_step_is_drawn_without_its_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counted(num_microbatches: int, *sizes: Any) -> Any:
        asked.append(num_microbatches)
        return timeline(num_microbatches, *sizes)

    monkeypatch.setattr("megatron_syne.planner.timeline.timeline", counted)
    monkeypatch.setattr(drawings, "timeline", counted)
    seen = everything(monkeypatch)
    config = mock("llama3_8b", pipeline_model_parallel_size=2)
    config.train.global_batch_size = 100_000
    model = resolve_model(config.model)
    draw_plan(tmp_path, config, model, 2, H100)
    assert asked == [128]
    whole, fills, drains = seen["pipeline"]
    title = whole.figure.get_suptitle()
    assert "100,000 micro-batches, drawn the first 64 and the last 64; bubble " in title
    assert "0" in {text.get_text() for text in fills.texts}
    assert "99999" in {text.get_text() for text in drains.texts}
    assert "without the middle" in whole.get_xlabel() and not collisions(whole.figure)
    time = evaluate(config, shapes(config, model), 2, H100).time
    waits = waiting_shares(100_000, time.forward_seconds, time.backward_seconds)
    assert f"bubble {sum(waits) / 2:.1%}" in title
    assert [text.get_text() for text in whole.texts] == [f" waits {share:.1%}" for share in waits]
    shown = page_figures(tmp_path / "plan.html")[1]
    assert "drawn the first 64" in shown["layout"]["title"]["text"]


@pytest.mark.parametrize(("stages", "chunks"), [(2, 1), (4, 1), (4, 3)])
def test_the_closed_waiting_is_that_of_the_timeline(stages: int, chunks: int) -> None:
    forward = [1.0 + 0.1 * stage for stage in range(stages)]
    backward = [2 * seconds for seconds in forward]
    tasks = timeline(1200, forward, backward, chunks)
    assert waiting_shares(1200, forward, backward, chunks) == pytest.approx(pipeline.waiting(tasks), abs=2e-3)


def test_the_benchmark_draws_its_committed_table() -> None:
    spec = importlib.util.spec_from_file_location("cost_benchmark", ROOT / "benchmarks" / "cost.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cost_benchmark"] = module
    spec.loader.exec_module(module)
    found = module.read_table(ROOT / "benchmarks" / "results" / "training.md")
    values = {axis: [row.value for row in rows] for axis, rows in found.items()}
    assert values == {
        axis: [module.label(axis, point) for point in points] for axis, points in module.AXES.items()
    }
    assert all(
        row.milliseconds > row.per_flop > 0 and row.megabytes > 0 for rows in found.values() for row in rows
    )
