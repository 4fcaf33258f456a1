"""The picture of a run shows what the run logged: panels, curves, stages, units; as pixels and as a page."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from megatron_syne.errors import (
    EXIT_CANNOT_CREATE,
    EXIT_CONFIG,
    EXIT_NO_INPUT,
    CannotCreate,
    ConfigError,
    run_cli,
)
from megatron_syne.pictures.canvas import colours
from megatron_syne.pictures.page import page, plotly_colours
from megatron_syne.pictures.runs import Curves, Line, Panel, draw_panel, stage_marks
from megatron_syne.runs.history import read_history
from megatron_syne.runs.panels import MOST_POINTS, curves_of, smoothed, thinned
from tools import plot_run

USUAL = [
    "Training loss",
    "Training loss by source",
    "Validation loss by source",
    "Learning rate",
    "Gradient norm",
    "Speed per GPU",
    "Model FLOP/s utilisation",
    "Time of a step by part",
    "Peak memory of a rank",
    "Mixture as read",
]


def run(folder: Path, steps: int = 40, shift: float = 0.0, change: int = 25) -> Path:
    """A run of two stages: zh and en, then code too; validated each 10 steps."""
    lines: list[dict[str, Any]] = []
    tokens = {"zh": 0, "en": 0, "code": 0}
    for step in range(1, steps + 1):
        stage, read = ("one", (750, 250, 0)) if step < change else ("two", (500, 250, 250))
        for source, count in zip(tokens, read, strict=True):
            tokens[source] += count
        loss = 5.0 - step / 20 + shift
        lines.append(
            {
                "step": step,
                "loss": loss,
                "loss_hex": loss.hex(),
                "grad_norm": 0.5 if step != 7 else 50.0,
                "learning_rate": 1e-4,
                "tokens_per_second": 2000.0,
                "tokens_per_second_per_gpu": 500.0,
                "mfu": 0.41,
                "step_seconds": 9.0,
                "data_seconds": 1.0,
                "forward_backward_seconds": 6.0,
                "optimizer_seconds": 1.5,
                "checkpoint_seconds": 0.0 if step != 20 else 90.0,
                "peak_memory_bytes": 3 * 2**30,
                "consumed_tokens": 1000 * step,
                "stage": stage,
                "loss/zh": loss + 0.5,
                "loss/en": loss - 0.5,
                **{f"tokens/{source}": count for source, count in tokens.items() if count},
            }
        )
        if step % 10 == 0:
            lines.append({"step": step, "validation": {"zh": loss + 1.0, "en": loss - 1.0}})
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    return folder


def code(*arguments: object) -> int:
    """The exit code as the shell sees it."""
    try:
        return run_cli(lambda: plot_run.main([str(each) for each in arguments]))
    except SystemExit as end:  # wrong options
        return int(end.code or 0)


def panel_of(curves: Curves, title: str) -> Panel:
    return next(panel for panel in curves.panels if panel.title.startswith(title))


def values(line: Line) -> dict[float, float]:
    return dict(zip(np.asarray(line.x).tolist(), np.asarray(line.y).tolist(), strict=True))


def test_panels_of_a_run(tmp_path: Path) -> None:
    curves = curves_of([read_history(run(tmp_path / "a"))])
    assert [panel.title for panel in curves.panels] == USUAL and curves.runs == ["a"]
    assert values(panel_of(curves, "Training loss").lines[0])[20.0] == 4.0
    assert {line.label: values(line)[20.0] for line in panel_of(curves, "Training loss by").lines} == {
        "zh": 4.5,
        "en": 3.5,
    }
    assert [list(values(line)) for line in panel_of(curves, "Validation").lines] == [
        [10.0, 20.0, 30.0, 40.0]
    ] * 2
    assert panel_of(curves, "Gradient norm").log and not panel_of(curves, "Learning").log
    assert set(values(panel_of(curves, "Model FLOP/s").lines[0]).values()) == {41.0}, "MFU in percent"
    assert set(values(panel_of(curves, "Peak memory").lines[0]).values()) == {3.0}, "GiB"
    split = panel_of(curves, "Time of a step")
    assert split.stacked
    assert {line.label: values(line)[20.0] for line in split.lines} == {
        "data": 1.0,
        "forward-backward": 6.0,
        "optimizer": 1.5,
        "other": 0.5,
        "checkpoint": 90.0,
    }
    mixture = {line.label: values(line) for line in panel_of(curves, "Mixture").lines}
    assert {name: each[10.0] for name, each in mixture.items()} == {"zh": 0.75, "en": 0.25, "code": 0.0}
    assert {name: each[30.0] for name, each in mixture.items()} == {"zh": 0.5, "en": 0.25, "code": 0.25}
    assert stage_marks(curves) == [("one", 1.0, 0), ("two", 25.0, 0)]


def test_nothing_is_shown_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": n, "loss": 2.0, "loss/zh": 2.0, "tokens/zh": n, "tokens_per_second": 3.0} for n in (1, 2)
    ]
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    assert [panel.title for panel in curves_of([read_history(path)]).panels] == ["Training loss", "Speed"]
    asked = curves_of([read_history(path)], ["loss/*", "mixture/*"])
    assert [panel.title for panel in asked.panels] == ["Training loss by source", "Mixture as read"]


def test_axes(tmp_path: Path) -> None:
    history = read_history(run(tmp_path / "a"))
    tokens = curves_of([history], over="tokens")
    assert (
        values(panel_of(tokens, "Training loss").lines[0])[20_000.0] == 4.0
        and tokens.x_label == "tokens consumed"
    )
    assert list(values(panel_of(tokens, "Validation").lines[0])) == [10_000.0, 20_000.0, 30_000.0, 40_000.0]
    assert stage_marks(tokens) == [("one", 1000.0, 0), ("two", 25_000.0, 0)]
    hours = list(values(panel_of(curves_of([history], over="hours"), "Learning").lines[0]))
    assert hours[9] == pytest.approx(90 / 3600) and hours[-1] == pytest.approx((40 * 9 + 90) / 3600)
    late = curves_of([history], from_step=21)
    assert min(values(panel_of(late, "Training loss").lines[0])) == 21.0
    assert stage_marks(late) == [("one", 21.0, 0), ("two", 25.0, 0)]
    path = tmp_path / "bare" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(ConfigError, match=r"--x tokens: .*consumed_tokens"):
        curves_of([read_history(path)], over="tokens")
    with pytest.raises(ConfigError, match="--from-step 2"):
        curves_of([read_history(path)], from_step=2)


def test_what_is_asked_for(tmp_path: Path) -> None:
    history = read_history(run(tmp_path / "a"))
    curves = curves_of([history], ["validation/*", "loss", "tokens_per_second", "consumed_tokens"])
    assert [panel.title for panel in curves.panels] == [
        "Training loss", "Validation loss by source", "Speed", "consumed_tokens",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"no run has 'los'; there are .*loss, loss/en"):
        curves_of([history], ["los"])


def test_runs_beside_each_other(tmp_path: Path) -> None:
    """Runs differ by their line styles, sources by their colours; each stage that differs is named with its run."""
    runs = [run(tmp_path / "a"), run(tmp_path / "b", shift=0.5, change=30), run(tmp_path / "other" / "b")]
    curves = curves_of([read_history(each) for each in runs])
    assert curves.runs == ["a", str(tmp_path / "b"), str(tmp_path / "other" / "b")]
    assert not panel_of(curves, "Time of a step").stacked
    axis = Figure().subplots()
    draw_panel(axis, curves, panel_of(curves, "Training loss by source"))
    drawn = [line for line in axis.get_lines() if len(line.get_xdata()) == 40]
    assert [line.get_linestyle() for line in drawn] == ["-", "-", "--", "--", ":", ":"]
    assert len({tuple(line.get_color()) for line in drawn}) == 2
    legend = [text.get_text() for text in axis.get_legend().get_texts()]
    assert legend == ["zh", "en", *curves.runs]
    names = [name for name, _, _ in stage_marks(curves)]
    assert names == ["one (a)", "two (a)", f"two ({tmp_path / 'b'})"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("step", "nats per token")


def test_a_single_run_is_readable_in_grey(tmp_path: Path) -> None:
    curves = curves_of([read_history(run(tmp_path / "a"))])
    for panel in curves.panels:
        axis = Figure().subplots()
        draw_panel(axis, curves, panel)
        assert axis.get_ylabel() and axis.get_xlabel() == "step" and axis.get_title() == panel.title
        marks = [line for line in axis.get_lines() if len(line.get_xdata()) == 2 and line.get_alpha() == 0.6]
        assert [line.get_xdata()[0] for line in marks] == [1.0, 25.0]
        assert [text.get_text().strip() for text in axis.texts] == ["one", "two"]
    axis = Figure().subplots()
    draw_panel(axis, curves, panel_of(curves, "Training loss by source"))
    assert len({line.get_linestyle() for line in axis.get_lines()[:2]}) == 2


def test_many_lines() -> None:
    """Eighty layers are a scale of colours with a legend beside the axes."""
    lines = [Line(0, f"layer_{n}", [1.0, 2.0], [n, n + 1.0], raw=([1.0], [1.0])) for n in range(80)]
    axis = Figure().subplots()
    curves = Curves("t", ["r"], "step", [Panel("p", "u", lines)])
    draw_panel(axis, curves, curves.panels[0])
    assert len({tuple(line.get_color()) for line in axis.get_lines()}) == 80
    assert len(axis.get_legend().get_texts()) == 20


def test_png(tmp_path: Path) -> None:
    assert code(run(tmp_path / "a"), "--output", tmp_path / "a.png") == 0
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.array(image.convert("RGB")).astype(int)
    assert pixels.shape == (2060, 1700, 3)
    coloured = pixels.max(axis=2) - pixels.min(axis=2) > 60
    for row in range(5):
        for column in range(2):
            part = coloured[60 + 400 * row : 460 + 400 * row, 850 * column : 850 * (column + 1)]
            assert part.sum() > 100, (row, column)
    twice = [tmp_path / "1.png", tmp_path / "2.png"]
    assert [code(tmp_path / "a", "--metrics", "loss", "--output", path) for path in twice] == [0, 0]
    assert twice[0].read_bytes() == twice[1].read_bytes(), "the same numbers give the same bytes"


class Page(HTMLParser):
    """Tags, what they refer to, and the text of scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.title = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.references += [
            str(value) for name, value in attributes if name in ("src", "href", "data", "action")
        ]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        if self.open[-1:] == ["title"]:
            self.title += data


def figures_of(path: Path) -> tuple[Page, list[tuple[list[dict[str, Any]], dict[str, Any]]]]:
    """The page, well-formed, and (traces, layout) of each of its figures."""
    found = Page()
    found.feed(path.read_text(encoding="utf-8"))
    assert found.open == [], "every tag is closed"
    figures = []
    for script in found.scripts[1:]:
        place = script.index("[", script.index("Plotly.newPlot("))
        traces, end = json.JSONDecoder().raw_decode(script, place)
        layout, _ = json.JSONDecoder().raw_decode(script, script.index("{", end))
        assert "http" not in script
        figures.append((traces, layout))
    return found, figures


def test_page(tmp_path: Path) -> None:
    a, b = run(tmp_path / "a"), run(tmp_path / "b", shift=0.5)
    assert code(a, b, "--output", tmp_path / "x.html", "--smooth", 4) == 0
    found, figures = figures_of(tmp_path / "x.html")
    assert found.references == [] and found.title == "a, b"
    assert len(found.scripts) == 1 + len(figures) and len(found.scripts[0]) > 1_000_000, (
        "plotly is in it, once"
    )
    assert "</script" not in "".join(found.scripts)
    titles = [layout["title"]["text"].removesuffix(" (mean of 4 logged steps)") for _, layout in figures]
    assert titles == USUAL
    traces, layout = figures[0]
    assert [(each["name"], each["line"].get("dash")) for each in traces] == [
        ("a (each step)", None), ("a", "solid"), ("b (each step)", None), ("b", "dash"),
    ]  # fmt: skip
    assert traces[0]["x"] == list(range(1, 41)) and traces[0]["y"] == [
        5.0 - step / 20 for step in range(1, 41)
    ]
    assert traces[1]["y"][9] == pytest.approx(np.mean([5.0 - step / 20 for step in (7, 8, 9, 10)]))
    assert layout["xaxis"]["title"]["text"] == "step" and layout["yaxis"]["title"]["text"] == "nats per token"
    assert [shape["x0"] for shape in layout["shapes"]] == [1.0, 25.0]
    assert [note["text"] for note in layout["annotations"]] == ["one", "two"]
    assert code(a, "--output", tmp_path / "one.html") == 0
    split = figures_of(tmp_path / "one.html")[1][USUAL.index("Time of a step by part")][0]
    assert [each["stackgroup"] for each in split] == ["whole"] * 5


def test_pages_are_whole_or_not_there(tmp_path: Path) -> None:
    from plotly.graph_objects import Figure as PlotlyFigure

    figure = PlotlyFigure().add_scatter(x=[1, 2], y=[3.0, math.nan], name="</script><b>")
    page(tmp_path / "new" / "p.html", "<b> & co", [figure, figure])
    found, figures = figures_of(tmp_path / "new" / "p.html")
    assert found.title == "<b> & co" and len(figures) == 2 and figures[0][0][0]["name"] == "</script><b>"
    assert figures[0][0][0]["y"] == [3, None]
    before = (tmp_path / "new" / "p.html").read_bytes()
    page(tmp_path / "new" / "p.html", "<b> & co", [figure, figure])
    assert (tmp_path / "new" / "p.html").read_bytes() == before
    with pytest.raises(ConfigError, match=r"written as \.html"):
        page(tmp_path / "p.htm", "t", [])
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(CannotCreate, match=r"folder\.html: cannot be created"):
        page(tmp_path / "folder.html", "t", [])
    assert sorted(each.name for each in tmp_path.iterdir()) == ["folder.html", "new"]


def test_colours_of_pages_are_those_of_pictures() -> None:
    names = ["zh", "en", "code"]
    css = plotly_colours(names)
    for name, shade in colours(names).items():
        assert css[name] == "rgb({},{},{})".format(*(round(255 * part) for part in shade[:3]))


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (["a"], EXIT_CONFIG),
        (["a", "--output", "x.pdf"], EXIT_CONFIG),
        (["a", "--output", "x.png", "--smooth", "0"], EXIT_CONFIG),
        (["a", "--output", "x.png", "--x", "days"], EXIT_CONFIG),
        (["a", "--output", "x.png", "--metrics", "nothing"], EXIT_CONFIG),
        (["none", "--output", "x.png"], EXIT_NO_INPUT),
        (["a", "--output", "a/metrics.jsonl/x.png"], EXIT_CANNOT_CREATE),
    ],
)
def test_wrong_options(
    tmp_path: Path, wrong: list[str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    assert code(*wrong) == expected
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


def test_a_broken_run_is_drawn_up_to_the_break(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run(tmp_path / "a") / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:10], "nonsense\n", *lines[10:]]))
    assert code(tmp_path / "a", "--output", tmp_path / "x.html") == 0
    assert "metrics.jsonl:11: invalid JSON" in capsys.readouterr().err
    assert figures_of(tmp_path / "x.html")[1][0][0][0]["x"] == list(range(1, 11))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(math.nan)), min_size=1, max_size=40), st.integers(1, 12)
)
def test_smoothing_is_the_mean_of_the_last(numbers: list[float], window: int) -> None:
    means = smoothed(np.array(numbers), window)
    for place, mean in enumerate(means.tolist()):
        known = [each for each in numbers[max(place - window + 1, 0) : place + 1] if not math.isnan(each)]
        if known:
            # a running sum: errors are of the size of the largest number, not of the mean
            assert mean == pytest.approx(sum(known) / len(known), rel=1e-9, abs=1e-7)
        else:
            assert math.isnan(mean)


def test_thinning_keeps_spikes_and_gaps() -> None:
    x = np.arange(100_000, dtype=np.float64)
    y = np.sin(x)
    y[54_321], y[77_777], y[33_333] = 50.0, -50.0, np.nan
    few_x, few_y = thinned(x, y)
    assert len(few_x) <= 1.1 * MOST_POINTS and (few_x[0], few_x[-1]) == (0, 99_999)
    assert (
        few_y[few_x == 54_321] == 50.0
        and few_y[few_x == 77_777] == -50.0
        and np.isnan(few_y[few_x == 33_333])
    )
    assert (np.diff(few_x) > 0).all() and np.array_equal(few_y, y[few_x.astype(int)], equal_nan=True)
    assert len(thinned(x[:MOST_POINTS], y[:MOST_POINTS])[0]) == MOST_POINTS
