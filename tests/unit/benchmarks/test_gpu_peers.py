"""The peers measured beside us are what they say: the same model as transformers', real float8 products, fair steps."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks" / "gpu"))

import compiled_llama
import float8_linear
import host_step
import loader_step
import peer_compiled
import peer_steps
import peer_transformers
import profile_step
import trace_events
from cases import Case
from ours import run_yaml
from process import Options
from trace_events import Event

from megatron_syne.config.loader import load_config
from megatron_syne.data.loader import build_training_data
from megatron_syne.data.mixture.planning import plan_mixture

SHAPE = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "vocab_size": 256,
    "seq_length": 32,
    "micro_batch_size": 2,
    "global_batch_size": 4,
}
CASE = Case(
    name="peer", num_layers=2, seq_length=32, micro_batch_size=2, global_batch_size=4, steps=2, warm=1
)
CPU = torch.device("cpu")


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.randint(256, (2, 33), generator=torch.Generator().manual_seed(seed))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def theirs() -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = peer_transformers.llama_config(SHAPE)
    config.initializer_range = 0.2  # large, so that attention is far from uniform
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    return model.train()


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """transformers' logits, loss and gradients, the latter under our names."""
    model = theirs()
    tokens, labels = batch()
    loss = peer_transformers.loss_of(model)(tokens, labels)
    loss.backward()
    gradients = {name: each.grad for name, each in model.named_parameters()}
    return {
        "state": compiled_llama.from_transformers(model.state_dict(), 2),
        "logits": model(input_ids=tokens, use_cache=False).logits.detach(),
        "loss": float(loss.detach()),
        "gradients": compiled_llama.from_transformers(gradients, 2),
    }


def ours(expected: dict[str, Any], **options: Any) -> compiled_llama.Llama:
    model = compiled_llama.Llama(SHAPE, **options)
    model.load_state_dict(expected["state"])
    return model


@pytest.mark.parametrize("repeat_keys", [False, True])
@pytest.mark.parametrize("recompute", peer_compiled.RECOMPUTE)
def test_compiled_llama_is_transformers_llama(
    expected: dict[str, Any], recompute: str, repeat_keys: bool
) -> None:
    """Logits to 2e-5 of their largest, loss to 1e-6, gradients to 2e-5 of their norm, all in fp32."""
    model = ours(expected, recompute=recompute, repeat_keys=repeat_keys)
    tokens, labels = batch()
    logits = model.logits(tokens)
    assert (logits - expected["logits"]).abs().max() < 2e-5 * expected["logits"].abs().max()
    loss = model.loss(tokens, labels)
    assert math.isclose(float(loss.detach()), expected["loss"], rel_tol=1e-6)
    loss.backward()
    found = {name: each.grad for name, each in model.named_parameters()}
    assert found.keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        assert (found[name] - gradient).norm() < 2e-5 * gradient.norm(), name


def test_llama_3_synes_own_way_trains() -> None:
    """With checkpointing and autocast; the name by which the record tells of it."""
    variant = peer_transformers.variant(SHAPE, CPU, "fp32", checkpointing=True)
    assert variant.name == peer_transformers.SYNE and variant.autocast
    rows = torch.randint(16, (4, 33), generator=torch.Generator().manual_seed(5))
    losses = peer_steps.train(variant, CASE, rows, 6, 0).losses
    assert losses[-1] < losses[0] - 0.02


@pytest.mark.parametrize("rowwise", [False, True])
def test_float8_linear(rowwise: bool) -> None:
    """Output and both gradients within float8's error of the exact product, and not exact: it was in float8.

    E4M3 has 3 bits after the point, E5M2 has 2: relative errors of single numbers up to 2^-4 and 2^-3; summed over
    random signs the relative error of a product's norm is below 6 % (12 % with E5M2 gradients).
    """
    chance = torch.Generator().manual_seed(1)
    x = torch.randn(4, 32, 64, generator=chance).bfloat16().requires_grad_()
    weight = torch.randn(48, 64, generator=chance).bfloat16().requires_grad_()
    gradient = torch.randn(4, 32, 48, generator=chance).bfloat16()
    out = float8_linear.float8_linear(x, weight, rowwise)
    assert out.dtype == torch.bfloat16
    found = (out, *torch.autograd.grad(out, (x, weight), gradient))
    flat, back = x.detach().float().flatten(0, 1), gradient.float().flatten(0, 1)
    exact = (flat @ weight.detach().float().t(), back @ weight.detach().float(), back.t() @ flat)
    limits = (0.06, 0.06, 0.06) if rowwise else (0.06, 0.12, 0.12)
    for value, want, limit in zip(found, exact, limits, strict=True):
        error = float((value.detach().float().reshape(want.shape) - want).norm() / want.norm())
        assert 0.01 < error < limit


def test_rowwise_scales_are_of_each_row() -> None:
    """A row of tiny numbers beside a row of large ones: lost with one scale a tensor, kept with one a row."""
    x = torch.stack([torch.full((64,), 1e-6), torch.full((64,), 1e3)]).bfloat16()
    weight = torch.eye(64).bfloat16()
    tiny = float8_linear.float8_linear(x, weight, True)[0]
    assert torch.allclose(tiny.float(), x[0].float(), rtol=0.07)
    assert not float8_linear.float8_linear(x, weight, False)[0].any()


# -- the search for a peer's fastest way


def search(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float], minutes: float = 60.0
) -> peer_steps.Search:
    """Whose variants take so long, or fail where that is not in the table."""

    def train(variant: peer_steps.Variant, case: Case, rows: Any, steps: int, warm: int) -> peer_steps.Timed:
        if variant.name not in seconds:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return peer_steps.Timed([seconds[variant.name]] * steps, [1.0] * (warm + steps))

    monkeypatch.setattr(peer_steps, "train", train)
    monkeypatch.setattr(peer_steps, "release", lambda: None)  # a collection takes a second
    return peer_steps.Search(replace(CASE, minutes=minutes), torch.zeros(1, 33))


def named(*names: str) -> list[peer_steps.Variant]:
    return [peer_steps.Variant(name, lambda: peer_steps.Model(lambda a, b: a, [])) for name in names]


def test_the_fastest_counts_and_a_failure_takes_nothing_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = search(monkeypatch, {"slow": 3.0, "fast": 1.0, "middling": 2.0})
    assert tried.attempt(named("too large")) is None
    best = tried.attempt(named("slow", "fast", "too large as well", "middling"))
    assert best is not None and best.name == "fast"
    name, timed = tried.measure()
    assert (name, len(timed.seconds), len(timed.losses)) == ("fast", 2, 3)
    assert "OutOfMemoryError" in tried.tried["too large"]["error"]
    assert tried.tried["slow"]["tokens_per_second"] == pytest.approx(4 * 32 / 3.0)


def test_when_time_runs_out_the_fastest_so_far_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = search(monkeypatch, {"first": 3.0, "second": 1.0}, minutes=0.0)
    best = tried.attempt(named("first", "second"))
    assert best is not None and best.name == "first"
    assert "not tried" in tried.tried["second"]["error"]


def test_a_loss_that_is_not_finite_does_not_win() -> None:
    def build() -> peer_steps.Model:
        weight = torch.nn.Parameter(torch.ones(1))
        return peer_steps.Model(lambda tokens, labels: weight.sum() * float("nan"), [weight])

    tried = peer_steps.Search(CASE, torch.zeros(4, 33, dtype=torch.int64))
    assert tried.attempt([peer_steps.Variant("diverges", build)]) is None
    assert tried.tried["diverges"]["error"] == "FloatingPointError: loss is not finite"


@pytest.mark.parametrize(("error", "attempts"), [("OutOfMemoryError: CUDA", 6), ("RuntimeError: refused", 2)])
def test_more_is_recomputed_only_for_want_of_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: str, attempts: int
) -> None:
    """Each fastest kernel and torch's own choice: with all three ways of recomputing, or with the first alone."""
    seen = []

    class Nothing(peer_steps.Search):
        def attempt(self, variants: Any) -> None:  # type: ignore[override]
            seen.append([variant.name for variant in variants])
            self.tried |= {name: {"error": error} for name in seen[-1]}

    monkeypatch.setattr(peer_compiled, "Search", Nothing)
    monkeypatch.setattr(peer_steps, "token_rows", lambda *_: torch.zeros(4, 33, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="no variant ran"):
        peer_compiled.measure(replace(CASE, seq_length=32), Options(tmp_path, rehearse=True))
    assert len(seen) == attempts


def test_nothing_that_runs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = search(monkeypatch, {})
    tried.attempt(named("too large"))
    with pytest.raises(RuntimeError, match="out of memory"):
        tried.measure()


def test_accumulated_steps_are_the_steps_of_the_whole_batch() -> None:
    """Two micro-batches of 2 and one of 4 train alike: losses of 3 steps in fp32 to 1e-6."""
    rows = torch.randint(256, (12, 33), generator=torch.Generator().manual_seed(3))

    def build() -> peer_steps.Model:
        return peer_compiled.build_model(SHAPE, CPU, torch.float32, "bf16", False, "none", False)

    variant = peer_steps.Variant("one", build)
    whole = peer_steps.train(variant, replace(CASE, micro_batch_size=4), rows, 2, 1)
    parts = peer_steps.train(variant, CASE, rows, 2, 1)
    assert len(parts.seconds) == 2 and len(parts.losses) == 3
    assert parts.losses == pytest.approx(whole.losses, rel=1e-6)
    assert len(set(parts.losses)) == 3


@pytest.mark.parametrize("precision", ["bf16", "tensorwise"])
def test_every_variant_of_the_compiled_peer_trains(precision: str) -> None:
    """The loss falls on one batch that is seen again and again."""
    rows = torch.randint(16, (4, 33), generator=torch.Generator().manual_seed(4))
    found = list(
        peer_compiled.variants(replace(CASE, precision=precision), SHAPE, CPU, "flash", "none", False)
    )
    assert len(found) >= 2
    for variant in found:
        losses = peer_steps.train(variant, CASE, rows, 6, 0).losses
        assert losses[-1] < losses[0] - 0.02, variant.name


def test_attention_that_is_refused_says_why() -> None:
    times = peer_steps.attention_times(CASE, SHAPE, CPU)
    assert isinstance(times["flash"], float) and isinstance(times["cudnn"], str)
    assert (peer_steps.best_attention(times) or "").startswith("flash")
    assert peer_steps.best_attention({"flash": "no"}) is None


# -- what a trace says


def kernel(name: str, start: float, duration: float, stream: int = 7) -> Event:
    return Event(name, start, duration, stream)


TRACE = [
    Event(trace_events.STEP, 0.0, 1000.0, 1, "note"),
    kernel("nvjet_hsh_128x256", 100.0, 300.0),
    kernel("cudnn_generated_fort_native_sdpa_sm90", 420.0, 80.0),  # 20 after it: a gap of 2 %
    kernel("nvjet_hsh_128x256", 500.0, 100.0),
    kernel("ncclDevKernel_AllReduce", 550.0, 100.0, 20),  # on another stream, longer
    Event("Memcpy DtoH", 655.0, 5.0, 7, "memcpy"),
    Event("forward", 0.0, 600.0, 1, "python"),
    Event("aten::mm", 400.0, 15.0, 1, "op"),
    Event("cudaLaunchKernel", 402.0, 12.0, 1, "runtime"),
    Event("train_step", 600.0, 400.0, 1, "python"),
    Event("cudaStreamSynchronize", 640.0, 30.0, 1, "runtime"),
    Event("write", 680.0, 310.0, 1, "python"),
    Event("elsewhere", 400.0, 10.0, 2, "op"),
]
WINDOW = (0.0, 1000.0)


def test_gaps_are_where_no_stream_has_work() -> None:
    gaps = trace_events.idle(TRACE, WINDOW)
    assert [(gap.start, gap.duration) for gap in gaps] == [(0, 100), (400, 20), (650, 5), (660, 340)]
    assert (gaps[0].after, gaps[-1].before) == ("(step begins)", "(step ends)")
    assert gaps[2].after == "ncclDevKernel_AllReduce"


def test_long_gaps_say_what_the_host_did() -> None:
    gaps = trace_events.long_gaps(TRACE, WINDOW, share=0.01)
    assert [(gap.duration, gap.host) for gap in gaps] == [
        (340, "write"),
        (100, "forward"),
        (20, "cudaLaunchKernel in forward"),
    ]


def test_kernels_and_kinds() -> None:
    kernels = trace_events.expensive(TRACE, [WINDOW])
    assert kernels[0] == {
        "name": "nvjet_hsh_128x256",
        "kind": "gemm",
        "count": 2,
        "milliseconds": 0.4,
        "share": 0.4,
    }
    kinds = trace_events.by_kind(TRACE, [WINDOW, (1000.0, 2000.0)])
    assert list(kinds) == ["gemm", "communication", "attention", "copy"]
    assert kinds["gemm"] == {
        "count": 1,
        "milliseconds": 0.2,
        "share": 0.2,
    }  # over two steps, one of them empty


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize128x128x128", "gemm"),
        ("void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, cutlass::bfloat16_t>>", "attention"),
        ("transformer_engine::normalization::rmsnorm_bwd_tuned_kernel", "norm"),
        ("transformer_engine::detail::cast_transpose_optimized_kernel<fp8e4m3>", "float8 cast"),
        ("multi_tensor_apply_kernel<AdamFunctorMaster<__nv_bfloat16>>", "optimizer"),
        ("transformer_engine::fused_rope_backward_kernel", "rope"),
        ("triton_poi_fused_mul_silu_split_0", "activation"),
        ("at::native::elementwise_kernel<direct_copy_kernel_cuda>", "copy"),
        ("at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", "memset"),
        ("at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "elementwise"),
        ("cross_entropy_kernel", "loss"),
    ],
)
def test_kernels_by_name(name: str, kind: str) -> None:
    assert trace_events.kind_of_kernel(kernel(name, 0, 1)) == kind


def test_waits_of_the_host_and_their_stacks() -> None:
    found = trace_events.synchronisations(TRACE, [WINDOW])
    assert found == {"cudaStreamSynchronize": {"count": 1, "milliseconds": 0.03, "stack": ["train_step"]}}


def test_a_real_trace_is_read(tmp_path: Path) -> None:
    """torch's own trace of two steps on a CPU: the work is found in both, and the pause between its products."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(2):
            with torch.profiler.record_function(trace_events.STEP):
                x = torch.ones(300, 300) @ torch.ones(300, 300)
                time.sleep(0.05)
                x @ x
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = trace_events.read_trace(tmp_path / "trace.json", device=False)
    windows = trace_events.steps_of(events)
    assert len(windows) == 2
    found = profile_step.read(events, [])
    products = next(each for each in found["kernels"] if each["name"] == "aten::matmul")
    assert (products["count"], products["kind"]) == (2, "gemm")
    assert max(found["gaps"], key=lambda gap: gap["milliseconds"])["milliseconds"] > 40
    found["unrecorded_milliseconds"] = 1.0
    assert "| `aten::matmul` | gemm | 2 |" in profile_step.as_markdown("traced", found)


def test_a_trace_without_kernels_is_refused() -> None:
    host = [event for event in TRACE if not event.on_device]
    with pytest.raises(ValueError, match="no kernel was recorded"):
        profile_step.read(host, [])


# -- loader and host


def test_loader_is_measured_and_both_feed_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_step, "ALONE", 6)
    monkeypatch.setattr(loader_step, "BUSY_REHEARSED", 0.002)
    case = Case(name="loader", kind="loader", num_layers=2, seq_length=128, steps=2, warm=1)
    found = loader_step.measure(case, Options(tmp_path, rehearse=True)).found
    assert found["thread_alone_tokens_per_second"] > 0
    assert found["bytes_per_step"] == 128 * 28 + 8  # tokens, labels, positions, mask; and the sample's source
    assert {f"thread_{name}" for name in loader_step.NAMES} < found.keys()
    if isinstance(found.get("dali"), str):
        assert "cannot be imported" in found["dali"]
    else:
        assert found["global_batches_equal"] == loader_step.COMPARED


def test_loaders_that_differ_are_told_apart(tmp_path: Path) -> None:
    """One of them a sample ahead."""
    case = Case(name="loader", kind="loader", num_layers=2, seq_length=128, steps=6, warm=1)
    config = load_config(run_yaml(case, tmp_path, True))
    ahead, data = (build_training_data(config, plan_mixture(config), 2048, 0, 1) for _ in range(2))
    assert loader_step.same(data, data, 3) == 3
    real = ahead.global_batch
    ahead.global_batch = lambda start: real(start + 1)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="sample 0: "):
        loader_step.same(data, ahead, 3)
    data.close()
    ahead.close()


def test_account_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts add up within a step; before the first step nothing counts, and warm steps are left out."""
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now, thread_time=lambda: clock.now / 4)
    monkeypatch.setattr(host_step, "time", clock)

    def work(milliseconds: float) -> None:
        clock.now += milliseconds / 1000

    account = host_step.Account()
    part = account.timed("part", work)
    part(100)
    for milliseconds in (30, 2, 4, 6):
        account.steps.append({})
        part(milliseconds / 2)
        work(5)
        part(milliseconds / 2)
    account.steps.append({})
    found = account.table(warm=1)["part"]
    assert found == pytest.approx({"mean": 3, "median": 3, "largest": 6, "cpu_mean": 0.75})


def test_the_wait_for_the_figures_of_a_step_is_counted() -> None:
    """``fetch`` only begins: what it returns is timed, as ``reduce``."""
    trainer: Any = MagicMock()
    trainer.callbacks, trainer.chunks = [], []
    trainer.platform.fetch = lambda values: lambda: [2 * value for value in values]
    account = host_step.Account()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("set_learning_rate", "reduce_over_world"):  # put back afterwards
            patch.setattr(f"megatron_syne.training.trainer.{name}", lambda: None)
        host_step.watch(trainer, account)
    read = trainer.platform.fetch([1.0])
    account.steps.append({})
    assert read() == [2.0] and set(account.steps[0]) == {"reduce"}
