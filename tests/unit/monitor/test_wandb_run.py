"""Weights & Biases: what is sent and under which id, with a stand-in for the package; nothing goes there unasked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from megatron_syne.config.schema import MonitorConfig, RunConfig
from megatron_syne.errors import ConfigError
from megatron_syne.monitor.wandb import WandbRun, require_wandb


class Service:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.logged: list[dict[str, float]] = []
        self.metrics: list[tuple[str, str | None]] = []
        self.gone = False
        self.ended: list[int] = []
        self.refuses = False

    def module(self) -> ModuleType:
        """``import wandb`` of it."""
        found: Any = ModuleType("wandb")
        found.Error = type("Error", (Exception,), {})
        found.Settings = dict

        def init(**options: Any) -> Any:
            if self.refuses:
                raise found.Error("api_key not configured (no-tty)")
            self.begun.append(options)
            return SimpleNamespace(
                define_metric=lambda name, step_metric=None: self.metrics.append((name, step_metric)),
                log=self.log,
                finish=lambda exit_code=0: self.ended.append(exit_code),
            )

        found.init = init
        return found

    def log(self, values: dict[str, float]) -> None:
        """Without a step of its own: the service drops records of steps that it believes to be over."""
        if self.gone:
            raise BrokenPipeError("the service is gone")
        self.logged.append(values)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    made = Service()
    monkeypatch.setitem(sys.modules, "wandb", made.module())
    return made


def trainer_at(step: int) -> Any:
    plan = SimpleNamespace(
        segment_at=lambda sample: SimpleNamespace(stage="two"),
        stages=[SimpleNamespace(name="one"), SimpleNamespace(name="two")],
    )
    return SimpleNamespace(
        state=SimpleNamespace(step=step, consumed_samples=8 * step),
        train_data=SimpleNamespace(plan=plan, consumed=lambda sample: {"en": 64 * sample}),
        config=RunConfig(monitor=MonitorConfig(log_interval=2)),
        fp8_record=None,
    )


def run_of(folder: Path, **options: Any) -> WandbRun:
    config = RunConfig(monitor=MonitorConfig(wandb_project="synelm", **options))
    return WandbRun(config, folder, {"optimizer.lr": 1e-3})


def test_figures_and_options_and_nothing_else_go_there(tmp_path: Path, service: Service) -> None:
    run = run_of(tmp_path)
    run.on_train_start(trainer_at(0))
    begun = service.begun[0]
    assert begun["project"] == "synelm" and begun["name"] == tmp_path.name
    assert begun["config"] == {"optimizer.lr": 1e-3} and begun["dir"] == str(tmp_path)
    assert begun["settings"]["console"] == "off"
    for closed in ("disable_code", "disable_git", "x_disable_machine_info", "x_disable_meta"):
        assert begun["settings"][closed] is True
    assert begun["settings"]["x_save_requirements"] is False
    for step in (1, 2, 3):
        run.on_step_end(trainer_at(step), {"loss": float(step), "fp8/amax/decoder.layers.0.x/input": 1.0})
    run.on_evaluation(trainer_at(3), {"zh": 2.5})
    run.on_harness(trainer_at(3), 2, {"arc/acc": 0.5})
    run.on_train_end(trainer_at(3))
    assert service.logged == [
        {"step": 2, "loss": 2.0, "tokens/en": 64.0 * 16, "stage_number": 1},
        {"step": 3, "validation/zh": 2.5},
        {"step": 2, "harness/arc/acc": 0.5},
    ]
    assert service.metrics == [("step", None), ("*", "step")]
    assert service.ended == [0]


def test_a_service_that_is_gone_ends_nothing(
    tmp_path: Path, service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path)
    run.on_train_start(trainer_at(0))
    service.gone = True
    run.on_step_end(trainer_at(2), {"loss": 2.0})
    run.on_step_end(trainer_at(4), {"loss": 2.0})
    run.on_train_end(trainer_at(4))
    assert service.ended == []
    assert capsys.readouterr().err.splitlines() == [
        "Weights & Biases: the service is gone; nothing more is logged there"
    ]


def test_a_folder_of_that_name_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match="the package wandb is not installed"):
        require_wandb(RunConfig(monitor=MonitorConfig(wandb_project="synelm")))


def test_a_run_goes_on_under_its_id(tmp_path: Path, service: Service) -> None:
    for name in ("first", "second"):
        run = run_of(tmp_path, wandb_name=name)
        run.on_train_start(trainer_at(0))
        run.on_exception(trainer_at(0), RuntimeError())
    other = tmp_path / "other"
    other.mkdir()
    run_of(other).on_train_start(trainer_at(0))
    ids = [begun["id"] for begun in service.begun]
    assert ids[0] == ids[1] != ids[2] and all(begun["resume"] == "allow" for begun in service.begun)
    assert [begun["name"] for begun in service.begun] == ["first", "second", "other"]
    assert service.ended == [1, 1]


def test_a_refusal_names_the_option_and_the_way_out(tmp_path: Path, service: Service) -> None:
    service.refuses = True
    run = run_of(tmp_path)
    with pytest.raises(ConfigError, match=r"monitor.wandb_project = synelm: api_key.*WANDB_MODE=offline"):
        run.on_train_start(trainer_at(0))
    run.on_exception(trainer_at(0), ConfigError())  # as the trainer does; nothing was begun


def test_it_is_not_imported_unasked() -> None:
    """The module is there for the question whether the package is, and that is all."""
    code = (
        "import sys; sys.modules['wandb'] = None; import megatron_syne.monitor.wandb, megatron_syne.assembly"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
