"""One thing changed, beside a case where it is not: each with what it is expected to do (as in ``goal_cases``)."""

from __future__ import annotations

from dataclasses import replace

from case import BF16_GRADIENTS, BF16_MOMENTS, CHUNKED_LOSS, FULL_RECOMPUTE, Case
from goal_cases import MAIN


def _change(
    name: str, prediction: str, baseline: str = "8l-bf16", minutes: float = 1.5, **more: object
) -> Case:
    """A change of one thing: everything else is the baseline's."""
    base = next(case for case in MAIN if case.name == baseline)
    return replace(
        base,
        name=name,
        baseline=baseline,
        prediction=prediction,
        minutes=minutes,
        **more,  # type: ignore[arg-type]
    )


CHANGES = (
    _change(
        "bf16-accumulate-2",
        "+6 % tokens/s: one update (0.027 s) for two micro-batches",
        global_batch_size=2,
        steps=20,
    ),
    _change(
        "bf16-loss-chunks",
        "5 % slower (logits computed twice: 8.6e12 FLOPs, 0.012 s); peak 1.6 GB lower: whole there are 2.1 GB of bf16 "
        "logits, in parts 0.5",
        overrides=CHUNKED_LOSS,
    ),
    _change(
        "bf16-loss-native",
        "1.5 % slower than Transformer Engine's: passes in fp32 (20 GB, 5 ms) against three over bf16 logits (6.3 GB, "
        "1.6 ms); +4.2 GB, the softmax in fp32",
        engine=(("cross_entropy_loss_fusion", True), ("cross_entropy_fusion_impl", "native")),
    ),
    _change(
        "bf16-loss-unfused",
        "4 % slower: eager passes over fp32 logits (40 GB, 10 ms); +8 GB",
        engine=(("cross_entropy_loss_fusion", False),),
    ),
    _change(
        "bf16-bf16-gradients",
        "3 % faster: 6 bytes less a parameter written, read and cleared (17 GB, 4 ms), and 5.6 GB less memory",
        overrides=BF16_GRADIENTS,
    ),
    replace(
        _change(
            "bf16-bf16-moments",
            "8 % slower: copies to fp32 and back, 32 bytes for each of 2.8e9 parameters, 0.022 s; 11 GB less at rest",
            overrides=(*BF16_GRADIENTS, *BF16_MOMENTS),
        ),
        baseline="bf16-bf16-gradients",
    ),
    _change(
        "tensorwise-param-gather",
        "1 % faster (weights cast once, by the optimizer), 1.7 GB less: no bf16 copy of the layers' weights",
        baseline="8l-tensorwise",
        overrides=("precision.fp8_param_gather=true",),
    ),
    _change(
        "tensorwise-ends-bf16",
        "5 % slower: 2 of 8 layers lose the gain of FP8 (0.010 s)",
        baseline="8l-tensorwise",
        overrides=("precision.first_last_layers_bf16=true",),
    ),
    _change(
        "tensorwise-accumulate-2",
        "+8 % tokens/s: update and the cast of the weights once for two micro-batches",
        baseline="8l-tensorwise",
        global_batch_size=2,
        steps=20,
    ),
    _change(
        "bf16-accumulate-8",
        "+14 % tokens/s, as training has it: one update for eight micro-batches",
        global_batch_size=8,
        steps=10,
        warm=3,
        minutes=2.0,
    ),
    replace(
        _change(
            "tensorwise-accumulate-8",
            "x1.29 of bf16 with eight micro-batches: the layers' products are a larger part of the step",
            baseline="8l-tensorwise",
            global_batch_size=8,
            steps=10,
            warm=3,
            minutes=2.0,
        ),
        baseline="bf16-accumulate-8",
    ),
    _change(
        "bf16-fused-qkv-rope",
        "0.5 % faster: the gradients of queries, keys and values are not put together once more (0.1 GB a layer)",
        engine=(("fused_single_qkv_rope", True),),
    ),
    _change(
        "bf16-no-wgrad-fusion",
        "1 % slower: 4 bytes more for each of 1.7e9 weights (7 GB, 2 ms)",
        engine=(("gradient_accumulation_fusion", False),),
    ),
    _change(
        "bf16-no-swiglu-fusion",
        "2 % slower: silu and product apart, 2.5 GB more a layer (5 ms)",
        engine=(("bias_activation_fusion", False),),
    ),
    _change(
        "bf16-no-rope-fusion",
        "2 % slower: seven more passes over queries and keys, 2.3 GB a layer (5 ms)",
        engine=(("apply_rope_fusion", False),),
    ),
    _change(
        "bf16-cuda-graphs",
        "below 1 % faster: at 8,192 tokens the GPU is never waited for; costs 1 GB of pools",
        engine=(("cuda_graph_impl", "local"), ("use_te_rng_tracker", True)),
        minutes=1.5,
    ),
    _change(
        "bf16-two-of-4096",
        "+5 % tokens/s: half of the attention (6.6e12 FLOPs less, 0.016 s), all else the same",
        seq_length=4096,
        micro_batch_size=2,
        global_batch_size=2,
    ),
    _change(
        "bf16-micro-batch-2",
        "+6 % tokens/s, as accumulation (larger products are no faster); activations double (+11 GB)",
        micro_batch_size=2,
        global_batch_size=2,
        needs_gib=90,
        steps=20,
    ),
    _change(
        "bf16-deterministic",
        "3 % slower: attention's backward pass without atomic additions (+0.007 s)",
        overrides=("train.deterministic_mode=true",),
    ),
    _change(
        "bf16-norms-each-step",
        "2.5 % slower: weights and gradients read once more, 8 bytes for each of 2.8e9 parameters (22 GB, 6 ms)",
        overrides=("monitor.norms_interval=1",),
    ),
    _change(
        "bf16-unwatched",
        "below 0.3 % faster: tensorboard, the console and norms every 10th step are all that is left out",
        overrides=("monitor.tensorboard=false", "monitor.progress=false", "monitor.norms_interval=null"),
    ),
    _change(
        "bf16-plain-optimizer",
        "nothing in time; the buffers of the sharded optimizer are gone",
        overrides=("parallel.use_distributed_optimizer=false",),
    ),
    _change(
        "bf16-recompute-full",
        "23 % slower (layers' forward pass once more: 0.041 s of products, 0.009 of attention, 0.004 elementwise), "
        "8 GiB less",
        overrides=FULL_RECOMPUTE,
    ),
)
"""A/B: each with what it was expected to do."""
