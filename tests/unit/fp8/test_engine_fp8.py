"""Transformer Engine's FP8 layers through stand-ins of its modules: state, evaluation, bf16 layers. No GPU here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_syne.config.schema import PrecisionConfig
from megatron_syne.errors import DataError
from megatron_syne.platform.cuda import fp8_options
from megatron_syne.platform.cuda_fp8 import EngineFp8, normed

LENGTH = 4


class Linear(torch.nn.Linear):
    """As a Transformer Engine layer looks from outside: no state before its first FP8 forward pass."""

    def __init__(self) -> None:
        super().__init__(16, 16, bias=False)
        self.fp8_meta: dict[str, Any] = {}
        self.made: Any = None

    def init_fp8_meta_tensors(self, recipe: Any) -> None:
        self.made = recipe
        for key, columns in (("scaling_fwd", 3), ("scaling_bwd", 2)):
            self.fp8_meta[key] = SimpleNamespace(
                scale=torch.ones(columns), amax_history=torch.zeros(LENGTH, columns)
            )


class Layer(torch.nn.Module):
    """One transformer layer of one linear layer."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.layer_number, self.linear = number, Linear()
        self.seen: list[bool] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(AUTOCAST[-1])
        return self.linear(x)


AUTOCAST = [True]


@contextmanager
def autocast(enabled: bool) -> Iterator[None]:
    AUTOCAST.append(enabled)
    try:
        yield
    finally:
        AUTOCAST.pop()


class Decoder(torch.nn.Module):
    """Two layers, the second and third of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(fp8="hybrid", num_layers=4)
        self.layers = torch.nn.ModuleList([Layer(2), Layer(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> Decoder:
    package = ModuleType("transformer_engine.pytorch")
    package.fp8_autocast = autocast  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", package)
    return Decoder()


def attach(decoder: Decoder, recipe: str = "delayed") -> EngineFp8:
    found = {f"decoder.layers.{n}.mlp.linear_fc1": (n, decoder.layers[n - 1].linear) for n in (1, 2)}
    precision = PrecisionConfig(fp8=recipe, fp8_amax_history_len=LENGTH)  # type: ignore[arg-type]
    return EngineFp8([(decoder, found)], precision, frozenset())


def test_state_before_and_after_the_first_pass(decoder: Decoder) -> None:
    fp8 = attach(decoder)
    assert fp8.names == ("decoder.layers.1.mlp.linear_fc1", "decoder.layers.2.mlp.linear_fc1")
    fresh = fp8.state()
    assert len(fresh) == 2 * 3 * 2
    assert fresh["decoder.layers.2.mlp.linear_fc1.weight.scale"] == 1
    assert fresh["decoder.layers.2.mlp.linear_fc1.grad.amax_history"].tolist() == [0.0] * LENGTH
    module: Any = decoder.layers[1].linear
    module.init_fp8_meta_tensors("recipe")
    module.fp8_meta["scaling_fwd"].scale.copy_(torch.tensor([1.0, 2.0, 3.0]))
    module.fp8_meta["scaling_bwd"].amax_history[:, 0] = torch.arange(4.0)
    state = fp8.state()
    name = "decoder.layers.2.mlp.linear_fc1"
    assert (state[f"{name}.input.scale"].item(), state[f"{name}.weight.scale"].item()) == (1.0, 2.0)
    assert state[f"{name}.grad.amax_history"].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_state_goes_into_the_very_tensors_that_the_engine_holds(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    utilities = ModuleType("megatron.core.fp8_utils")  # the engine itself would look for the real package
    utilities.get_fp8_recipe = lambda config: ("recipe of", config.fp8)  # type: ignore[attr-defined]
    for name in ("megatron", "megatron.core"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "megatron.core.fp8_utils", utilities)
    fp8 = attach(decoder)
    module: Any = decoder.layers[0].linear
    module.init_fp8_meta_tensors("its own")
    held = module.fp8_meta["scaling_fwd"].scale
    state = {key: torch.full_like(tensor, float(n)) for n, (key, tensor) in enumerate(fp8.state().items(), 1)}
    fp8.load_state(state)
    assert module.fp8_meta["scaling_fwd"].scale is held and module.made == "its own"
    assert decoder.layers[1].linear.made == ("recipe of", "hybrid")
    back = fp8.state()
    assert all(torch.equal(back[key], state[key]) for key in state)
    longer = {key: torch.ones(9) if key.endswith("history") else tensor for key, tensor in state.items()}
    fp8.load_state(longer)
    assert fp8.state()["decoder.layers.1.mlp.linear_fc1.input.amax_history"].tolist() == [1.0] * LENGTH


def test_state_that_does_not_fit_is_refused(decoder: Decoder) -> None:
    fp8 = attach(decoder)
    state = fp8.state()
    name = "decoder.layers.2.mlp.linear_fc1.input.scale"
    with pytest.raises(DataError, match=r"linear_fc1\.input\.scale is missing"):
        fp8.load_state({key: tensor for key, tensor in state.items() if key != name})
    with pytest.raises(DataError, match=r"is torch.float64 \[\], expected torch.float32"):
        fp8.load_state({**state, name: state[name].double()})


def test_only_delayed_scaling_has_state(decoder: Decoder) -> None:
    assert attach(decoder, "tensorwise").state() == {}


def test_bf16_layers_run_outside_fp8(decoder: Decoder) -> None:
    fp8 = attach(decoder)
    decoder(torch.ones(2, 16))
    fp8.use_bf16([2])
    decoder(torch.ones(2, 16))
    assert fp8.bf16_layers == {2}
    assert [layer.seen for layer in decoder.layers] == [[True, True], [True, False]]


def test_disabled_takes_fp8_from_the_engine_and_gives_it_back(decoder: Decoder) -> None:
    fp8 = attach(decoder)
    with fp8.disabled():
        assert decoder.config.fp8 is None
    assert decoder.config.fp8 == "hybrid"


def test_an_evaluation_leaves_no_trace(decoder: Decoder) -> None:
    attach(decoder)
    module: Any = decoder.layers[0].linear
    module.init_fp8_meta_tensors("recipe")
    history = module.fp8_meta["scaling_fwd"].amax_history
    history.fill_(5.0)
    decoder(torch.ones(2, 16))
    assert (history == 5).all()
    with torch.no_grad():
        decoder(torch.ones(2, 16))
    assert (history[0] == 0).all() and (history[1:] == 5).all()


def test_watching_counts_what_the_layers_are_given(decoder: Decoder) -> None:
    fp8 = attach(decoder)
    for layer in decoder.layers:
        torch.nn.init.eye_(layer.linear.weight)
    fp8.use_bf16([2])
    with fp8.watched() as found:
        decoder(torch.full((2, 16), 500.0, requires_grad=True)).sum().backward()
    assert set(found) == {"decoder.layers.1.mlp.linear_fc1"}
    counts = found["decoder.layers.1.mlp.linear_fc1"]
    assert counts["input"] == {"amax": 500.0, "overflow": 32, "underflow": 0, "values": 32}
    assert counts["weight"]["values"] == 256 and counts["grad"]["amax"] == 1.0
    decoder(torch.ones(2, 16))
    assert found["decoder.layers.1.mlp.linear_fc1"] is counts, "nothing is counted afterwards"


def test_a_layers_own_norm_stands_before_its_product() -> None:
    x = torch.randn(3, 16)
    module = SimpleNamespace(
        layer_norm_weight=torch.full((16,), 0.5), zero_centered_gamma=True, normalization="RMSNorm", eps=1e-5
    )
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * 1.5
    torch.testing.assert_close(normed(module, x), expected)
    assert normed(SimpleNamespace(), x) is x


def test_the_engines_options() -> None:
    assert fp8_options(PrecisionConfig()) == {}
    assert fp8_options(PrecisionConfig(fp8="delayed", fp8_emulation=True)) == {}
    delayed = PrecisionConfig(
        fp8="delayed", fp8_margin=2, fp8_amax_history_len=16, fp8_amax_compute_algo="most_recent"
    )
    assert fp8_options(delayed) == {
        "fp8": "hybrid",
        "fp8_recipe": "delayed",
        "fp8_param": False,
        "first_last_layers_bf16": False,
        "fp8_margin": 2,
        "fp8_amax_history_len": 16,
        "fp8_amax_compute_algo": "most_recent",
    }
    first_last = PrecisionConfig(
        fp8="blockwise", fp8_format="e4m3", first_last_layers_bf16=True, num_layers_at_end_in_bf16=2
    )
    found = fp8_options(first_last)
    assert (found["fp8"], found["num_layers_at_start_in_bf16"], found["num_layers_at_end_in_bf16"]) == (
        "e4m3", 1, 2,
    )  # fmt: skip
    assert "fp8_margin" not in found
