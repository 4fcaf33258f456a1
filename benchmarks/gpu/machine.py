"""The ceilings of the machine, measured: matrix products, attention, copies. All other figures are held to these.

    python benchmarks/gpu/machine.py --case machine --output DIR [--rehearse]

``found`` has each rate by name, in FLOP/s or bytes/s: the median of many calls on random data (zeros would run faster:
less of the chip switches), timed by CUDA events, over inputs that together do not fit the L2 cache. What the machine
cannot do is left out and stands in ``missing`` with its reason. Not run on a GPU yet.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from cases import FFN, GROUPS, HEADS, HIDDEN, VOCABULARY, Case
from process import Options, new_record, run_case
from record import Record

Call = Callable[[], Any]

BEYOND_L2 = 256 * 2**20
"""Bytes of the inputs taken in turn: five times the L2 cache of an H100 or H200 (50 MB)."""
LARGE = 8192
"""Side of the product that the goals are held to: 1.1e12 FLOPs, 4 of them fill no cache."""
HEAD_WIDTH = HIDDEN // HEADS


class Bench:
    """Times calls on one device; ``small`` divides all sizes, for a rehearsal."""

    def __init__(self, rehearse: bool) -> None:
        import torch

        self.torch, self.rehearse = torch, rehearse
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.found: dict[str, Any] = {}
        self.missing: dict[str, str] = {}
        torch.manual_seed(1)

    def size(self, number: int) -> int:
        """A size, small in a rehearsal."""
        return max(16, number // 64 // 16 * 16) if self.rehearse else number

    def random(self, *shape: int, dtype: Any = None) -> Any:
        """Normal values of a product's usual size."""
        return self.torch.randn(*shape, device=self.device, dtype=dtype or self.torch.bfloat16)

    def seconds(self, calls: list[Call], at_least: float = 0.4, most: int = 300) -> float:
        """Median seconds of a call, the calls taken in turn until ``at_least`` seconds have gone by."""
        for call in calls[:2] * 2:
            call()
        if self.rehearse:
            at_least, most = 0.0, 2
        events: list[tuple[Any, Any]] = []
        spent: list[float] = []
        cuda = self.torch.cuda
        self.wait()
        until = time.perf_counter() + at_least
        while len(events) + len(spent) < 8 * (1 - self.rehearse) + 2 or time.perf_counter() < until:
            call = calls[(len(events) + len(spent)) % len(calls)]
            if self.rehearse:
                begun = time.perf_counter()
                call()
                spent.append(time.perf_counter() - begun)
            else:
                pair = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
                pair[0].record()
                call()
                pair[1].record()
                events.append(pair)
                if (
                    len(events) % 16 == 0
                ):  # the host must not run seconds ahead of the clock that ends the loop
                    pair[1].synchronize()
            if len(events) + len(spent) >= most:
                break
        self.wait()
        return statistics.median(spent or [float(begin.elapsed_time(end)) / 1000.0 for begin, end in events])

    def wait(self) -> None:
        """Until the GPU has done everything."""
        if not self.rehearse:
            self.torch.cuda.synchronize()

    def rate(self, name: str, work: float, make: Callable[[], list[Call]], **more: float) -> None:
        """``found[name]`` = ``work`` (FLOPs or bytes of a call) over its median seconds, or why there is none."""
        try:
            calls = make()
            self.found[name] = work / self.seconds(calls, **more)  # type: ignore[arg-type]
        except Exception as error:
            self.missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        finally:
            if not self.rehearse:
                self.torch.cuda.empty_cache()

    def turns(self, bytes_each: int) -> int:
        """How many sets of inputs are taken in turn."""
        return 2 if self.rehearse else max(2, -(-BEYOND_L2 // bytes_each))


def products(bench: Bench) -> None:
    """Square and layer-shaped products in bf16, fp32 and FP8."""
    torch = bench.torch
    side = bench.size(LARGE)
    square(bench, "bf16 8192^3", side, torch.bfloat16)
    square(bench, "bf16 8192^3, for 3 s on end", side, torch.bfloat16, at_least=3.0, most=10_000)
    scaled(bench, "fp8 8192^3, fast accumulation", side, side, side, fast=True)
    scaled(bench, "fp8 8192^3, exact accumulation", side, side, side, fast=False)
    tokens, hidden = bench.size(8192), bench.size(HIDDEN)
    layers = {
        "qkv": (hidden, bench.size((HEADS + 2 * GROUPS) * HEAD_WIDTH)),
        "proj": (hidden, hidden),
        "fc1": (hidden, bench.size(2 * FFN)),
        "fc2": (bench.size(FFN), hidden),
        "output": (hidden, bench.size(VOCABULARY)),
    }
    for name, (width, out) in layers.items():
        for way, shape in (
            ("forward", (tokens, width, out)),
            ("dgrad", (tokens, out, width)),
            ("wgrad", (out, tokens, width)),
        ):
            product(bench, f"bf16 {name} {way}", *shape, way)
            if name != "output":
                scaled(bench, f"fp8 {name} {way}", *shape, fast=way == "forward")
    for recipe in ("bf16", "fp8"):
        whole_layer(
            bench, recipe, {name: shape for name, shape in layers.items() if name != "output"}, tokens
        )
    torch.backends.cuda.matmul.allow_tf32 = False
    square(bench, "fp32 8192^3", side, torch.float32)
    torch.backends.cuda.matmul.allow_tf32 = True
    square(bench, "tf32 8192^3", side, torch.float32)


def square(bench: Bench, name: str, side: int, dtype: Any, **more: float) -> None:
    """side x side x side."""

    def make() -> list[Call]:
        count = bench.turns(2 * side * side * dtype.itemsize)
        pairs = [
            (bench.random(side, side, dtype=dtype), bench.random(side, side, dtype=dtype))
            for _ in range(count)
        ]
        out = bench.random(side, side, dtype=dtype)
        return [lambda a=a, b=b: bench.torch.mm(a, b, out=out) for a, b in pairs]  # type: ignore[misc]

    bench.rate(name, 2.0 * side**3, make, **more)


def product(bench: Bench, name: str, rows: int, inner: int, columns: int, way: str) -> None:
    """[rows, inner] x [inner, columns] in bf16, transposed as a linear layer has it in that way."""

    def make() -> list[Call]:
        calls: list[Call] = []
        out = bench.random(rows, columns)
        for _ in range(bench.turns(2 * (rows * inner + inner * columns))):
            left = bench.random(inner, rows).t() if way == "wgrad" else bench.random(rows, inner)
            right = bench.random(columns, inner).t() if way == "forward" else bench.random(inner, columns)
            calls.append(lambda a=left, b=right: bench.torch.mm(a, b, out=out))  # type: ignore[misc]
        return calls

    bench.rate(name, 2.0 * rows * inner * columns, make)


def scaled(bench: Bench, name: str, rows: int, inner: int, columns: int, fast: bool) -> None:
    """The same in E4M3 with one scale per tensor; Hopper multiplies FP8 in one layout alone, so it is always that."""

    def make() -> list[Call]:
        torch = bench.torch
        e4m3, one = torch.float8_e4m3fn, torch.ones((), device=bench.device)
        calls: list[Call] = []
        for _ in range(bench.turns(rows * inner + inner * columns)):
            left, right = bench.random(rows, inner).to(e4m3), bench.random(columns, inner).to(e4m3).t()

            def call(a: Any = left, b: Any = right) -> Any:
                return torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16, use_fast_accum=fast)

            calls.append(call)
        return calls

    bench.rate(name, 2.0 * rows * inner * columns, make)


def whole_layer(bench: Bench, recipe: str, layers: dict[str, tuple[int, int]], tokens: int) -> None:
    """The rate of all twelve products of a layer one after another."""
    seconds = flops = 0.0
    for name, (width, out) in layers.items():
        for way in ("forward", "dgrad", "wgrad"):
            rate = bench.found.get(f"{recipe} {name} {way}")
            if rate is None:
                return
            flops += 2.0 * tokens * width * out
            seconds += 2.0 * tokens * width * out / rate
    bench.found[f"{recipe} layer"] = flops / seconds


def attention(bench: Bench) -> None:
    """Causal attention alone, forward and backward; FLOPs as ``models/flops.py`` counts them (backward twice the
    forward, the causal half once)."""
    for seq in (8192, 32768):
        length = bench.size(seq)
        flops = 3 * 2 * 2.0 * length * length / 2 * HEADS * HEAD_WIDTH
        for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
            name = f"attention {backend.split('_')[0].lower()} {seq}"
            bench.rate(name, flops, lambda length=length, b=backend: sdpa(bench, length, b))  # type: ignore[misc]
        bench.rate(
            f"attention transformer_engine {seq}",
            flops,
            lambda length=length: engine_attention(bench, length),  # type: ignore[misc]
        )


def sdpa(bench: Bench, length: int, backend: str) -> list[Call]:
    """torch's own, keys and values repeated for their group of queries beforehand."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch = bench.torch
    query, key, value = (bench.random(1, HEADS, length, HEAD_WIDTH).requires_grad_() for _ in range(3))
    gradient = bench.random(1, HEADS, length, HEAD_WIDTH)

    def call() -> None:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        torch.autograd.grad(out, (query, key, value), gradient)

    return [call]


def engine_attention(bench: Bench, length: int) -> list[Call]:
    """Transformer Engine's, as our layers call it: grouped keys and values, [seq, batch, heads, width]."""
    import transformer_engine.pytorch as te

    torch = bench.torch
    layer = te.DotProductAttention(
        HEADS,
        HEAD_WIDTH,
        num_gqa_groups=GROUPS,
        attention_dropout=0.0,
        attn_mask_type="causal",
        qkv_format="sbhd",
    )
    query = bench.random(length, 1, HEADS, HEAD_WIDTH).requires_grad_()
    key, value = (bench.random(length, 1, GROUPS, HEAD_WIDTH).requires_grad_() for _ in range(2))
    gradient = bench.random(length, 1, HIDDEN)

    def call() -> None:
        torch.autograd.grad(layer(query, key, value), (query, key, value), gradient)

    return [call]


def copies(bench: Bench) -> None:
    """Within the GPU (read and written bytes together), and between host and GPU in both directions."""
    torch = bench.torch
    count = bench.size(2**30)
    whole = bench.torch.empty

    def within() -> list[Call]:
        a, b = (whole(count, dtype=torch.uint8, device=bench.device) for _ in range(2))
        return [lambda: b.copy_(a)]

    bench.rate("copy within the GPU", 2.0 * count, within)

    def across(pinned: bool, to_host: bool) -> list[Call]:
        host = whole(count, dtype=torch.uint8, pin_memory=pinned and not bench.rehearse).fill_(1)
        device = whole(count, dtype=torch.uint8, device=bench.device)
        source, target = (device, host) if to_host else (host, device)
        return [lambda: target.copy_(source, non_blocking=pinned)]

    for pinned in (True, False):
        for to_host in (False, True):
            name = f"copy {'to host' if to_host else 'to GPU'}, {'pinned' if pinned else 'pageable'}"
            bench.rate(name, float(count), lambda p=pinned, h=to_host: across(p, h), most=12)  # type: ignore[misc]


def clocks() -> str:
    """Name, clocks, power and memory as the driver tells them."""
    query = "name,clocks.max.sm,clocks.sm,power.limit,power.draw,temperature.gpu,memory.total"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return f"{query}: {done.stdout.strip()}"


def measure(case: Case, options: Options) -> Record:
    """Everything."""
    bench = Bench(options.rehearse)
    before = clocks()
    products(bench)
    attention(bench)
    copies(bench)
    found = {**bench.found, "missing": bench.missing, "before": before, "after": clocks()}
    return new_record(case, options, found=found)


if __name__ == "__main__":
    sys.exit(run_case(measure, __doc__))
