"""The pictures of a plan, drawn with made-up numbers and read back from what stands on the axes."""

from __future__ import annotations

import re
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn import collisions, page_figures, recorded, texts

from megatron_syne.pictures import cost, frontier, learning_rate, memory, mixture, pipeline, ranks
from megatron_syne.pictures.canvas import tokens_text
from megatron_syne.pictures.page import page

GIB = 2**30
Pass = namedtuple("Pass", "stage chunk micro_batch kind begin end")


def one_f_one_b(stages: int, batches: int) -> list[Any]:
    """1F1B by its rule: forward 1 s, backward 2 s, each waiting for its neighbour."""
    order = {}
    for stage in range(stages):
        first = min(batches, stages - 1 - stage)
        tasks = [("forward", n) for n in range(first)]
        for n in range(batches):
            if first + n < batches:
                tasks.append(("forward", first + n))
            tasks.append(("backward", n))
        order[stage] = tasks
    done: dict[tuple[int, str, int], float] = {}
    free, found, place = [0.0] * stages, [], [0] * stages
    while any(place[stage] < len(order[stage]) for stage in order):
        for stage in order:
            if place[stage] == len(order[stage]):
                continue
            kind, n = order[stage][place[stage]]
            edge = stage == 0 if kind == "forward" else stage == stages - 1
            needs = (stage - 1, kind, n) if kind == "forward" else (stage + 1, kind, n)
            needs = (stage, "forward", n) if kind == "backward" and edge else needs
            if not (kind == "forward" and edge) and needs not in done:
                continue
            begin = max(free[stage], done.get(needs, 0.0))
            end = begin + (1.0 if kind == "forward" else 2.0)
            found.append(Pass(stage, 0, n, kind, begin, end))
            free[stage] = done[stage, kind, n] = end
            place[stage] += 1
    return found


def test_memory_bars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = recorded(monkeypatch, memory)
    bars = {
        "stage 0: 16 layers\n+ embedding": {
            "parameters": 4 * GIB,
            "activations": 70 * GIB,
            "fp8": 0,
            "margin": 8 * GIB,
        },
        "stage 1: 16 layers\n+ output": {
            "parameters": 4 * GIB,
            "activations": 30 * GIB,
            "fp8": 0,
            "logits": 9 * GIB,
        },
    }
    memory.draw_memory(tmp_path / "m.png", bars, 80 * GIB, "h100", "Memory: somebody's model")
    (axis,) = seen
    assert axis.get_xlabel() == "peak memory of each rank of the stage, GiB"
    assert axis.get_title() == "Memory: somebody's model"
    assert [label.get_text() for label in axis.get_yticklabels()] == list(bars)
    drawn = {group.get_label(): [bar.get_width() for bar in group] for group in axis.containers}
    assert drawn == {
        "parameters": [4, 4],
        "activations": [70, 30],
        "margin (fragmentation, CUDA, NCCL)": [8, 0],
        "logits and loss": [0, 9],
    }
    assert axis.containers[1][0].get_x() == 4 and axis.containers[2][0].get_x() == 74, "on one another"
    looks = [(group[0].get_facecolor(), group[0].get_hatch()) for group in axis.containers]
    assert len(set(looks)) == 4
    (line,) = axis.get_lines()
    assert line.get_xdata()[0] == 80 and line.get_label() == "h100: 80 GiB"
    totals = {text.get_text(): text.get_color() for text in axis.texts if "GiB" in text.get_text()}
    assert totals == {"82 GiB, 102%": "#a00000", "43 GiB, 54%": "black"}
    assert not collisions(axis.figure)
    (legend,) = axis.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*drawn, "h100: 80 GiB"]


def test_a_component_keeps_its_colour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = recorded(monkeypatch, memory)
    memory.draw_memory(tmp_path / "a.png", {"all": {"logits": 1, "own": 2}}, None, "", "a")
    memory.draw_memory(tmp_path / "b.png", {"all": {"parameters": 1, "logits": GIB}}, 800 * GIB, "b300", "b")
    looks = [{group.get_label(): group[0].get_facecolor() for group in axis.containers} for axis in seen]
    assert looks[0]["logits and loss"] == looks[1]["logits and loss"] != looks[0]["own"]
    assert not seen[0].get_lines(), "nothing to compare with"
    assert seen[1].get_xlim()[1] < 2, (
        "a small model is not drawn against a GPU that is hundreds of times larger"
    )
    assert "far beyond the right edge" in seen[1].get_lines()[0].get_label()


def test_memory_on_a_page(tmp_path: Path) -> None:
    bars = {
        "stage 0": {"parameters": 4 * GIB, "gradients": 8 * GIB},
        "stage 1": {"parameters": GIB, "gradients": 0},
    }
    page(tmp_path / "m.html", "m", [memory.memory_figure(bars, 80 * GIB, "h100", "Memory")])
    (figure,) = page_figures(tmp_path / "m.html")
    assert {trace["name"]: trace["x"] for trace in figure["data"]} == {
        "parameters": [4, 1],
        "gradients": [8, 0],
    }
    assert figure["layout"]["shapes"][0]["x0"] == 80 and "GiB" in figure["layout"]["xaxis"]["title"]["text"]


@pytest.mark.parametrize(("stages", "batches"), [(2, 4), (4, 8)])
def test_timeline_of_few_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: int, batches: int
) -> None:
    seen, tasks = recorded(monkeypatch, pipeline), one_f_one_b(stages, batches)
    # the textbook's: (stages - 1) of (micro-batches + stages - 1)
    share = (stages - 1) / (batches + stages - 1)
    assert pipeline.bubble_share(tasks) == pytest.approx(share)
    pipeline.draw_pipeline(tmp_path / "t.png", tasks, "Pipeline")
    (axis,) = seen
    title = axis.figure.get_suptitle()
    assert (
        title
        == f"Pipeline\n1F1B, {stages} stages, {batches} micro-batches; bubble {share:.1%} of the stages' time"
    )
    assert axis.get_xlabel() == "time in the step, s"
    assert [label.get_text() for label in axis.get_yticklabels()] == [f"stage {n}" for n in range(stages)]
    boxes = {
        c.get_label(): c.get_paths() for c in axis.collections if c.get_label() in ("forward", "backward")
    }
    assert {label: len(paths) for label, paths in boxes.items()} == dict.fromkeys(boxes, stages * batches)
    for kind, paths in boxes.items():
        drawn = sorted(
            (path.get_extents().x0, path.get_extents().x1, path.get_extents().y1) for path in paths
        )
        asked = sorted((task.begin, task.end, task.stage + 0.42) for task in tasks if task.kind == kind)
        np.testing.assert_allclose(drawn, asked)
    numbers = [int(text.get_text()) for text in axis.texts if text.get_text().isdigit()]
    assert sorted(numbers) == sorted(task.micro_batch for task in tasks)
    assert sum("waits" in text.get_text() for text in axis.texts) == stages
    assert not collisions(axis.figure)


def test_timeline_of_many_passes_is_cut_out_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = recorded(monkeypatch, pipeline)
    tasks = [task._replace(chunk=task.micro_batch % 3) for task in one_f_one_b(4, 60)]
    pipeline.draw_pipeline(tmp_path / "t.png", tasks, "Pipeline")
    whole, fills, drains = seen
    assert [axis.get_title(loc="left") for axis in seen] == [
        "the whole step",
        "how it fills",
        "how it drains",
    ]
    assert "interleaved 1F1B, 4 stages of 3 chunks" in whole.figure.get_suptitle()
    end = max(task.end for task in tasks)
    assert whole.get_xlim() == (0, end) and fills.get_xlim()[0] == 0 and drains.get_xlim()[1] == end
    assert fills.get_xlim()[1] < end / 2 < drains.get_xlim()[0]
    assert not [text for text in whole.texts if text.get_text().isdigit()], "too narrow to be read"
    assert {"0", "1", "2"} <= {text.get_text() for text in fills.texts}
    assert "59" in {text.get_text() for text in drains.texts}
    shades = {tuple(c.get_facecolor()[0]) for c in whole.collections if "chunk" in str(c.get_label())}
    assert len(shades) == 6, "three chunks, forward and backward"
    assert not collisions(whole.figure)


def test_timeline_on_a_page(tmp_path: Path) -> None:
    tasks = one_f_one_b(2, 3)
    page(tmp_path / "t.html", "t", [pipeline.pipeline_figure(tasks, "Pipeline")])
    (figure,) = page_figures(tmp_path / "t.html")
    forward, backward = figure["data"]
    assert forward["name"] == "forward" and len(forward["x"]) == len(backward["base"]) == 6
    assert [row[0] for row in forward["customdata"]] == [t.micro_batch for t in tasks if t.kind == "forward"]
    assert "bubble 25.0%" in figure["layout"]["title"]["text"]


def grid(tp: int, cp: int, dp: int, pp: int) -> list[tuple[int, int, int, int]]:
    """Places in megatron-core's order."""
    return [(t, c, d, p) for p in range(pp) for d in range(dp) for c in range(cp) for t in range(tp)]


@pytest.mark.parametrize("sizes", [(2, 1, 2, 2), (4, 1, 2, 8), (2, 2, 2, 2), (1, 1, 8, 1)])
def test_every_rank_of_a_small_world(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int, int, int]
) -> None:
    seen, places = recorded(monkeypatch, ranks), grid(*sizes)
    tp, cp, _, pp = sizes
    stages = [f"layers {n * 4}-{n * 4 + 3}" for n in range(pp)]
    tensor = {"query heads": [f"{n * 4}-{n * 4 + 3}" for n in range(tp)], "vocabulary rows": ["all"] * tp}
    ranks.draw_ranks(tmp_path / "r.png", places, stages, tensor, [f"part {n}" for n in range(cp)], 8, "Ranks")
    main, _ = seen
    cells = {}
    for text in main.texts:
        found = re.fullmatch(r"rank (\d+)\nnode (\d+)", text.get_text())
        assert found is not None
        x, y = text.get_position()
        cells[int(found[1])] = (int(x), int(y), int(found[2]))
    assert cells == {rank: (t + tp * (c + cp * d), p, rank // 8) for rank, (t, c, d, p) in enumerate(places)}
    assert [label.get_text().replace("\n", " ") for label in main.get_yticklabels()] == [
        f"stage {n}: {text}" for n, text in enumerate(stages)
    ]
    assert len({cell.get_facecolor() for cell in main.patches}) == -(-len(places) // 8), (
        "a colour for each node"
    )
    written = {text for text, _ in texts(main.figure)}
    assert {"query heads", *tensor["query heads"]} <= written
    assert ("part 1" in written) is (cp > 1)
    assert not collisions(main.figure)


def test_a_large_world_is_a_replica_and_a_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, places = recorded(monkeypatch, ranks), grid(8, 1, 8, 8)
    names = [f"layers {n}" for n in range(8)]
    ranks.draw_ranks(tmp_path / "r.png", places, names, {"heads": names}, ["all"], 8, "Ranks")
    main, _, nodes = seen
    shown = {int(text.get_text().split()[1]) for text in main.texts}
    assert shown == {rank for rank, place in enumerate(places) if place[2] == 0}
    replicas = [int(text.get_text()) for text in nodes.texts if text.get_text().isdigit()]
    assert replicas == list(range(8)) * 8, "each node is one replica's stage"
    assert sum(text.get_text().startswith("node") for text in nodes.texts) == 64
    framed = [cell for cell in nodes.patches if cell.get_edgecolor()[0] > 0.7 and not cell.get_fill()]
    assert len(framed) == 8, "the replica that is drawn in full"
    shades = [cell.get_facecolor() for cell in nodes.patches if cell.get_fill()]
    assert len(set(shades)) == 8 and shades[:8] == [shades[0]] * 8, "by stage"
    assert not collisions(main.figure)


def test_nodes_of_several_replicas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TP 3 on nodes of 8: a replica goes from one row, and from one node, into the next."""
    seen, places = recorded(monkeypatch, ranks), grid(3, 1, 16, 1)
    ranks.draw_ranks(
        tmp_path / "r.png", places, ["layers 0-1"], {"heads": ["0", "1", "2"]}, ["all"], 8, "Ranks"
    )
    numbers = [int(text.get_text()) for text in seen[2].texts if text.get_text().isdigit()]
    assert set(numbers) == set(range(16)) and numbers[:5] == [0, 1, 1, 1, 2]
    area = sum(cell.get_width() * cell.get_height() for cell in seen[2].patches if cell.get_fill())
    assert area == 48
    assert not collisions(seen[0].figure)


def test_a_long_row_is_stacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TP 8 x CP 4: the CP ranks of a stage stand below each other."""
    seen, places = recorded(monkeypatch, ranks), grid(8, 4, 2, 2)
    names = [f"{n}" for n in range(8)]
    parts = [f"part {n}" for n in range(4)]
    ranks.draw_ranks(
        tmp_path / "r.png", places, ["layers 0-1", "layers 2-3"], {"heads": names}, parts, 72, "Ranks"
    )
    main = seen[0]
    found = {text.get_text().split()[1]: text.get_position() for text in main.texts}
    assert found["9"] == (1.5, 1.5) and found["64"] == (0.5, 4.5) and len(found) == 64
    assert [label.get_text() for label in main.get_yticklabels()][3:5] == [
        "cp 3",
        "stage 1: layers 2-3; cp 0",
    ]
    assert not collisions(main.figure)


POINTS = [
    frontier.Point("a", "none", 70 * GIB, 100.0),
    frontier.Point("b", "all layers", 30 * GIB, 80.0),
    frontier.Point("c", "none", 60 * GIB, 70.0),
    frontier.Point("d", "none", 90 * GIB, 120.0),
    frontier.Point("e", "none", 900 * GIB, 130.0, "far off"),
]


def test_frontier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = recorded(monkeypatch, frontier)
    frontier.draw_frontier(tmp_path / "f.png", POINTS, 80 * GIB, "h100", "Layouts")
    axis, below = seen
    dots = {c.get_label(): c.get_offsets().tolist() for c in axis.collections}
    assert dots == {
        "none": [[70, 100], [60, 70]],
        "all layers": [[30, 80]],
        "does not fit (1 more beyond the right edge)": [[90, 120]],
    }
    front = next(line for line in axis.get_lines() if line.get_label() == "most speed for the memory")
    assert front.get_xydata().tolist() == [[30, 80], [70, 100]], "c has more memory and less speed than b"
    assert next(line for line in axis.get_lines() if "h100" in line.get_label()).get_xdata()[0] == 80
    assert axis.get_xlabel().endswith("GiB") and axis.get_ylabel() == "predicted tokens/s/GPU"
    cells = {place: cell.get_text().get_text() for place, cell in below.tables[0].get_celld().items()}
    assert [cells[row, 1] for row in range(4)] == ["the fastest that fit", "a", "b", "c"]
    assert cells[1, 2] == "100" and cells[2, 3] == "30.0"
    assert [text.get_text() for text in axis.texts] == ["1", "2", "3"]
    assert not collisions(axis.figure)


def test_frontier_where_nothing_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = recorded(monkeypatch, frontier)
    frontier.draw_frontier(tmp_path / "f.png", POINTS[3:], 20 * GIB, "l4", "Layouts")
    cells = {place: cell.get_text().get_text() for place, cell in seen[1].tables[0].get_celld().items()}
    assert [cells[row, 1] for row in range(3)] == ["none fits; the smallest", "d", "e"]
    assert "does not fit (1 more beyond the right edge)" in [c.get_label() for c in seen[0].collections]


def test_numbers_stand_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six layouts in almost one place."""
    seen = recorded(monkeypatch, frontier)
    near = [frontier.Point(str(n), "none", int((50 + n / 50) * GIB), 100 + n / 50) for n in range(6)]
    frontier.draw_frontier(tmp_path / "f.png", near, 80 * GIB, "h100", "Layouts")
    assert [text.get_text() for text in seen[0].texts] == [str(n) for n in range(1, 7)]
    assert not collisions(seen[0].figure)


def test_frontier_on_a_page(tmp_path: Path) -> None:
    page(tmp_path / "f.html", "f", [frontier.frontier_figure(POINTS, 80 * GIB, "h100", "Layouts")])
    (figure,) = page_figures(tmp_path / "f.html")
    traces = {trace["name"]: trace for trace in figure["data"]}
    assert traces["none"]["x"] == [70, 60] and traces["none, does not fit"]["y"] == [120, 130]
    assert traces["none, does not fit"]["text"] == ["d", "e<br>far off"]


def test_learning_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that doubles half-way: steps are not even along the tokens."""
    seen = recorded(monkeypatch, learning_rate)
    steps = list(range(0, 301))
    tokens = [1000 * min(step, 200) + 2000 * max(0, step - 200) for step in steps]
    rates = [min(step / 50, 1.0) * 1e-4 for step in steps]
    points = [
        learning_rate.KeyPoint("first step", 0, 0, 0.0),
        learning_rate.KeyPoint("end of warm-up", 50_000, 50, 1e-4),
        learning_rate.KeyPoint("start of decay", 50_500, 50.5, 1e-4),
    ]
    curve, stages = learning_rate.Curve(tokens, steps, rates), [("one", 200_000), ("two", 400_000)]
    learning_rate.draw_learning_rate(tmp_path / "l.png", curve, stages, points, "Learning rate: WSD")
    axis, below = seen
    line = axis.get_lines()[0]
    assert line.get_xdata().tolist() == tokens and line.get_ydata().tolist() == rates
    assert axis.get_xlabel() == "tokens consumed" and axis.get_ylabel() == "learning rate"
    (top,) = axis.child_axes
    marks = dict(zip([text.get_text() for text in top.get_xticklabels()], top.get_xticks(), strict=True))
    assert top.get_xlabel() == "steps done" and len(marks) > 4
    assert all(place == tokens[int(step)] for step, place in marks.items()), marks
    words = [text.get_text() for text in axis.texts]
    assert words == ["one (200 k)", "two (200 k)", "1", "2", "3"]
    cells = {place: cell.get_text().get_text() for place, cell in below.tables[0].get_celld().items()}
    assert [cells[2, column] for column in range(5)] == ["2", "end of warm-up", "50,000", "50", "0.0001"]
    assert not collisions(axis.figure)

    page(
        tmp_path / "l.html", "l", [learning_rate.learning_rate_figure(curve, stages, points, "Learning rate")]
    )
    (figure,) = page_figures(tmp_path / "l.html")
    assert figure["data"][0]["customdata"] == steps and figure["data"][1]["text"][1] == "end of warm-up"


def test_mixture_says_its_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = recorded(monkeypatch, mixture)
    shares = {"en": [0.8, 0.8, 0.25, 0.25], "zh": [0.2, 0.2, 0.25, 0.25], "code": [0.0, 0.0, 0.5, 0.5]}
    positions, stages = (
        [0, 600, 600, 700],
        [("a_stage_with_a_long_name", 600), ("another_that_is_short", 700)],
    )
    epochs = {"en": 0.5, "zh": 2.5, "code": None}
    mixture.draw_mixture(tmp_path / "m.png", positions, shares, stages, epochs, reached=300)
    mix, bars = seen
    words = [text.get_text() for text in mix.texts]
    assert {"en 80%", "zh 20%", "code 50%", "a_stage_with_a_long_name (600)"} <= set(words)
    assert [bar.get_width() for bar in bars.patches] == [2.5, 0.5] and bars.get_xlabel() == "epochs"
    assert not collisions(mix.figure)

    page(tmp_path / "m.html", "m", [mixture.mixture_figure(positions, shares, stages, epochs, 300)])
    (figure,) = page_figures(tmp_path / "m.html")
    assert {trace["name"]: trace["y"] for trace in figure["data"]} == shares
    assert (
        "2.5 epochs" in figure["data"][1]["hovertemplate"]
        and "epochs" not in figure["data"][2]["hovertemplate"]
    )


def test_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = recorded(monkeypatch, cost)
    costs = {
        "layers": [cost.Cost("2", 500.0, 0.5, 400.0), cost.Cost("4", 1000.0, 1.0, 600.0)],
        "ranks": [cost.Cost("1", 1000.0, 1.0, 600.0), cost.Cost("TP2 PP2", 1200.0, 1.2, 450.0)],
    }
    cost.draw_cost(tmp_path / "c.png", costs, "Cost")
    layers, layout, memory_of_layers, memory_of_ranks = seen
    measured, arithmetic = layers.get_lines()
    assert list(measured.get_ydata()) == [500, 1000] and list(arithmetic.get_ydata()) == [1000, 1000]
    assert [bar.get_height() for bar in layout.patches] == [1000, 1200]
    assert [bar.get_height() for bar in memory_of_ranks.patches] == [600, 450]
    assert [label.get_text() for label in memory_of_ranks.get_xticklabels()] == ["1", "TP2\nPP2"]
    assert layers.get_ylabel() == "ms per step" and memory_of_layers.get_xlabel() == "layers"
    assert not collisions(layers.figure)


def test_collisions_are_seen(tmp_path: Path) -> None:
    """Guards the guard."""
    from megatron_syne.pictures.canvas import picture

    with picture(tmp_path / "x.png", 400, 300) as (axis,):
        axis.set_axis_off()
        axis.text(0.5, 0.5, "one thing")
        axis.text(0.52, 0.5, "another")
        axis.text(5, 0.1, "outside").set_in_layout(False)
    assert sorted(collisions(axis.figure)) == ["'one thing' over 'another'", "'outside' over the edge"]


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (0, "0"),
        (999, "999"),
        (40_192, "40.19 k"),
        (999_999, "1 M"),
        (92_501_180_416, "92.5 B"),
        (3.5e12, "3.5 T"),
    ],
)
def test_tokens_in_words(tokens: float, text: str) -> None:
    assert tokens_text(tokens) == text
