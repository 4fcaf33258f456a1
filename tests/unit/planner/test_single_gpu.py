"""One GPU without a group, counted by hand: memory and speed of Llama-3-8B's layers, of its loss and of its update."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_syne.config.schema import DataConfig, MemoryConfig, ModelConfig, RunConfig, TrainConfig
from megatron_syne.models.config import resolve_model
from megatron_syne.planner import activations, costs, recompute, update
from megatron_syne.planner.hardware import GIB, GPUS
from megatron_syne.planner.memory import RankMemory, memory_by_stage
from megatron_syne.planner.model_state import SLICE_NUMBERS, adam_reads_gradients, optimizer_bytes, step_bytes
from megatron_syne.planner.speed import StepTime, step_time
from megatron_syne.planner.stacks import CUDA_PLATFORM, MEGATRON, Stack
from megatron_syne.preflight.rules import check
from megatron_syne.preflight.size import model_parameters

H100, H200 = GPUS["h100"], GPUS["h200"]
HIDDEN, FFN, QUERY, KEY, HEADS, VOCAB, TOKENS = 4096, 14336, 4096, 1024, 32, 128_256, 8192
LINEAR = HIDDEN * (2 * QUERY + 2 * KEY + 3 * FFN)
"""Numbers in a layer's matrices: 218.1 million."""
TABLE = VOCAB * HIDDEN
WHOLE = 32 * (LINEAR + 2 * HIDDEN) + 2 * TABLE + HIDDEN
"""Parameters of Llama-3-8B."""
BF16_GRADIENTS: dict[str, dict[str, Any]] = {
    "precision": {"accumulate_allreduce_grads_in_fp32": False},
    "optimizer": {"use_precision_aware_optimizer": True, "main_grads_dtype": "bf16"},
}
BF16_MOMENTS = {**BF16_GRADIENTS["optimizer"], "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform"}


def run(layers: int = 8, seq_length: int = 8192, batch: int = 1, **sections: dict[str, Any]) -> RunConfig:
    """A configuration of one GPU that the rules let pass."""
    config = RunConfig(run_dir="run", platform="cuda", data=DataConfig(mock=True, seq_length=seq_length))
    longest = max(8192, seq_length)
    config.model = ModelConfig(preset="llama3_8b", num_layers=layers, max_position_embeddings=longest)
    config.train = TrainConfig(global_batch_size=batch, train_iters=1)
    for name, fields in sections.items():
        setattr(config, name, replace(getattr(config, name), **fields))
    check(config, resolve_model(config.model), 1, "cuda")
    return config


def memory(config: RunConfig) -> RankMemory:
    (rank,) = memory_by_stage(config, resolve_model(config.model), 1, H200)
    return rank


def speed(config: RunConfig, stack: Stack = CUDA_PLATFORM, gpu: Any = H200) -> StepTime:
    return step_time(config, resolve_model(config.model), 1, gpu, stack=stack)


def software(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Another software for the memory of the CUDA platform."""
    for module in (activations, recompute):
        monkeypatch.setattr(module, "CUDA_PLATFORM", replace(CUDA_PLATFORM, **changes))


# Memory


@pytest.mark.parametrize("kind", ["native", "te"])
@pytest.mark.parametrize("fused", [False, True])
def test_eight_layers_by_hand(kind: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    software(monkeypatch, cross_entropy=kind, fused_output_gradient=fused)
    parts = memory(run()).components
    numbers = 8 * (LINEAR + 2 * HIDDEN) + 2 * TABLE + HIDDEN
    for name, size in (("parameters", 2), ("gradients", 4), ("optimizer", 12)):
        assert parts[name] == pytest.approx(size * numbers, rel=1e-6), name
    layer = 2 * (4 * HIDDEN + QUERY + 2 * KEY + QUERY + 3 * FFN) + 4 * (2 + HEADS)
    once = TOKENS * (8 + 2 * HIDDEN + 4) + 4 * TOKENS * 128  # token numbers, final norm, rotary angles
    assert parts["activations"] == 8 * TOKENS * layer + once
    held = TOKENS * (2 * HIDDEN + 13)
    if kind == "native":  # fp32 softmax and bf16 logits; then both gradients fit into its room
        expected = held + 6 * TOKENS * VOCAB
    else:  # gradient in the logits' place; with it the gradients of the input and of the weight
        expected = held + 2 * TOKENS * VOCAB + 2 * TOKENS * HIDDEN + (0 if fused else 2 * TABLE)
    assert parts["logits"] == expected
    assert parts["fp8"] == parts["communication"] == 0
    assert 60 * GIB < memory(run()).total < 66 * GIB or kind == "te"


@pytest.mark.parametrize(
    ("recipe", "scaled"), [("tensorwise", 1.0), ("delayed", 1.0), ("blockwise", 1 + 4 / 128)]
)
def test_eight_layers_in_fp8_by_hand(recipe: str, scaled: float) -> None:
    """Two FP8 copies of the layers' weights; inputs of linear layers in a byte, attention's output twice."""
    parts, plain = (memory(run(precision={"fp8": fp8})).components for fp8 in (recipe, None))
    assert parts["fp8"] == 2 * 8 * LINEAR
    for name in ("parameters", "gradients", "optimizer", "logits"):
        assert parts[name] == plain[name], name
    bf16 = 2 * (2 * HIDDEN + QUERY + 2 * KEY + QUERY + 2 * FFN) + 4 * (2 + HEADS)
    layer = bf16 + scaled * (2 * HIDDEN + QUERY + FFN)
    once = TOKENS * (8 + 2 * HIDDEN + 4) + 4 * TOKENS * 128
    assert parts["activations"] == pytest.approx(8 * TOKENS * layer + once, abs=100)


def test_the_whole_8b_on_one_gpu() -> None:
    """16 bytes a parameter, 119.7 GiB, with fp32 moments; 12, 89.8, with bf16 ones: both fit an H200, none an H100."""
    assert model_parameters(resolve_model(ModelConfig(preset="llama3_8b"))) == WHOLE
    saving = {**FULL, "loss_chunk_tokens": 2048}
    for optimizer, size in ((BF16_GRADIENTS["optimizer"], 16), (BF16_MOMENTS, 12)):
        rank = memory(run(32, memory=saving, precision=BF16_GRADIENTS["precision"], optimizer=optimizer))
        parts = rank.components
        held = sum(parts[name] for name in ("parameters", "gradients", "optimizer"))
        # copies of bf16 moments, of the embedding at most, have the room of what is gone by then, and little more
        room = parts["activations"] + parts["logits"]
        beyond = max(0, 2 * 4 * TABLE - room) if size == 12 else 0
        assert held == pytest.approx(size * WHOLE + beyond, rel=1e-5)
        assert beyond < 0.1 * GIB
        # inputs of 32 layers, and one layer computed again: 2.0 and 1.2 GiB; parts of the loss 0.6
        assert 3 * GIB < parts["activations"] + parts["logits"] < 5 * GIB
        assert H100.memory_bytes < rank.total < 0.92 * H200.memory_bytes
    assert memory(run(32, memory=saving)).total > 0.99 * H200.memory_bytes  # 18 bytes


def test_a_step_copies_what_is_not_fp32() -> None:
    """Moments slice by slice; bf16 gradients whole where the engine keeps the masters (FP8 weights)."""
    fp8 = {**BF16_GRADIENTS["precision"], "fp8": "tensorwise"}
    assert step_bytes(WHOLE, run(), True) == 0
    fp32 = run(**BF16_GRADIENTS)
    assert adam_reads_gradients(fp32, True) and step_bytes(WHOLE, fp32, True) == 0
    moments = run(precision=BF16_GRADIENTS["precision"], optimizer=BF16_MOMENTS)
    assert step_bytes(WHOLE, moments, True, TABLE) == 2 * 4 * TABLE
    assert step_bytes(WHOLE, moments, True, 1000) == 2 * 4 * SLICE_NUMBERS
    assert step_bytes(1000, moments, True) == 2 * 4 * 1000
    assert step_bytes(WHOLE, moments) == 0  # the CPU platform's Adam goes parameter by parameter
    gathered = {**fp8, "fp8_param_gather": True}
    kept = run(precision=gathered, optimizer=BF16_GRADIENTS["optimizer"])
    assert not adam_reads_gradients(kept, True) and step_bytes(WHOLE, kept, True) == 4 * WHOLE
    delayed = run(precision={**gathered, "fp8": "delayed"}, optimizer=BF16_GRADIENTS["optimizer"])
    halves = run(precision=gathered, optimizer={**BF16_GRADIENTS["optimizer"], "main_params_dtype": "fp16"})
    assert step_bytes(WHOLE, delayed, True) == 0
    assert step_bytes(WHOLE, halves, True, TABLE) == 4 * TABLE


def test_what_is_stepped_on_the_gpu_beside_the_host_keeps_fp32_gradients() -> None:
    """4 bytes more for each number there, where gradients are bf16; 12 where they are fp32."""
    away = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.7}
    bf16 = run(
        precision=BF16_GRADIENTS["precision"], optimizer={**BF16_GRADIENTS["optimizer"], **away}
    ).optimizer
    numbers = 1_000_000
    for precision, width in ((BF16_GRADIENTS["precision"], 16), ({}, 12)):
        config = run(
            precision=precision, optimizer={**vars(bf16), "main_grads_dtype": "bf16" if precision else "fp32"}
        )
        assert optimizer_bytes(numbers, config) == pytest.approx(0.3 * width * numbers, abs=1)
        assert step_bytes(numbers, config, True) == 0


def test_slices_are_the_platforms() -> None:
    slices = pytest.importorskip("megatron_syne.platform.adam_slices")
    assert slices.SLICE_NUMBERS == SLICE_NUMBERS


@pytest.mark.parametrize("chunk", [1024, 4096, 8192, 100_000])
def test_loss_in_parts_by_hand(chunk: int) -> None:
    """One part's logits and all tokens' input gradient; nothing for the weight's; never more than all tokens."""
    parts = memory(run(memory={"loss_chunk_tokens": chunk})).components
    part = min(chunk, TOKENS)
    assert parts["logits"] == TOKENS * (2 * HIDDEN + 17) + 2 * part * VOCAB + 2 * TOKENS * HIDDEN
    assert parts["logits"] < memory(run()).components["logits"]


def test_32768_tokens_fit() -> None:
    """Their logits are 8.4 GB in bf16; in parts the last layer's backward pass is the peak."""
    whole = memory(run(4, 32768))
    parts = memory(run(4, 32768, memory={"loss_chunk_tokens": 4096}))
    tokens = 32768
    kept = tokens * (4 * 139_400 + 8 + 4 * 128)
    way = 2 * tokens * (3 * FFN + 3 * HIDDEN)  # gradients in the last layer, while nothing of it is free yet
    assert parts.components["activations"] + parts.components["logits"] == kept + way
    assert parts.total < 60 * GIB < H100.memory_bytes
    assert whole.components["logits"] > 2 * tokens * VOCAB > 5 * parts.components["logits"]


# Speed


def test_one_gpu_talks_to_nobody() -> None:
    parts = speed(run(batch=4)).parts
    silent = (
        "tp communication",
        "cp communication",
        "dp communication",
        "pipeline bubble",
        "pipeline communication",
    )
    assert all(parts[name] == 0 for name in silent)
    assert parts["optimizer"] == speed(run()).parts["optimizer"] > 0


def adam(config: RunConfig) -> int:
    return update.adam_bytes(config)


def test_the_update_by_hand() -> None:
    """Bytes for a parameter. Without the precision-aware optimizer: norm 4, gradient 4, master and moments 24, master
    read again and weight written 6. With it the norm and Adam read bf16 gradients, and the weight is written."""
    assert adam(run()) == 4 + 4 + 24 + 6
    assert adam(run(precision={"accumulate_allreduce_grads_in_fp32": False})) == 38 + 2 + 4
    assert adam(run(**BF16_GRADIENTS)) == 2 + 2 + 24 + 2
    assert adam(run(precision=BF16_GRADIENTS["precision"], optimizer=BF16_MOMENTS)) == 2 + 2 + 2 * 24 + 8 + 2
    numbers = 8 * (LINEAR + 2 * HIDDEN) + 2 * TABLE + HIDDEN
    moved = numbers * (38 + 3 * 4)  # and over the number of tokens, and cleared
    seconds = speed(run()).parts["optimizer"]
    assert seconds == pytest.approx(moved / (0.85 * 4.8e12), rel=1e-6)
    assert speed(run(), gpu=H100).parts["optimizer"] == pytest.approx(seconds * 4.8 / 3.35)


def test_loss_moves_what_its_kernels_touch() -> None:
    logits = TOKENS * VOCAB

    def elementwise(kind: str) -> float:
        return speed(run(), replace(CUDA_PLATFORM, cross_entropy=kind)).parts["elementwise"]  # type: ignore[arg-type]

    assert elementwise("native") - elementwise("te") == pytest.approx(20 * logits / (0.85 * 4.8e12), rel=1e-6)


@pytest.mark.parametrize("train", [{"deterministic_mode": True}, {"z_loss": 1e-5}])
def test_where_the_loss_is_the_engines_own(train: dict[str, Any]) -> None:
    """fp32 logits then, in memory and in what is moved."""
    own, plain = run(), run()
    own.train = replace(own.train, **train)
    assert memory(own).components["logits"] >= TOKENS * (2 * HIDDEN + 13 + 6 * VOCAB)
    assert memory(plain).components["logits"] < TOKENS * 6 * VOCAB
    more = speed(own).parts["elementwise"] - speed(plain).parts["elementwise"]
    assert more == pytest.approx(20 * TOKENS * VOCAB / (0.85 * 4.8e12), rel=1e-6)


def test_loss_in_parts_computes_the_logits_once_more() -> None:
    """In one part: one product of 2 x hidden x vocabulary a token more than whole; model FLOPs stay."""
    stack = replace(MEGATRON, fused_output_gradient=True, cross_entropy="te")
    whole, once, often = (
        speed(run(memory={"loss_chunk_tokens": chunk} if chunk else {}), stack)
        for chunk in (None, TOKENS, 1024)
    )
    rank = costs.rank_of(run(), resolve_model(run().model), H200, stack)
    product = costs.product(rank, TOKENS, VOCAB, HIDDEN, False)
    assert product > 2 * HIDDEN * VOCAB * TOKENS / (stack.bf16_share * H200.bf16_flops)
    assert once.parts["matrices"] - whole.parts["matrices"] == pytest.approx(product, rel=1e-9)
    # eight parts read and write the weight's fp32 gradient, and read the weight, seven times more
    again = 7 * TABLE * (8 + 3 * 2) / (0.85 * 4.8e12)
    extra = often.parts["matrices"] - once.parts["matrices"]
    assert extra == pytest.approx(again, rel=0.2)
    assert once.model_flops_per_token == whole.model_flops_per_token


def test_gradients_are_added_where_they_lie() -> None:
    """fp32 buffers cost 8 bytes for each weight and micro-batch, bf16 ones 4; beside the product 4 more."""
    both = [replace(CUDA_PLATFORM, fused_layer_gradients=f, fused_output_gradient=f) for f in (True, False)]
    weights, rate = 8 * LINEAR + TABLE, 0.85 * 4.8e12

    def matrices(stack: Stack, **sections: dict[str, Any]) -> float:
        return speed(run(**sections), stack).parts["matrices"]

    fused, apart = (matrices(stack) for stack in both)
    assert apart - fused == pytest.approx(4 * weights / rate, rel=1e-6)
    assert fused - matrices(both[0], **BF16_GRADIENTS) == pytest.approx(4 * weights / rate, rel=1e-6)


def test_a_recipe_with_its_own_share() -> None:
    stack = replace(CUDA_PLATFORM, recipe_shares={"blockwise": 0.4})
    for recipe, slower in (("blockwise", True), ("tensorwise", False)):
        config = run(precision={"fp8": recipe})
        assert (speed(config, stack).seconds > speed(config).seconds) == slower


def test_fp8_gains_less_where_less_of_a_step_is_in_layers() -> None:
    """The output layer, attention and the update stay: more layers and more micro-batches gain more."""

    def gain(layers: int, batch: int) -> float:
        plain, fp8 = (
            speed(run(layers, batch=batch, precision={"fp8": r})).seconds for r in (None, "tensorwise")
        )
        return plain / fp8

    assert 1 < gain(8, 1) < gain(8, 8) < gain(32, 8) < MEGATRON.fp8_share * 2 / MEGATRON.bf16_share


def test_long_sequences_are_attention() -> None:
    """Its work grows as the square: four times the tokens, sixteen times the attention."""
    short, long = (speed(run(4, seq, memory={"loss_chunk_tokens": 4096})) for seq in (8192, 32768))
    assert long.parts["attention"] == pytest.approx(16 * short.parts["attention"])
    assert long.parts["attention"] / long.seconds > 0.25
    assert MemoryConfig().loss_chunk_tokens is None
