"""Emulated FP8 linear layers against references written out by hand: values, gradients, histories, recomputation."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

# The engine's layers want a process group and the CPU bridge, which no other test may inherit: the checks below
# run in one process of their own, this file as its program.
CHECKS: dict[str, Any] = {}


def check(function: Any) -> Any:
    CHECKS[function.__name__] = function
    return function


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    """What each check said, in one process: ``ok`` or its traceback."""
    done = subprocess.run(
        [sys.executable, __file__],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    parts = done.stdout.split("\0")
    return dict(zip(parts[::2], parts[1::2], strict=False))


def test_every_check_ran(answers: dict[str, str]) -> None:
    assert set(answers) - {""} == set(NAMES)


# --- in the other process ------------------------------------------------------------------------------------


def settings(recipe: str, **changes: Any) -> Any:
    from megatron_syne.fp8.emulation import Settings
    from megatron_syne.fp8.recipes import E4M3, E5M2

    return Settings(recipe=recipe, **{"forward": E4M3, "backward": E5M2, "history_len": 4, **changes})


def layer(recipe: str, bias: bool = True, **changes: Any) -> tuple[Any, Any]:
    """(column-parallel layer 192 -> 160 in fp32, its scaling)."""
    from megatron.core.transformer import TransformerConfig

    from megatron_syne.fp8.emulation import ChunkScaling, Switches
    from megatron_syne.fp8.linear import Fp8ColumnParallelLinear

    engine = TransformerConfig(
        num_layers=1, hidden_size=64, num_attention_heads=1, use_cpu_initialization=True
    )
    torch.manual_seed(3)
    module = Fp8ColumnParallelLinear(
        192, 160, config=engine, init_method=torch.nn.init.normal_, bias=bias, skip_bias_add=False
    )
    if bias:
        torch.nn.init.normal_(module.bias)
    module.scaling = ChunkScaling(("one",), settings(recipe, **changes), Switches(), torch.device("cpu"))
    return module, module.scaling


def values(seed: int) -> torch.Tensor:
    """[sequence 70, batch 2, 192], over several powers of two."""
    maker = torch.Generator().manual_seed(seed)
    x = torch.randn(70, 2, 192, generator=maker)
    return (x * torch.exp2(torch.randint(-4, 4, x.shape, generator=maker))).requires_grad_()


def run(module: Any, scaling: Any, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """One micro-batch, as a chunk of this one layer."""
    scaling.enter(first_micro_batch=True)
    output = module(x)[0]
    scaling.leave(output)
    output.backward(grad)
    return output.detach()


def by_hand(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    top = torch.finfo(dtype).max
    return (x.detach() * scale).clamp(-top, top).to(dtype).float() / scale


def tiles_by_hand(x: torch.Tensor, dtype: torch.dtype, rows: int, columns: int) -> torch.Tensor:
    result = torch.empty_like(x)
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            part = x[i : i + rows, j : j + columns].detach()
            power = torch.floor(torch.log2(torch.finfo(dtype).max / part.abs().max()))
            result[i : i + rows, j : j + columns] = by_hand(part, torch.exp2(power), dtype)
    return result


def expect(module: Any, x: torch.Tensor, grad: torch.Tensor, output: torch.Tensor, copies: Any) -> None:
    """``copies``: input for both products, weight, gradient for both products, all rounded, two-dimensional."""
    x_rows, x_columns, weight, grad_rows, grad_columns = copies
    close: Any = torch.testing.assert_close
    close(output.view(-1, 160), x_rows @ weight.t() + module.bias.detach(), rtol=1e-5, atol=1e-4)
    close(x.grad.view(-1, 192), grad_rows @ weight, rtol=1e-5, atol=1e-4)
    close(module.weight.grad, grad_columns.t() @ x_columns, rtol=1e-5, atol=1e-3)
    close(module.bias.grad, grad.view(-1, 160).sum(0), rtol=1e-5, atol=1e-4)
    exact = x.detach().view(-1, 192) @ module.weight.detach().t() + module.bias.detach()
    assert (output.view(-1, 160) - exact).abs().max() > 1e-2, "FP8 must show, or nothing was rounded"


@check
def tensorwise_follows_the_reference() -> None:
    module, scaling = layer("tensorwise")
    x, grad = values(1), torch.randn(70, 2, 160) * 1e-6
    output = run(module, scaling, x, grad)

    def one(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        flat = t.detach().reshape(-1, t.shape[-1])
        return by_hand(flat, torch.finfo(dtype).max / flat.abs().max(), dtype)

    e4, e5 = torch.float8_e4m3fn, torch.float8_e5m2
    expect(
        module,
        x,
        grad,
        output,
        (one(x, e4), one(x, e4), one(module.weight, e4), one(grad, e5), one(grad, e5)),
    )


@check
def blockwise_follows_the_reference() -> None:
    """Tiles along what each product sums over; 140 tokens, 192 and 160 features: no multiples of 128."""
    module, scaling = layer("blockwise")
    x, grad = values(2), torch.randn(70, 2, 160) * 1e-6
    output = run(module, scaling, x, grad)
    e4, e5 = torch.float8_e4m3fn, torch.float8_e5m2
    flat, flat_grad = x.detach().view(-1, 192), grad.view(-1, 160)
    copies = (
        tiles_by_hand(flat, e4, 1, 128),
        tiles_by_hand(flat, e4, 128, 1),
        tiles_by_hand(module.weight.detach(), e4, 128, 128),
        tiles_by_hand(flat_grad, e5, 1, 128),
        tiles_by_hand(flat_grad, e5, 128, 1),
    )
    expect(module, x, grad, output, copies)


@check
def delayed_uses_the_scales_of_the_round_before() -> None:
    module, scaling = layer("delayed", margin=1)
    e4, e5 = torch.float8_e4m3fn, torch.float8_e5m2
    scales = {"x": torch.ones(()), "w": torch.ones(()), "g": torch.ones(())}
    for seed in range(3):
        x, grad = values(seed), torch.randn(70, 2, 160, generator=torch.Generator().manual_seed(seed)) * 1e-2
        module.weight.grad = module.bias.grad = None
        output = run(module, scaling, x, grad)
        rounded = by_hand(x.reshape(-1, 192), scales["x"], e4)
        weight = by_hand(module.weight, scales["w"], e4)
        grads = by_hand(grad.view(-1, 160), scales["g"], e5)
        expect(module, x, grad, output, (rounded, rounded, weight, grads, grads))
        largest = {
            "x": max(values(n).abs().max() for n in range(seed + 1)),
            "w": module.weight.detach().abs().max(),
            "g": max(
                (torch.randn(70, 2, 160, generator=torch.Generator().manual_seed(n)) * 1e-2).abs().max()
                for n in range(seed + 1)
            ),
        }
        scales = {name: (57344 if name == "g" else 448) / 2 / amax for name, amax in largest.items()}
        got = {"x": "input", "w": "weight", "g": "grad"}
        for name, tensor in got.items():
            torch.testing.assert_close(scaling.scales[tensor][0], scales[name], rtol=1e-6, atol=0)
            assert scaling.histories[tensor][0, 0] == 0 and scaling.histories[tensor][-1, 0] > 0


@check
def a_weight_is_rounded_once_per_step() -> None:
    module, scaling = layer("delayed")
    x = values(1)
    scaling.enter(first_micro_batch=True)
    first = module(x)[0]
    scaling.leave(first)
    kept = scaling.weights[0]
    with torch.no_grad():
        module.weight.mul_(2)  # as if by a later step
    scaling.enter(first_micro_batch=False)
    module(x)
    assert scaling.weights[0] is kept and scaling.histories["weight"][0, 0] == 0
    scaling.leave(first)
    scaling.enter(first_micro_batch=True)
    module(x)
    assert scaling.weights[0] is not kept and scaling.histories["weight"][0, 0] == module.weight.abs().max()


@check
def frozen_weights_and_inputs_without_gradient() -> None:
    for recipe in ("delayed", "tensorwise", "blockwise"):
        module, scaling = layer(recipe)
        module.weight.requires_grad_(False)
        x = values(1)
        run(module, scaling, x, torch.ones(70, 2, 160))
        assert x.grad is not None and module.weight.grad is None and module.bias.grad is not None
        module.weight.requires_grad_(True)
        run(module, scaling, values(1).detach(), torch.ones(70, 2, 160))
        assert module.weight.grad is not None


@check
def recomputation_changes_nothing() -> None:
    """The second forward pass takes the first's scales, though they have moved on, and records nothing."""
    from torch.utils.checkpoint import checkpoint

    results = []
    for again in (False, True):
        module, scaling = layer("delayed")
        seen = []
        for first in (True, False):  # two micro-batches forward, then their backward passes: 1F1B
            x = values(3 if first else 4)
            scaling.enter(first_micro_batch=first)
            output = checkpoint(lambda t, m=module: m(t)[0], x, use_reentrant=True) if again else module(x)[0]
            scaling.leave(output)
            seen.append((x, output))
        for _, output in seen:
            output.backward(torch.full((70, 2, 160), 1e-3))
        results.append([*(x.grad for x, _ in seen), module.weight.grad, *scaling.histories.values()])
        assert not scaling.kept_scales[0]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@check
def an_evaluation_leaves_no_trace() -> None:
    module, scaling = layer("delayed")
    run(module, scaling, values(1), torch.ones(70, 2, 160))
    before = {name: t.clone() for name, t in {**scaling.histories, "scale": scaling.scales["input"]}.items()}
    with torch.no_grad():
        scaling.enter(first_micro_batch=True)
        output = module(values(9) * 100)[0]
        scaling.leave(output)
    for name, tensor in before.items():
        now = scaling.scales["input"] if name == "scale" else scaling.histories[name]
        assert torch.equal(tensor, now), name


@check
def switched_off_or_in_bf16_it_is_the_engines_own() -> None:
    module, scaling = layer("delayed")
    x = values(1)
    exact = torch.nn.functional.linear(x, module.weight, module.bias)
    scaling.switches.off = True
    run(module, scaling, x, torch.ones(70, 2, 160))
    assert not scaling.histories["input"].any()
    torch.testing.assert_close(module(x)[0], exact, rtol=1e-6, atol=1e-5)
    scaling.switches.off, scaling.switches.bf16_layers = False, frozenset([0])
    torch.testing.assert_close(module(x)[0], exact, rtol=1e-6, atol=1e-5)
    scaling.switches.bf16_layers = frozenset([1])
    assert not torch.allclose(module(x)[0], exact, rtol=1e-3, atol=1e-3)


@check
def what_is_lost_is_counted_per_tensor() -> None:
    from megatron_syne.fp8.counts import plain_counts

    module, scaling = layer("delayed")
    scaling.switches.counts = {}
    with torch.no_grad():
        module.weight.fill_(1.0)
    x = torch.full((70, 2, 192), 1e-4)
    x[0, 0, :3] = 1000.0
    run(module, scaling, x.requires_grad_(), torch.full((70, 2, 160), 1e5))
    found = plain_counts(scaling.switches.counts)["one"]
    assert found["input"] == {
        "amax": 1000.0, "overflow": 3, "underflow": 70 * 2 * 192 - 3, "values": 70 * 2 * 192,
    }  # fmt: skip
    assert found["weight"] == {"amax": 1.0, "overflow": 0, "underflow": 0, "values": 160 * 192}
    assert found["grad"] == {
        "amax": 1e5, "overflow": 70 * 2 * 160, "underflow": 0, "values": 70 * 2 * 160,
    }  # fmt: skip


NAMES = tuple(CHECKS)


@pytest.mark.parametrize("name", NAMES)
def test_layer(answers: dict[str, str], name: str) -> None:
    assert answers[name] == "ok", answers[name]


def engine() -> Iterator[None]:
    """A world of one rank, on the CPU platform."""
    from megatron_syne.config.schema import ParallelConfig, PrecisionConfig
    from megatron_syne.platform.base import select

    platform = select("cpu")
    platform.start(0, PrecisionConfig())
    import torch.distributed as dist

    from megatron_syne.parallel.setup import start_model_parallel

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    start_model_parallel(ParallelConfig(), 1)
    yield
    dist.destroy_process_group()


def main() -> None:
    import traceback

    for _ in engine():
        for name, function in CHECKS.items():
            try:
                function()
                said = "ok"
            except Exception:
                said = traceback.format_exc()
            sys.stdout.write(f"{name}\0{said}\0")


if __name__ == "__main__":
    main()
