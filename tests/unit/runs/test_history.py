"""What a run left is read back whole, or up to where it breaks off, and never with figures that were not there."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_syne.errors import DataError, MissingInput, SyneError
from megatron_syne.runs import metrics_file
from megatron_syne.runs.event_files import metric_name
from megatron_syne.runs.history import History, read_history


def write(path: Path, *records: dict[str, Any] | str) -> Path:
    """A ``metrics.jsonl``; text is written as it is."""
    lines = [each if isinstance(each, str) else json.dumps(each) + "\n" for each in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines))
    return path


def points(history: History, metric: str = "loss") -> dict[int, float]:
    series = history.series[metric]
    assert len(series.steps) == len(series.values)
    return dict(zip(series.steps, series.values, strict=True))


def step(number: int, loss: float | None = None, **more: Any) -> dict[str, Any]:
    return {"step": number, "loss": 10.0 - number if loss is None else loss, **more}


def test_all_records_of_a_run(tmp_path: Path) -> None:
    write(
        tmp_path / "zh" / "metrics.jsonl",
        step(10, stage="one", **{"loss/zh": 2.5, "tokens/zh": 4096, "new_in_2030": 7}),
        {"step": 10, "validation": {"zh": 2.25}, "validation_perplexity": {"zh": math.exp(2.25)}},
        step(20, stage="one", **{"fp8/events": [{"step": 20}], "note": "text"}),
        step(30, stage="two", **{"loss/zh": 2.0}),
        {"step": 20, "harness": {"ceval/acc": 0.5}},
        {"step": 10, "harness": {"ceval/acc": 0.25}},
    )
    history = read_history(tmp_path / "zh")
    assert history.name == "zh" and history.problems == [] and not history.broken
    assert points(history) == {10: 0.0, 20: -10.0, 30: -20.0}
    assert points(history, "loss/zh") == {10: 2.5, 30: 2.0}
    assert points(history, "tokens/zh") == {10: 4096.0} and points(history, "new_in_2030") == {10: 7.0}
    assert points(history, "validation/zh") == {10: 2.25}
    assert points(history, "validation_perplexity/zh") == {10: math.exp(2.25)}
    assert points(history, "harness/ceval/acc") == {10: 0.25, 20: 0.5}, (
        "late results stand at their checkpoint"
    )
    assert history.stages == [("one", 10), ("two", 30)]
    assert not {"fp8/events", "note", "stage", "step"} & set(history.series)
    bare = read_history(tmp_path / "zh" / "metrics.jsonl")
    assert bare.series == history.series and bare.name == "zh"


def test_only_what_is_asked_for_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", *(step(n, grad_norm=1.0, **{"loss/zh": 2.0}) for n in range(1, 50)))
    history = read_history(path, ["loss/*", "grad_norm"])
    assert set(history.series) == {"loss/zh", "grad_norm"} and len(history.series["grad_norm"].steps) == 49
    assert set(history.names) == {"loss", "loss/zh", "grad_norm"}, "the others are known by name"


def test_cut_at_every_byte(tmp_path: Path) -> None:
    """A run that was killed, or is being written: what stands before the tear is read, and the tear is told."""
    records = [step(n, loss_hex=(10.0 - n).hex()) for n in range(1, 4)]
    whole = write(tmp_path / "whole.jsonl", *records).read_bytes()
    ends = [whole.index(b"\n") + 1, whole.index(b"\n", whole.index(b"\n") + 1) + 1, len(whole)]
    cut = tmp_path / "cut.jsonl"
    for size in range(len(whole)):
        cut.write_bytes(whole[:size])
        complete = sum(size >= end - 1 for end in ends)  # a record without its newline is whole
        if not complete:
            with pytest.raises(DataError, match=r"cut\.jsonl"):
                read_history(cut)
            continue
        history = read_history(cut)
        assert list(points(history)) == list(range(1, complete + 1))
        torn = size not in ends and size not in [end - 1 for end in ends]
        assert [f"cut.jsonl:{complete + 1}: breaks off" in each for each in history.problems] == [True] * torn
        assert not history.broken


BROKEN = {
    '{"step": 3, "lo{"step": 3, "loss": 1}\n': "invalid JSON at byte",
    "[1, 2]\n": "expected a JSON object, found list",
    '{"loss": 1.0}\n': '"step"',
    '{"step": true, "loss": 1.0}\n': '"step"',
    '{"step": -1, "loss": 1.0}\n': '"step"',
    '{"step": 3, "loss": 1.0, "loss_hex": "0xzz"}\n': "hexadecimal",
    '{"step": 3, "loss": 1.0, "loss_hex": 1}\n': "expected text",
    '{"step": 3, "loss": 1.0, "validation": {"zh": ' + "9" * 400 + "}}\n": "too large",
    '{"step": 3, "loss": 1.0, "\\ud800": 1.0}\n': "surrogate",
    "\0" * 40 + "\n": "NUL",
    '{"step": 3, "loss": ' + "9" * 400 + "}\n": "too large",
    "[" * 100_000 + "\n": "",
}


@pytest.mark.parametrize("line", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_line_ends_the_reading(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "metrics.jsonl", step(1), step(2), line, step(4))
    history = read_history(path)
    assert set(points(history)) == {1, 2}, "nothing is taken of a broken line"
    assert all(list(each.steps) == [1, 2] for each in history.series.values())
    assert history.broken and len(history.problems) == 1
    assert history.problems[0].startswith(f"{path}:3: ") and BROKEN[line] in history.problems[0]
    assert "later lines were left out" in history.problems[0]
    last = read_history(write(tmp_path / "last.jsonl", step(1), line))
    assert not last.broken and len(last.problems) == 1, "nothing good can follow"


def test_broken_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "metrics.jsonl", step(1))
    path.write_bytes(path.read_bytes() + b'{"step": 2, "loss\xff": 1}\n' + path.read_bytes())
    assert "invalid UTF-8" in read_history(path).problems[0]


def test_an_endless_line_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_file, "MAX_LINE_BYTES", 64)
    path = write(tmp_path / "metrics.jsonl", step(1), "x" * 1000 + "\n", step(2))
    history = read_history(path)
    assert list(points(history)) == [1] and "more than 64 bytes" in history.problems[0] and history.broken


def test_blank_lines_and_values_that_are_none(tmp_path: Path) -> None:
    path = write(
        tmp_path / "metrics.jsonl",
        "\n",
        '{"step": 1, "loss": NaN, "grad_norm": null}\n',
        '{"step": 2, "loss": null, "loss_hex": "inf", "grad_norm": Infinity}\n',
        step(3, 1.5, grad_norm=0.5),
        " \n",
    )
    history = read_history(path)
    assert history.problems == []
    assert math.isnan(points(history)[1]) and points(history)[2] == math.inf and points(history)[3] == 1.5
    norms = points(history, "grad_norm")
    assert math.isnan(norms[1]) and norms[2] == math.inf and norms[3] == 0.5


def test_the_bits_count_and_not_the_decimals(tmp_path: Path) -> None:
    exact = 7.870338201522827
    path = write(tmp_path / "metrics.jsonl", {"step": 1, "loss": 7.87, "loss_hex": exact.hex()})
    assert points(read_history(path)) == {1: exact}


def test_a_resumed_run_counts_from_where_it_was_resumed(tmp_path: Path) -> None:
    """Killed at 60, resumed from 30 without clean-up: the steps that were lost are not shown."""
    path = write(
        tmp_path / "metrics.jsonl",
        *(step(n, 1.0, stage="one" if n <= 40 else "two") for n in range(10, 70, 10)),
        {"step": 60, "validation": {"zh": 1.0}},
        *(step(n, 2.0, stage="one") for n in (40, 50)),
    )
    history = read_history(path)
    assert points(history) == {10: 1.0, 20: 1.0, 30: 1.0, 40: 2.0, 50: 2.0}
    assert history.series.get("validation/zh") is None and history.stages == [("one", 10)]
    assert (
        len(history.problems) == 1 and f"{path}:8: step 40 comes again after step 60" in history.problems[0]
    )
    assert not history.broken


def test_the_same_step_again(tmp_path: Path) -> None:
    path = write(tmp_path / "metrics.jsonl", *(step(n, value) for n in range(1, 9) for value in (1.0, 2.0)))
    history = read_history(path)
    assert points(history) == dict.fromkeys(range(1, 9), 2.0)
    assert len(history.problems) == 4 and "5 more" in history.problems[-1]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=30),
            st.fixed_dictionaries(
                {"step": st.integers(0, 5), "loss": st.floats(), "x": st.text(max_size=3)}
            ).map(lambda record: json.dumps(record).encode()),
        ),
        max_size=8,
    )
)
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("any") / "metrics.jsonl"
    path.write_bytes(b"\n".join(lines))
    try:
        history = read_history(path)
    except SyneError as error:
        assert str(path) in str(error)
        return
    for series in history.series.values():
        assert list(series.steps) == sorted(set(series.steps)) and len(series.steps) == len(series.values)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="no such run folder"):
        read_history(tmp_path / "none")
    with pytest.raises(MissingInput, match=r"no metrics\.jsonl and no tensorboard"):
        read_history(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(DataError, match="holds no step"):
        read_history(tmp_path)
    write(tmp_path / "metrics.jsonl", "nonsense\n", step(1))
    with pytest.raises(DataError, match=r"metrics\.jsonl:1: .*nothing to show"):
        read_history(tmp_path)


def test_stages_of_a_run_that_did_not_log_them(tmp_path: Path) -> None:
    """By the budgets: a stage ends with the global batch that fills it."""
    write(tmp_path / "metrics.jsonl", *(step(n, consumed_tokens=400.0 * n) for n in range(1, 9)))
    (tmp_path / "config.yaml").write_text(
        "data: {stages: [{name: a, tokens: 1000}, {name: b, tokens: 800}, {name: c, tokens: 1}, {name: d, tokens: 9}]}"
    )
    assert read_history(tmp_path).stages == [("a", 1), ("b", 4), ("c", 6), ("d", 7)]
    (tmp_path / "config.yaml").write_text("data: {stages: [{name: a}]}")
    history = read_history(tmp_path)
    assert history.stages == [] and "config.yaml" in history.problems[0]


def events(folder: Path, first: int, last: int, value: float, purge: int | None = None) -> Path:
    """As the trainer writes them; returns the file."""
    from torch.utils.tensorboard import SummaryWriter

    before = set(folder.glob("*")) if folder.is_dir() else set()
    writer = SummaryWriter(str(folder), purge_step=purge)
    writer.add_text("run", "text", 0)
    for number in range(first, last + 1):
        writer.add_scalar("train/loss", value, number)
        writer.add_scalar("validation_loss/zh", value + 0.1, number, new_style=True)
    writer.close()
    return (set(folder.glob("*")) - before).pop()


def test_tensorboard_where_there_is_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "tensorboard"
    old = events(folder, 1, 6, 1.0)
    new = events(folder, 4, 8, 2.0, purge=4)
    # files of the same second are put in order by what follows the time in their names
    old = old.rename(folder / f"events.out.tfevents.1000.host.1.{old.name[-1]}")
    new = new.rename(folder / f"events.out.tfevents.2000.host.1.{new.name[-1]}")
    history = read_history(tmp_path / "run")
    expected = {1: 1.0, 2: 1.0, 3: 1.0, 4: 2.0, 5: 2.0, 6: 2.0, 7: 2.0, 8: 2.0}
    assert points(history) == expected and history.single_precision and history.name == "run"
    assert points(history, "validation/zh")[5] == pytest.approx(2.1)
    assert "run" not in history.series and history.problems == []
    assert points(read_history(folder)) == expected and points(read_history(old))[6] == 1.0

    whole = new.read_bytes()
    new.write_bytes(whole[:-5])  # torn
    history = read_history(tmp_path / "run")
    assert points(history) == expected and not history.broken
    assert 8 not in points(history, "validation/zh") and "truncated" in history.problems[0]
    new.write_bytes(whole[: len(whole) // 2] + b"\xff\xff" + whole[len(whole) // 2 + 2 :])  # damaged
    history = read_history(tmp_path / "run")
    assert history.broken and str(new) in history.problems[0] and points(history)[1] == 1.0
    write(tmp_path / "run" / "metrics.jsonl", step(1))
    assert points(read_history(tmp_path / "run")) == {1: 9.0}, "metrics.jsonl comes first"


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    events(tmp_path / "tensorboard", 1, 2, 1.0)
    code = (
        "import sys\nfrom megatron_syne.runs.history import read_history\n"
        f"assert len(read_history({str(tmp_path)!r}).series['loss'].steps) == 2\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        ("train/loss", "loss"),
        ("train_loss/zh", "loss/zh"),
        ("time/data_seconds", "data_seconds"),
        ("norm/parameters", "param_norm"),
        ("grad_norm/layer_3", "grad_norm/layer_3"),
        ("speed/step_seconds", "step_seconds"),
        ("memory/peak_bytes", "peak_memory_bytes"),
        ("progress/consumed_tokens", "consumed_tokens"),
        ("validation_loss/zh", "validation/zh"),
        ("validation_perplexity/zh", "validation_perplexity/zh"),
        ("tokens/zh", "tokens/zh"),
        ("somebody/elses", "somebody/elses"),
    ],
)
def test_names_of_tensorboard(tag: str, name: str) -> None:
    assert metric_name(tag) == name


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "metrics.jsonl", step(1))

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(MissingInput, match=r"metrics\.jsonl: cannot be read: Permission denied"):
        read_history(tmp_path)


def test_what_the_trainer_writes_to_tensorboard_gets_its_name_back() -> None:
    from megatron_syne.monitor.events import tag_of

    steps = [
        "loss",
        "loss_gap",
        "grad_norm",
        "learning_rate",
        "tokens_per_second",
        "tokens_per_second_per_gpu",
        "mfu",
    ]
    times = [f"{part}_seconds" for part in ("step", "data", "forward_backward", "optimizer", "checkpoint")]
    others = [
        "tflops_per_gpu",
        "peak_memory_bytes",
        "consumed_tokens",
        "consumed_samples",
        "data_share",
        "param_norm",
    ]
    nested = [
        "loss/zh",
        "tokens/zh",
        "mixture/zh",
        "grad_norm/layer_0",
        "grad_norm/embedding",
        "fp8/loss_gap",
    ]
    for name in [*steps, *times, *others, *nested]:
        assert metric_name(tag_of(name)) == name
