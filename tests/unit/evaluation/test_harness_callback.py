"""Evaluations beside a training, with a program that stands in for the harness."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_syne.config.schema import RunConfig
from megatron_syne.errors import ConfigError
from megatron_syne.evaluation import callback as room
from megatron_syne.evaluation import tasks
from megatron_syne.evaluation.callback import HarnessEvaluation
from megatron_syne.resilience.signals import StopOnSignal

# Does what the file "how" beside it says: answer at once, fail, or hang; tells its PID and what it was given.
STAND_IN = """
import json, os, sys, time
from pathlib import Path
sys.path.insert(0, {repository!r})
from megatron_syne.evaluation.results import write_results
given = dict(option.split("=", 1) for option in sys.argv[1:])
here = Path(__file__).parent
with (here / "calls").open("a") as stream:
    found = sorted(os.listdir(given["--checkpoint"]))
    stream.write(json.dumps({{**given, "pid": os.getpid(), "found": found}}) + "\\n")
Path(given["--scratch"], "left over").touch()
how = (here / "how").read_text()
if how == "fail":
    print("some noise\\nerror: task x: no such file")
    sys.exit(66)
while how == "hang":
    time.sleep(0.05)
write_results(Path(given["--output"]), {{"results": {{"tiny": {{"acc": 0.5, "odd": None}}}}}})
"""


class Run:
    """A run folder with checkpoints, and what of the trainer the callback looks at."""

    def __init__(self, folder: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        (folder / "stand_in.py").write_text(STAND_IN.format(repository=str(repository)))
        monkeypatch.setattr(room, "PROGRAM", (sys.executable, str(folder / "stand_in.py")))
        monkeypatch.setattr(tasks, "is_installed", lambda: True)
        self.config = RunConfig(run_dir=str(folder / "run"))
        self.config.harness.tasks = ["tiny", "x.yaml"]
        self.config.checkpoint.save_interval = 10
        self.how("answer")
        self.told: list[tuple[int, dict[str, float]]] = []

    def how(self, word: str) -> None:
        (self.folder / "how").write_text(word)

    def calls(self) -> list[dict[str, Any]]:
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for_calls(self, count: int) -> None:
        end = time.monotonic() + 60
        while len(self.calls()) < count:
            assert time.monotonic() < end, "the program was not started"
            time.sleep(0.02)

    def trainer(self, step: int, **given: Any) -> Any:
        values = {"train_iters": 30, "signalled": False, "stop_reason": None, "callbacks": (), **given}
        trainer = SimpleNamespace(state=SimpleNamespace(step=step), **values)
        trainer.complete = step >= trainer.train_iters
        trainer.emit = lambda event, at, metrics: self.told.append((at, metrics))
        return trainer

    def save(self, step: int) -> Path:
        path = Path(self.config.run_dir, "checkpoints", f"iter_{step:07d}")
        path.mkdir(parents=True)
        (path / "weights").write_text(str(step))
        return path

    def started(self, step: int = 0) -> HarnessEvaluation:
        evaluation = HarnessEvaluation(self.config)
        evaluation.on_train_start(self.trainer(step))
        return evaluation

    def finish(self, evaluation: HarnessEvaluation, trainer: Any) -> None:
        """Step boundaries until nothing runs."""
        end = time.monotonic() + 60
        evaluation.on_step_boundary(trainer)
        while evaluation.running:
            assert time.monotonic() < end
            time.sleep(0.02)
            evaluation.on_step_boundary(trainer)

    def left(self) -> set[str]:
        return {path.name for path in Path(self.config.run_dir, "evaluations").rglob("iter_*")}


@pytest.fixture
def run(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(tmp_path, repository, monkeypatch)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_result_comes_at_a_later_boundary_with_the_checkpoints_step(run: Run) -> None:
    evaluation = run.started()
    evaluation.on_checkpoint_saved(run.trainer(10), run.save(10))
    run.finish(evaluation, run.trainer(13))
    assert run.told == [(10, {"tiny/acc": 0.5})]  # what was not finite is left out
    (call,) = run.calls()
    assert call["--tasks"] == "tiny,x.yaml" and call["--beside"] == str(os.getpid())
    assert call["--device"] == "cpu" and "--limit" not in call
    assert run.left() == {"iter_0000010.json", "iter_0000010.log"}
    assert not (Path(run.config.run_dir) / "evaluations" / ".work").exists()


def test_one_at_a_time_and_a_checkpoint_that_waits_is_not_lost(run: Run) -> None:
    import shutil

    run.how("hang")
    evaluation = run.started()
    first, second = run.save(10), run.save(20)
    evaluation.on_checkpoint_saved(run.trainer(10), first)
    evaluation.on_checkpoint_saved(run.trainer(20), second)
    run.wait_for_calls(1)
    for path in (first, second):  # as keep_latest does
        shutil.rmtree(path)
    assert len(run.calls()) == 1 and evaluation.waiting == [20]
    evaluation.stop()
    run.how("answer")
    again = run.started(25)  # the run goes on: both are made up for, out of what was held
    run.finish(again, run.trainer(25))
    assert [step for step, _ in run.told] == [10, 20]
    assert all(call["found"] == ["weights"] for call in run.calls())
    assert run.left() == {f"iter_00000{n}.{end}" for n in (10, 20) for end in ("json", "log")}


def test_as_many_wait_as_checkpoints_are_kept(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.how("hang")
    run.config.checkpoint.keep_latest = 1
    evaluation = run.started()
    for step in (10, 20, 30):
        evaluation.on_checkpoint_saved(run.trainer(step, train_iters=99), run.save(step))
    assert evaluation.running is not None and evaluation.running.step == 10 and evaluation.waiting == [30]
    assert "iter_0000020 is left out" in capsys.readouterr().err
    evaluation.stop()
    assert {path.name for path in evaluation.held.iterdir()} == {"iter_0000010", "iter_0000030"}


def test_failure_and_time_out_are_told_and_training_goes_on(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run.how("fail")
    evaluation = run.started()
    evaluation.on_checkpoint_saved(run.trainer(10), run.save(10))
    run.finish(evaluation, run.trainer(11))
    text = capsys.readouterr().err
    assert "iter_0000010 failed (exit 66), training goes on: task x: no such file (" in text
    run.how("hang")
    evaluation.on_checkpoint_saved(run.trainer(20), run.save(20))
    run.wait_for_calls(2)
    assert evaluation.running is not None
    evaluation.running.deadline = time.monotonic()
    evaluation.on_step_boundary(run.trainer(21))
    assert evaluation.running is None and gone(run.calls()[-1]["pid"])
    assert "iter_0000020 took more than 3600 s" in capsys.readouterr().err
    assert run.told == [] and not any(name.endswith(".json") for name in run.left())


def test_at_the_end_it_waits_and_the_last_checkpoint_comes_first(run: Run) -> None:
    run.how("hang")
    evaluation = run.started()
    evaluation.on_checkpoint_saved(run.trainer(10), run.save(10))
    evaluation.on_checkpoint_saved(run.trainer(20), run.save(20))
    evaluation.stop()
    run.how("answer")
    evaluation.on_checkpoint_saved(run.trainer(30, stop_reason="done"), run.save(30))
    evaluation.on_train_end(run.trainer(30))
    assert [step for step, _ in run.told] == [30, 20]


def test_at_the_end_a_signal_or_the_time_ends_the_waiting(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run.how("hang")
    evaluation = run.started()
    evaluation.on_checkpoint_saved(run.trainer(30), run.save(30))
    run.wait_for_calls(1)
    run.config.harness.timeout_seconds = 0
    evaluation.on_train_end(run.trainer(30))
    assert "not evaluated: iter_0000030 (the time for it is over)" in capsys.readouterr().err
    run.config.harness.timeout_seconds = 3600
    stop = StopOnSignal([])
    stop.received = "SIGTERM"
    again = run.started(30)
    again.on_train_end(run.trainer(30, callbacks=(stop,)))
    assert "not evaluated: iter_0000030 (SIGTERM)" in capsys.readouterr().err
    assert all(gone(call["pid"]) for call in run.calls())


@pytest.mark.parametrize("how", ["signal", "error", "leg"])
def test_a_stop_ends_it_and_the_next_start_makes_up_for_it(run: Run, how: str) -> None:
    run.how("hang")
    evaluation = run.started()
    evaluation.on_checkpoint_saved(run.trainer(10), run.save(10))
    run.wait_for_calls(1)
    if how == "error":
        evaluation.on_exception(run.trainer(12), RuntimeError())
    else:
        evaluation.on_train_end(run.trainer(12, signalled=how == "signal"))
    assert gone(run.calls()[0]["pid"])
    run.how("answer")
    again = run.started(12)
    run.finish(again, run.trainer(13))
    assert run.told == [(10, {"tiny/acc": 0.5})]


def test_a_stopped_run_starts_none(run: Run) -> None:
    evaluation = run.started()
    evaluation.on_checkpoint_saved(run.trainer(10, signalled=True, stop_reason="a signal"), run.save(10))
    evaluation.on_train_end(run.trainer(10, signalled=True, stop_reason="a signal"))
    assert evaluation.running is None and run.calls() == []


def test_a_restart_forgets_the_future_and_tells_what_was_not_told(run: Run) -> None:
    evaluation = run.started()
    for step in (10, 20):
        evaluation.on_checkpoint_saved(run.trainer(step), run.save(step))
        run.finish(evaluation, run.trainer(step))
    run.told.clear()
    metrics = Path(run.config.run_dir) / "metrics.jsonl"
    again = run.started(15)  # step 20 was lost
    again.on_step_boundary(run.trainer(16))
    assert run.told == [(10, {"tiny/acc": 0.5})] and "iter_0000020.json" not in run.left()
    metrics.write_text(json.dumps({"step": 10, "harness": {"tiny/acc": 0.5}}) + "\n")
    run.told.clear()
    run.started(15).on_step_boundary(run.trainer(16))
    assert run.told == []


def test_only_what_is_due_is_evaluated(run: Run) -> None:
    config = run.config
    config.harness.interval = 20
    assert [step for step in (0, 10, 20, 35, 40, 45) if tasks.is_due(step, 45, config)] == [20, 40, 45]
    config.harness.interval = None
    assert [step for step in (0, 5, 10, 20, 45) if tasks.is_due(step, 45, config)] == [10, 20, 45]
    config.checkpoint.save_interval = None
    assert [step for step in (0, 5, 10, 45) if tasks.is_due(step, 45, config)] == [45]


def test_without_hard_links_the_checkpoint_itself_is_read(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(room.os, "link", refuse)
    evaluation = run.started()
    evaluation.on_checkpoint_saved(run.trainer(10), run.save(10))
    run.finish(evaluation, run.trainer(11))
    assert run.calls()[0]["--checkpoint"].endswith("checkpoints/iter_0000010") and len(run.told) == 1


def test_it_says_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "is_installed", lambda: False)
    with pytest.raises(ConfigError, match=r"lm-evaluation-harness is not installed .*\.\[eval\]"):
        HarnessEvaluation(run.config)
    run.config.harness.tasks = []
    HarnessEvaluation(run.config)


def test_it_ends_with_its_training(repository: Path, tmp_path: Path) -> None:
    """The child of a killed process gets SIGTERM; and it sees when its parent was gone before it looked."""
    child = (
        "import os, sys, time\n"
        "from megatron_syne.evaluation.__main__ import stay_beside\n"
        "stay_beside(int(sys.argv[1]))\n"
        f"open({str(tmp_path / 'ready')!r}, 'w').write(str(os.getpid()))\n"
        "time.sleep(120)\n"
    )
    parent = (
        f"import os, subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {child!r}, str(os.getpid())])\n"
        "time.sleep(120)\n"
    )
    orphan = subprocess.run([sys.executable, "-c", child, "1"], cwd=repository, timeout=60)
    assert orphan.returncode == 128 + signal.SIGTERM
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=repository)
    end = time.monotonic() + 60
    while not (tmp_path / "ready").exists() or not (tmp_path / "ready").read_text():
        assert time.monotonic() < end
        time.sleep(0.05)
    process.kill()
    process.wait()
    pid = int((tmp_path / "ready").read_text())
    while Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < end, "it outlived its training"
        time.sleep(0.05)
