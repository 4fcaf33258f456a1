"""Output layer and loss, forward and backward, whole beside chunked: memory and time, each in a process of its own.

    python benchmarks/loss.py [--dtype bf16] [--tokens 1024] [--hidden 512] [--vocab 128256] [--chunks 256]
    python benchmarks/loss.py --platform cuda --tokens 8192 --hidden 4096 --chunks 1024 2048 4096

Whole: megatron-core's output layer and cross entropy, as it is by itself, fused ("native") and Transformer Engine's
(both on CUDA alone). The weight's gradient is added to fp32 ``main_grad``, as the engine's DDP does. Memory is the
peak over what hidden states, weight and ``main_grad`` take: the resident set on a CPU, allocated memory on CUDA. Time
is CPU time on a CPU, so that other work beside it matters little. Not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

WHOLE = {"cpu": ["engine"], "cuda": ["engine", "native", "te"]}


def whole_loss(way: str, group: Any) -> Callable[..., Any]:
    """(hidden, weight, labels) -> losses, by the engine's own functions."""
    from megatron.core.tensor_parallel import layers, vocab_parallel_cross_entropy

    def loss(hidden: Any, weight: Any, labels: Any) -> Any:
        logits = layers.linear_with_grad_accumulation_and_async_allreduce(
            hidden, weight, None, False, False, False, tp_group=group
        )
        labels = labels.t().contiguous()
        if way == "native":
            from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

            return fused_vocab_parallel_cross_entropy(logits, labels, group)
        if way == "te":
            from megatron.core.extensions.transformer_engine import te_parallel_cross_entropy

            return te_parallel_cross_entropy(logits, labels, group)
        return vocab_parallel_cross_entropy(logits, labels)

    return loss


def chunked(tokens: int, vocab: int, group: Any, fused: bool) -> Callable[..., Any]:
    """(hidden, weight, labels) -> losses, in chunks of so many tokens."""
    from megatron_syne.models.chunked_loss import Head, chunked_loss

    head = Head(tokens, 0, vocab, 0.0, False, group, fused)
    return lambda hidden, weight, labels: chunked_loss(hidden, weight, labels, head)


def measure(way: str, options: argparse.Namespace) -> dict[str, float]:
    """One way in this process: peak bytes and seconds of a forward and a backward pass, the loss."""
    from megatron_syne.platform.base import select

    platform = select(options.platform)
    import torch
    from megatron.core import parallel_state

    from megatron_syne.config.schema import ParallelConfig, PrecisionConfig
    from megatron_syne.parallel.ranks import RankInfo
    from megatron_syne.parallel.setup import start_distributed, start_model_parallel

    platform.start(0, PrecisionConfig())
    start_distributed(platform, RankInfo(0, 1, 0), 60)
    start_model_parallel(ParallelConfig(data_parallel_size=1), 1)
    group = parallel_state.get_tensor_model_parallel_group()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
    device = platform.device
    torch.manual_seed(0)
    scale = options.hidden**-0.5
    hidden = torch.randn(options.tokens, 1, options.hidden, device=device, dtype=dtype).requires_grad_()
    weight: Any = torch.nn.Parameter(
        torch.randn(options.vocab, options.hidden, dtype=dtype, device=device) * scale
    )
    weight.main_grad = torch.empty(weight.shape, device=device).fill_(
        0.0
    )  # its pages are there before the peak
    weight.grad_added_to_main_grad = False
    labels = torch.randint(0, options.vocab, (1, options.tokens), device=device)
    loss = (
        chunked(int(way), options.vocab, group, options.platform == "cuda" and options.dtype == "bf16")
        if way.isdigit()
        else whole_loss(way, group)
    )

    def step() -> Any:
        weight.grad_added_to_main_grad = False
        losses = loss(hidden, weight, labels)
        mean = losses.mean()
        mean.backward()
        if not weight.grad_added_to_main_grad:
            weight.main_grad.add_(weight.grad)
        weight.grad = hidden.grad = None
        return mean.detach()

    resting = platform.peak_memory()
    value = float(step())
    seconds = []
    for _ in range(options.steps):
        begin, used = platform.mark(), time.process_time()
        value = float(step())
        end = platform.mark()
        if options.platform == "cuda":  # an event's time is there when the GPU has come to it
            torch.cuda.synchronize()
            seconds.append(platform.seconds_between(begin, end))
        else:
            seconds.append(time.process_time() - used)
    return {
        "bytes": platform.peak_memory() - resting,
        "seconds": statistics.median(seconds),
        "loss": value,
        "gradient": float(weight.main_grad.norm()) / (options.steps + 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--platform", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    for name, default in (("tokens", 1024), ("hidden", 512), ("vocab", 128256), ("steps", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--chunks", type=int, nargs="+", default=[256])
    parser.add_argument("--way", help="measure this one here, and print JSON (an inner call)")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options)))
        return
    print(f"{options.tokens} tokens, hidden {options.hidden}, {options.vocab} columns, {options.dtype}\n")
    print(
        "| what | peak memory, MB | seconds | loss | norm of the weight's gradient |\n|---|---|---|---|---|"
    )
    for way in [*WHOLE[options.platform], *map(str, options.chunks)]:
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        done = subprocess.run(command, capture_output=True, text=True)
        name = f"chunks of {way}" if way.isdigit() else f"whole, {way}"
        if done.returncode:
            print(f"| {name} | {done.stderr.strip().splitlines()[-1]} | | | |", flush=True)
            continue
        found = json.loads(done.stdout.strip().splitlines()[-1])
        print(
            f"| {name} | {found['bytes'] / 1e6:,.0f} | {found['seconds']:.3f} | {found['loss']:.6f} "
            f"| {found['gradient']:.6f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
