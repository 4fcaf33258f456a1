"""Tags, the dashboard's tags among them, the page, the hyper-parameters; a full disk does not end the training."""

from __future__ import annotations

import errno
import re
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from megatron_syne.config.schema import LaunchConfig, ModelConfig, ParallelConfig, RunConfig, StageConfig
from megatron_syne.monitor.description import hyper_parameters, page
from megatron_syne.monitor.events import TensorboardEvents, dashboard, tag_of

MODEL = ModelConfig(num_layers=4, hidden_size=64, rotary_base=500000.0)


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("loss", "train/loss"),
        ("loss/zh", "train_loss/zh"),
        ("grad_norm", "train/grad_norm"),
        ("grad_norm/layer_3", "grad_norm/layer_3"),
        ("param_norm", "norm/parameters"),
        ("mfu", "speed/mfu"),
        ("step_seconds", "speed/step_seconds"),
        ("forward_backward_seconds", "time/forward_backward_seconds"),
        ("consumed_tokens", "progress/consumed_tokens"),
        ("fp8/max_overflow", "fp8/max_overflow"),
    ],
)
def test_tags(name: str, tag: str) -> None:
    assert tag_of(name) == tag


def test_the_dashboard_shows_tags_that_are_written() -> None:
    written = {
        *map(tag_of, ("loss", "loss/en", "loss/zh", "grad_norm", "param_norm", "step_seconds", "mfu")),
        *map(
            tag_of, ("tokens_per_second_per_gpu", "tflops_per_gpu", "grad_norm/layer_1", "grad_norm/layer_0")
        ),
        *(tag_of(f"{part}_seconds") for part in ("data", "forward_backward", "optimizer", "checkpoint")),
        *(f"grad_norm/{group}" for group in ("embedding", "final_norm", "output_layer")),
        *(f"{group}/{name}" for group in ("tokens", "mixture") for name in ("en", "zh")),
        "validation_loss/en",
    }
    shown = [
        tag
        for charts in dashboard(["en", "zh"], 2).values()
        for kind, tags in charts.values()
        for tag in tags
        if kind == "Multiline"
    ]
    assert len(shown) == len(set(shown))
    for tag in shown:
        assert any(re.fullmatch(tag, each) for each in written), tag
    assert all(any(re.fullmatch(tag, each) for tag in shown) for each in written)


def config() -> RunConfig:
    made = RunConfig(parallel=ParallelConfig(pipeline_model_parallel_size=2))
    made.launch = LaunchConfig(env={"HF_TOKEN": "hf_secret"})
    made.data.stages = [StageConfig(name="one", tokens=4096)]
    return made


def test_the_page_holds_ranks_and_configuration_and_no_secrets() -> None:
    text = page(config(), MODEL, "cpu: torch", world_size=4)
    assert "hf_secret" not in text and text.startswith("cpu: torch")
    blocks = dict(re.findall(r"```(\w+)\n(.*?)\n```", text, flags=re.DOTALL))
    grid = blocks["text"].splitlines()
    assert len(grid) == 5 and "embedding, layers 0-1" in grid[1] and "layers 2-3, output" in grid[4]
    shown = yaml.safe_load(blocks["yaml"])
    assert shown["model"]["num_layers"] == 4 and shown["parallel"]["pipeline_model_parallel_size"] == 2


def test_hyper_parameters_are_plain_and_hold_no_secrets() -> None:
    found = hyper_parameters(config(), MODEL, world_size=4)
    assert found["model.num_layers"] == 4 and found["parallel.pipeline_model_parallel_size"] == 2
    assert found["world_size"] == 4 and "'one'" in str(found["data.stages"])
    assert all(isinstance(value, bool | int | float | str) for value in found.values())
    assert not any(name.startswith("launch") or "hf_secret" in str(value) for name, value in found.items())


def test_a_full_disk_ends_the_events_and_not_the_training(tmp_path: Path, capsys: Any) -> None:
    events = TensorboardEvents(tmp_path, "", {}, 2)
    calls = []

    def refuse(*arguments: Any) -> None:
        calls.append(arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    file_writer = SimpleNamespace(add_summary=refuse)
    events.writer = SimpleNamespace(file_writer=file_writer, flush=lambda: None, close=refuse)
    trainer: Any = SimpleNamespace(state=SimpleNamespace(step=3))
    for _ in range(3):
        events.on_evaluation(trainer, {"en": 1.0})
    events.on_exception(trainer, RuntimeError())
    words = capsys.readouterr().err
    assert len(calls) == 1 and words.count(str(tmp_path)) == 1 and "No space left" in words

    def break_(*arguments: Any) -> None:
        raise ValueError

    events.writer = SimpleNamespace(file_writer=SimpleNamespace(add_summary=break_))
    with pytest.raises(ValueError):
        events.on_evaluation(trainer, {"en": 1.0})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_writers_own_thread_may_meet_the_full_disk(tmp_path: Path, capsys: Any) -> None:
    """For real: it fails some time after the call, and must neither hang nor end the training."""
    events = TensorboardEvents(tmp_path, "page", {"optimizer.lr": 1.0}, 2)
    plan = SimpleNamespace(sources=("en",))
    trainer: Any = SimpleNamespace(
        state=SimpleNamespace(step=0),
        validation_data={},
        train_data=SimpleNamespace(plan=plan),
        complete=True,
    )
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    events.on_train_start(trainer)
    (file,) = tmp_path.iterdir()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 64, before[1]))
        for step in range(1, 50):
            trainer.state.step = step
            events.on_evaluation(trainer, {"en": 1.0})
        events.on_train_end(trainer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    words = capsys.readouterr().err
    assert words.count(str(tmp_path)) == 1 and "File too large" in words and events.writer is None
