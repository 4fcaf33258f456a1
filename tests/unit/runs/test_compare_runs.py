"""Where two runs differ is found to the step and the bit, and the exit code says it."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_syne.errors import EXIT_CANNOT_CREATE, EXIT_CONFIG, EXIT_DATA, EXIT_NO_INPUT, DataError, run_cli
from megatron_syne.runs.compare import compare
from megatron_syne.runs.compare_report import ranges
from megatron_syne.runs.golden import read_golden
from megatron_syne.runs.history import read_history
from tools import compare_runs

LOSSES = [7.870338201522827, 7.871016025543213, 7.5, 7.25, 7.125, 7.0]


def run(
    folder: Path,
    losses: list[float],
    validation: dict[int, float] | None = None,
    tail: str = "",
    first: int = 1,
) -> Path:
    """A run folder that logged these losses."""
    lines = []
    for step, loss in enumerate(losses, first):
        written = loss if math.isfinite(loss) else None
        lines.append(json.dumps({"step": step, "loss": written, "loss_hex": loss.hex(), "grad_norm": 1.0}))
        if validation and step in validation:
            lines.append(json.dumps({"step": step, "validation": {"zh": validation[step]}}))
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n" + tail)
    return folder


def code(*arguments: object) -> int:
    """The exit code as the shell sees it."""
    try:
        return run_cli(lambda: compare_runs.main([str(each) for each in arguments]))
    except SystemExit as end:  # wrong options
        return int(end.code or 0)


def found(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    """Exit code and the JSON object."""
    capsys.readouterr()
    result = code(*arguments, "--json")
    return result, json.loads(capsys.readouterr().out)


def test_the_first_step_by_one_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = list(LOSSES)
    others[3] = math.nextafter(others[3], 8.0)
    others[4] += 0.5
    others[5] += 0.25
    a, b = run(tmp_path / "a", LOSSES), run(tmp_path / "b", others)
    result, said = found(capsys, a, b)
    loss = said["metrics"]["loss"]
    assert result == 1 and said["equal"] is False
    assert loss["first"] == {
        "step": 4,
        "a": LOSSES[3],
        "b": others[3],
        "difference": others[3] - LOSSES[3],
        "relative": pytest.approx(2**-50 / 7.25),
    }
    assert (loss["largest"]["step"], loss["largest"]["difference"]) == (5, 0.5)
    assert (loss["last"]["step"], loss["last"]["difference"]) == (6, 0.25)
    assert (loss["common_steps"], loss["differing_steps"]) == (6, 3)
    assert code(a, b) == 1
    text = capsys.readouterr().out
    assert (
        "loss: 6 common steps (1 to 6), 3 not equal to the bit" in text and "differ first at step 4" in text
    )
    rows = [line.split() for line in text.splitlines() if line.strip()[:1].isdigit()]
    assert [row[0] for row in rows] == ["1", "2", "3", "4", "5", "6"] and rows[3][-1] == "first"
    assert rows[3][1:3] == [repr(LOSSES[3]), repr(others[3])]


def test_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = run(tmp_path / "a", [*LOSSES, math.nan, math.inf], {3: 2.5})
    b = run(tmp_path / "b", [*LOSSES, math.nan, math.inf], {3: 2.5})
    result, said = found(capsys, a, b)
    assert (
        result == 0
        and said["equal"]
        and said["same_steps"]
        and set(said["metrics"]) == {"loss", "validation/zh"}
    )
    assert all(each["first"] is None and each["largest"] is None for each in said["metrics"].values())
    assert code(a, b) == 0 and capsys.readouterr().out.endswith("\nequal to the bit\n")


@pytest.mark.parametrize(("one", "other"), [(math.nan, 7.0), (7.0, math.nan), (math.inf, 7.0), (0.0, -0.0)])
def test_what_is_no_usual_number(tmp_path: Path, one: float, other: float) -> None:
    a = run(tmp_path / "a", [7.5, one, 7.0])
    b = run(tmp_path / "b", [7.5, other, 9.0])
    result = compare(read_history(a), read_history(b)).metrics[0]
    assert result.first is not None and result.first.step == 2 and result.largest is not None
    assert result.largest.step == (3 if one == 0.0 else 2), "nothing is further apart than NaN and a number"
    if one == 0.0:
        assert compare(read_history(a), read_history(b), tolerance=1e-9).metrics[0].differing == 1


def test_tolerances(tmp_path: Path) -> None:
    a = run(tmp_path / "a", [8.0, 8.0], {2: 2.0})
    b = run(tmp_path / "b", [8.0, 8.5], {2: 2.0})
    assert [code(a, b, "--tolerance", value) for value in ("0.49", "0.5")] == [1, 0]
    relative = 0.5 / 8.5
    assert [code(a, b, "--relative", "--tolerance", relative * factor) for factor in (0.999, 1.001)] == [1, 0]
    c = run(tmp_path / "c", [8.0, 8.0], {2: 2.5})
    assert code(a, c) == 1 and code(a, c, "--metrics", "loss") == 0, "validation counts too"
    assert code(a, c, "--metrics", "grad_norm,validation/*") == 1


def test_steps_that_only_one_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that is being written is compared as far as it is; --all-steps wants all."""
    a = run(tmp_path / "a", LOSSES, {3: 1.0})
    b = run(tmp_path / "b", LOSSES[:4], tail='{"step": 5, "loss": 7.')
    result, said = found(capsys, a, b)
    assert result == 0 and not said["same_steps"] and not said["b"]["broken"]
    assert said["metrics"]["loss"]["only_a"] == [5, 6] and said["metrics"]["loss"]["only_b"] == []
    assert "metrics.jsonl:5: breaks off" in said["b"]["problems"][0]
    assert said["not_compared"] == ["validation/zh: only in A"]
    capsys.readouterr()
    assert code(a, b, "--all-steps") == 1
    assert capsys.readouterr().out.endswith("\nequal to the bit, but not at the same steps\n")
    assert code(a, a, "--all-steps") == 0 and capsys.readouterr().out.endswith("\nequal to the bit\n")
    assert code(b, a) == 0 and "only in B: 2 steps, 5, 6" in capsys.readouterr().out


def test_a_metric_that_only_one_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = run(tmp_path / "a", LOSSES, {3: 1.0}), run(tmp_path / "b", LOSSES)
    assert code(a, b) == 0
    assert capsys.readouterr().out.endswith("\nequal to the bit, but not of the same metrics\n")


def test_a_name_that_is_no_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Latin-1 of an old archive: JSON, a golden file and pictures name it with a question mark."""
    a, b = (
        run(tmp_path / os.fsdecode(b"bad\xff"), LOSSES),
        run(tmp_path / "b" / os.fsdecode(b"bad\xff"), LOSSES),
    )
    result, said = found(capsys, a, b)
    assert result == 0 and said["a"]["path"] == str(tmp_path / "bad?")
    assert code(a, "--write-golden", tmp_path / "g.json") == 0
    assert read_golden(tmp_path / "g.json")[0] == "bad?"
    for name in ("p.png", "p.html"):
        assert code(a, b, "--output", tmp_path / name) == 0 and (tmp_path / name).is_file()


@pytest.mark.parametrize("option", ["--output", "--write-golden"])
def test_a_file_that_cannot_be_made(tmp_path: Path, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names too long, read-only disks and loops of links are 73; a full disk stays 74."""
    a = run(tmp_path / "a", LOSSES)
    runs, ends = ([a, a], (".png", ".html")) if option == "--output" else ([a], (".json",))
    for end in ends:
        assert code(*runs, option, tmp_path / ("x" * 300 + end)) == EXIT_CANNOT_CREATE
        for number, expected in (
            (errno.EROFS, 73),
            (errno.ELOOP, 73),
            (errno.ENOSPC, 74),
            (errno.EDQUOT, 74),
        ):
            with monkeypatch.context() as patch:

                def refuse(*names: object, number: int = number) -> None:
                    raise OSError(number, os.strerror(number))

                patch.setattr(os, "replace", refuse)
                assert code(*runs, option, tmp_path / f"x{end}") == expected
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


def test_damage_is_not_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = run(tmp_path / "a", LOSSES)
    b = run(tmp_path / "b", LOSSES[:3], tail='nonsense\n{"step": 4, "loss": 1.0}\n')
    assert code(a, b) == EXIT_DATA
    heard = capsys.readouterr()
    assert "loss: 3 common steps (1 to 3), equal to the bit" in heard.out and "metrics.jsonl:4: " in heard.err
    c = run(tmp_path / "c", [*LOSSES[:2], 1.0], tail='nonsense\n{"step": 4, "loss": 1.0}\n')
    assert code(a, c) == 1, "a difference before the damage is one"


def test_nothing_in_common(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = run(tmp_path / "a", LOSSES), run(tmp_path / "b", LOSSES, first=100)
    assert code(a, b) == EXIT_DATA
    assert "no common step (steps 1 to 6 and steps 100 to 105)" in capsys.readouterr().err
    assert code(a, a, "--metrics", "los") == EXIT_DATA
    assert "no metric 'los'; there are grad_norm, loss" in capsys.readouterr().err
    assert code(a, tmp_path / "none") == EXIT_NO_INPUT
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").touch()
    assert code(a, tmp_path / "empty") == EXIT_DATA


@pytest.mark.parametrize(
    "wrong",
    [[], ["a"], ["a", "a", "a"], ["a", "a", "--tolerance", "-1"], ["a", "a", "--tolerance", "nan"],
     ["a", "a", "--output", "x.pdf"], ["a", "a", "--write-golden", "g.json"], ["a", "--write-golden", "g.txt"],
     ["a", "a", "--metrics", " , "], ["a", "a", "--unknown"]],
    ids=" ".join,
)  # fmt: skip
def test_wrong_options(tmp_path: Path, wrong: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "a", LOSSES)
    monkeypatch.chdir(tmp_path)
    assert code(*wrong) == EXIT_CONFIG
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


def test_golden_round_trip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = run(tmp_path / "toy", LOSSES, {3: 2.5, 6: 2.25})
    golden = tmp_path / "golden.json"
    assert code(a, "--write-golden", golden) == 0
    assert read_golden(golden)[0] == "toy"
    raw = json.loads(golden.read_text())
    assert raw["version"] == 1 and raw["series"]["loss"]["steps"] == [1, 2, 3, 4, 5, 6]
    assert raw["series"]["loss"]["hex"][0] == LOSSES[0].hex()
    assert raw["series"]["validation/zh"] == {
        "steps": [3, 6],
        "values": [2.5, 2.25],
        "hex": ["0x1.4000000000000p+1", "0x1.2000000000000p+1"],
    }
    assert code(golden, a, "--all-steps") == 0 and code(a, golden, "--all-steps") == 0
    others = [*LOSSES[:5], math.nextafter(LOSSES[5], 0.0)]
    b = run(tmp_path / "b", others, {3: 2.5, 6: 2.25})
    assert code(golden, b) == 1 and code(golden, b, "--tolerance", "1e-12") == 0
    capsys.readouterr()
    assert code(run(tmp_path / "nan", [1.0, math.nan]), "--write-golden", tmp_path / "n.json") == EXIT_DATA
    assert "loss is nan at step 2" in capsys.readouterr().err and not (tmp_path / "n.json").exists()
    broken = run(tmp_path / "broken", LOSSES, tail="nonsense\n{}\n")
    assert code(broken, "--write-golden", tmp_path / "n.json") == EXIT_DATA
    assert code(a, "--write-golden", tmp_path / "m.json", "--metrics", "harness/*") == EXIT_DATA


WRONG_GOLDEN: list[tuple[str, Any, str]] = [
    ("version", 2, "version: expected 1, found 2"),
    ("version", True, "version: expected 1"),
    ("name", 5, "name: expected text"),
    ("more", 1, "unknown field 'more'"),
    ("series", {}, "series: expected at least one"),
    ("series", {"loss": [1]}, "series.loss: expected an object"),
    ("series", {"loss": {"steps": [1]}}, "series.loss: no field 'values'"),
    ("series", {"loss": {"steps": [1, 2], "values": [1.0]}}, "series.loss.values: 1 entries for 2 steps"),
    ("series", {"loss": {"steps": [1], "values": [1.0], "hex": []}}, "series.loss.hex: 0 entries for 1 steps"),
    ("series", {"loss": {"steps": [], "values": []}}, "series.loss.steps: is empty"),
    ("series", {"loss": {"steps": [2, 2], "values": [1.0, 1.0]}}, "series.loss.steps[1]: expected a number above 2"),
    ("series", {"loss": {"steps": [1.5], "values": [1.0]}}, "series.loss.steps[0]"),
    ("series", {"loss": {"steps": [1], "values": [None]}}, "series.loss.values[0]: expected a finite number"),
    ("series", {"loss": {"steps": [1], "values": ["1"]}}, "series.loss.values[0]"),
    ("series", {"loss": {"steps": [1], "values": [1.0], "hex": ["0x1.8p+0"]}}, "series.loss.hex[0]"),
    ("series", {"loss": {"steps": [1], "values": [1.0], "hex": [3]}}, "series.loss.hex[0]"),
    ("series", {"loss": {"steps": [1], "values": [1.0], "extra": [3]}}, "unknown field 'extra'"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value", "message"), WRONG_GOLDEN, ids=[each[2] for each in WRONG_GOLDEN])
def test_golden_files_are_read_strictly(tmp_path: Path, field: str, value: Any, message: str) -> None:
    good = {"version": 1, "name": "n", "created_by": "c", "series": {"loss": {"steps": [1], "values": [1.0]}}}
    path = tmp_path / "golden.json"
    path.write_text(json.dumps(good))
    assert list(read_history(path).series["loss"].values) == [1.0]
    path.write_text(json.dumps(good | {field: value}))
    with pytest.raises(DataError) as error:
        read_history(path)
    assert message in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"version": 1', '{"version": 1, "series": {"loss": NaN}}', "\0\xff"]
)
def test_golden_files_that_are_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "golden.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=r"golden\.json"):
        read_history(path)


def test_tensorboard_is_single_precision(tmp_path: Path) -> None:
    """The same run by its two records is equal; another one is not."""
    from torch.utils.tensorboard import SummaryWriter

    a = run(tmp_path / "a", LOSSES)
    writer = SummaryWriter(str(tmp_path / "events"))
    for step, loss in enumerate(LOSSES, 1):
        writer.add_scalar("train/loss", loss, step)
    writer.close()
    assert code(a, tmp_path / "events") == 0
    b = run(tmp_path / "b", [*LOSSES[:5], LOSSES[5] + 1e-5])
    assert code(b, tmp_path / "events") == 1


def test_ranges_of_steps() -> None:
    assert (
        ranges([1, 2, 3]) == "1 to 3" and ranges([5]) == "5" and ranges([5, 6]) == "5, 6" and ranges([]) == ""
    )
    assert ranges([10, 20, 30, 31]) == "10 to 30 (every 10), 31"
    assert ranges([1, 2, 4, 7, 11, 16, 22, 29]).endswith("more)")


@pytest.mark.parametrize("equal", [True, False])
def test_pictures(tmp_path: Path, equal: bool) -> None:
    others = LOSSES if equal else [*LOSSES[:3], 7.5, 7.6, 8.0]
    a, b = run(tmp_path / "a", LOSSES, {3: 2.0}), run(tmp_path / "b", others, {3: 2.0})
    assert code(a, b, "--output", tmp_path / "d.png") == code(a, b, "--output", tmp_path / "d.html")
    with Image.open(tmp_path / "d.png") as image:
        pixels = np.array(image.convert("RGB")).astype(int)
    assert pixels.shape[:2] == (860, 1700)  # two metrics, each with its difference
    coloured = pixels.max(axis=2) - pixels.min(axis=2) > 60
    height, width = coloured.shape
    quarters = [coloured[y : y + height // 2, x : x + width // 2].sum() > 30
                for y in (0, height // 2) for x in (0, width // 2)]  # fmt: skip
    assert quarters == [True, not equal, True, False], "no difference, no curve"
    page = (tmp_path / "d.html").read_text()
    assert page.count("Plotly.newPlot(") - page.split("<body>")[0].count("Plotly.newPlot(") == 4


def test_starts_quickly() -> None:
    """What takes long to import is not, where no picture is drawn."""
    code = (
        "import sys\nfrom tools import compare_runs\n"
        "try:\n    compare_runs.main(['--help'])\nexcept SystemExit: pass\n"
        "slow = {'torch', 'numpy', 'matplotlib', 'plotly', 'tensorboard', 'yaml'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for number in (0, 1, 64, 65, 66, 73):
        assert f" {number} " in done.stdout, "exit codes are documented"


def test_a_reader_that_leaves_changes_no_exit_code(tmp_path: Path) -> None:
    a, b = run(tmp_path / "a", LOSSES), run(tmp_path / "b", LOSSES[::-1])
    root = Path(__file__).resolve().parents[3]
    script = [sys.executable, str(root / "tools" / "compare_runs.py"), str(a), str(b)]
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    reader.wait()
    done = subprocess.run(script, stdout=reader.stdin, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr == ""
