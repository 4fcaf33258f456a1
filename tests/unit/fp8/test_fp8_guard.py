"""The guard's decisions, against FP8 layers that are told what to find; real ones: distributed/test_fp8_guard_run."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_syne.config.schema import Fp8GuardConfig, PrecisionConfig, RunConfig
from megatron_syne.fp8 import guard as guard_module
from megatron_syne.fp8.guard import Fp8Guard, as_metrics, beyond_limits, loss_gap
from megatron_syne.fp8.statistics import all_names, layer_number, over_all_ranks, shares
from megatron_syne.monitor.console import ConsoleProgress

FINE = {"amax": 1.0, "overflow": 0, "underflow": 0, "values": 100}
LINEARS = ("self_attention.linear_qkv", "mlp.linear_fc1")


class Layers:
    """Two linear layers in each of four transformer layers; one amax history that every forward pass moves."""

    recipe = "delayed"

    def __init__(self) -> None:
        self.bf16_layers: frozenset[int] = frozenset()
        self.off = False
        self.bad: dict[str, dict[str, dict[str, float]]] = {}
        self.kept = {
            f"{name}.{tensor}.amax_history": torch.ones(4)
            for name in self.names
            for tensor in ("input", "grad")
        }

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"decoder.layers.{n}.{linear}" for n in range(4) for linear in LINEARS)

    def use_bf16(self, layers: Any) -> None:
        self.bf16_layers |= frozenset(layers)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        self.off = True
        yield
        self.off = False

    @contextmanager
    def watched(self) -> Iterator[dict[str, Any]]:
        result: dict[str, Any] = {}
        yield result
        for name in self.names:
            if layer_number(name) not in self.bf16_layers:
                result[name] = {"input": FINE, "grad": FINE} | self.bad.get(name, {})

    def state(self) -> dict[str, torch.Tensor]:
        return self.kept

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self.kept = dict(state)


class Scene:
    """A guard and its trainer; ``step`` takes one step with the losses that FP8 and bf16 are to have."""

    def __init__(self, **options: Any) -> None:
        watching = Fp8GuardConfig(**{"interval": 2, **options})
        self.config = RunConfig(precision=PrecisionConfig(fp8="delayed", fp8_guard=watching))
        self.guard = Fp8Guard(self.config)
        self.trainer: Any = SimpleNamespace(
            fp8=Layers(),
            state=SimpleNamespace(step=0),
            model_config=SimpleNamespace(num_layers=4),
            platform=SimpleNamespace(device=torch.device("cpu")),
            extra_metrics={},
        )
        self.losses = (1.0, 1.0)
        self.passes: list[bool] = []
        self.guard.loss = self.loss  # type: ignore[method-assign]

    def loss(self, trainer: Any, batches: Any) -> float:
        self.passes.append(trainer.fp8.off)
        if not trainer.fp8.off:
            for history in trainer.fp8.kept.values():
                history += 1
        return self.losses[trainer.fp8.off]

    def step(self) -> dict[str, float]:
        self.trainer.extra_metrics = {}
        self.guard.on_batch(self.trainer, [])
        self.trainer.state.step += 1
        metrics = {"loss": 1.0, **self.trainer.extra_metrics}
        self.guard.on_step_end(self.trainer, metrics)
        return metrics


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    """A world of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def scene(**options: Any) -> Scene:
    made = Scene(**options)
    made.guard.on_train_start(made.trainer)
    return made


def test_it_looks_at_the_interval_and_leaves_the_state_alone() -> None:
    made = scene()
    first, second = made.step(), made.step()
    assert "fp8/loss_gap" not in first and second["fp8/loss_gap"] == 0.0
    assert made.passes == [False, True]  # once in FP8, once in bf16
    assert all(torch.equal(history, torch.ones(4)) for history in made.trainer.fp8.kept.values())
    assert second["fp8/amax/decoder.layers.3.mlp.linear_fc1/grad"] == 1.0
    assert second["fp8/max_overflow"] == 0.0 and second["fp8/bf16_layers"] == 0.0
    assert made.guard.record() == {"version": 1, "recipe": "delayed", "bf16_layers": [], "events": []}


@pytest.mark.parametrize("loss", [1.3, 0.7, math.nan, math.inf])
def test_a_gap_puts_all_layers_into_bf16_before_the_step(loss: float, capsys: Any) -> None:
    made = scene(max_loss_gap=0.2)
    made.losses = (loss, 1.0)
    made.step()
    made.guard.on_batch(made.trainer, [])
    assert made.trainer.fp8.bf16_layers == {0, 1, 2, 3}  # the step itself is not run in FP8 any more
    made.trainer.state.step += 1
    made.guard.on_step_end(made.trainer, {})
    record = json.loads(json.dumps(made.guard.record(), allow_nan=False))
    (event,) = record["events"]
    assert event["layers"] == record["bf16_layers"] == [0, 1, 2, 3]
    assert (event["step"], event["from_step"]) == (2, 2) and "above 0.2" in event["reason"]
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "layers 0-3 compute in bf16 from step 2 on" in told
    made.passes.clear()
    made.step(), made.step()
    assert not made.passes  # nothing is left to look at


def test_a_gap_within_the_limit_or_without_one_changes_nothing() -> None:
    for options, losses in (
        ({"max_loss_gap": 0.2}, (1.1, 1.0)),
        ({}, (9.0, 1.0)),
        ({"max_loss_gap": 0.2}, (math.nan, math.nan)),
    ):
        made = scene(**options)
        made.losses = losses
        made.step(), made.step()
        assert not made.trainer.fp8.bf16_layers and not made.guard.events


@pytest.mark.parametrize("figure", ["overflow", "underflow"])
@pytest.mark.parametrize("tensor", ["input", "weight", "grad"])
def test_a_share_puts_its_layer_alone_into_bf16(figure: str, tensor: str) -> None:
    name = "decoder.layers.2.mlp.linear_fc1"
    for limit, falls in ((0.04, True), (0.05, False)):
        made = scene(**{f"max_{figure}": limit})
        made.trainer.fp8.bad = {name: {tensor: FINE | {figure: 5}}}
        made.step()
        metrics = made.step()
        assert metrics[f"fp8/{figure}/{name}/{tensor}"] == metrics[f"fp8/max_{figure}"] == 0.05
        assert made.trainer.fp8.bf16_layers == ({2} if falls else set())
        assert metrics["fp8/bf16_layers"] == float(falls)
        if falls:
            (event,) = made.guard.events
            assert (event["step"], event["from_step"], event["layers"]) == (2, 3, [2])
            assert event["reason"] == f"{name} {tensor}: {figure} of 0.05 of its values, above 0.04"
        made.step(), made.step()
        assert len(made.guard.events) == falls  # told once


def test_a_tensor_that_had_no_scale_yet_is_not_judged() -> None:
    made = scene(interval=1, max_underflow=0.01)
    fp8 = made.trainer.fp8
    name = "decoder.layers.0.self_attention.linear_qkv"
    fp8.bad = {name: {"grad": FINE | {"underflow": 90}}}
    fp8.kept[f"{name}.grad.amax_history"] = torch.zeros(4)
    fp8.kept[f"{name}.grad.scale"] = torch.ones(())
    first = made.step()
    assert not fp8.bf16_layers and f"fp8/underflow/{name}/grad" not in first
    assert first[f"fp8/underflow/{name}/input"] == 0.0
    fp8.kept[f"{name}.grad.scale"] = torch.tensor(0.5)  # its amax has left the history
    made.step()
    assert fp8.bf16_layers == {0}


def test_what_fell_back_stays_so_on_resume_with_or_without_looking() -> None:
    made = scene(max_overflow=0.01)
    made.trainer.fp8.bad = {made.trainer.fp8.names[-1]: {"input": FINE | {"overflow": 50}}}
    made.step(), made.step()
    kept = json.loads(json.dumps(made.guard.record()))
    for options in ({}, {"interval": None}):
        again = Scene(**options)
        again.guard.restore(kept)
        again.guard.on_train_start(again.trainer)
        assert again.trainer.fp8.bf16_layers == {3}
        again.step(), again.step()
        assert again.guard.record() == kept
        assert bool(again.passes) is ("interval" not in options)


def test_another_recipe_begins_anew() -> None:
    again = Scene()
    again.guard.restore({"version": 1, "recipe": "blockwise", "bf16_layers": [3], "events": [{"step": 1}]})
    again.guard.restore(None)
    again.guard.on_train_start(again.trainer)
    assert not again.trainer.fp8.bf16_layers and not again.guard.events


def test_layers_that_the_configuration_leaves_in_bf16_are_not_its_own() -> None:
    made = scene(max_loss_gap=0.1)
    made.trainer.fp8.bf16_layers = frozenset({0, 3})
    made.losses = (2.0, 1.0)
    made.step(), made.step()
    assert made.guard.record()["bf16_layers"] == [1, 2]
    assert made.trainer.fp8.bf16_layers == {0, 1, 2, 3}


def test_counting_ends_with_a_failure() -> None:
    made = scene()
    made.step()
    made.guard.on_batch(made.trainer, [])
    made.guard.on_exception(made.trainer, RuntimeError())
    assert made.guard.counts[1]  # the second count was closed, so it is filled


def test_the_loss_gap_is_relative() -> None:
    assert loss_gap(1.5, 2.0) == 0.25 and loss_gap(2.5, 2.0) == 0.25
    assert loss_gap(math.nan, 2.0) == loss_gap(-math.inf, 2.0) == math.inf
    assert loss_gap(1.0, math.nan) == 0.0


def test_shares_and_names() -> None:
    names = ("decoder.layers.10.mlp.linear_fc1", "decoder.layers.9.mlp.linear_fc2")
    assert all_names(names) == names[::-1]  # by number
    counts = {names[0]: {"input": {"amax": torch.tensor(math.nan), "overflow": 1, "underflow": 3, "values": 4},
                         "grad": {"amax": 0.0, "overflow": 0, "underflow": 0, "values": 0}}}  # fmt: skip
    found = shares(counts)
    assert found == {names[0]: {"input": {"amax": math.inf, "overflow": 0.25, "underflow": 0.75}}}
    more = {names[0]: {"input": {"amax": 1.0, "overflow": 0.5, "underflow": 0.0}}}
    whole = over_all_ranks([found, more], names, torch.device("cpu"))
    assert whole == {
        names[0]: {"input": {"amax": math.inf, "overflow": 0.5, "underflow": 0.75}},
        names[1]: {},
    }
    assert as_metrics(whole)["fp8/max_overflow"] == 0.5
    options = Scene(max_overflow=0.5, max_underflow=0.0).config.precision.fp8_guard
    assert list(beyond_limits(whole, options)) == [10]
    assert guard_module._ranges([7, 0, 1, 3, 2]) == "0-3, 7"


def test_the_console_tells_a_look_in_one_line() -> None:
    made, stream = scene(), io.StringIO()
    made.trainer.train_iters = 100
    made.trainer.fp8.bad = {made.trainer.fp8.names[0]: {"input": FINE | {"overflow": 5}}}
    console = ConsoleProgress(stream, every_seconds=1e9)
    console.last_shown, console.first_step = 1e18, -1  # no progress line is due
    common = {"learning_rate": 0.0, "grad_norm": 0.0, "tokens_per_second": 0.0, "data_share": 0.0}
    for _ in range(4):
        made.losses = (2.02, 2.0)
        console.on_step_end(made.trainer, common | made.step())
    looks = [line for line in stream.getvalue().splitlines() if "FP8" in line]
    assert looks == [
        f"step {step}: FP8 loss gap to bf16 1.00e-02, overflow 0.05, underflow 0; 0 layers in bf16"
        for step in (2, 4)
    ]
