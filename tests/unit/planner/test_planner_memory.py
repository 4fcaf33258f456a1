"""The planner's bytes against published totals, hand-made sums and what must hold of any layout."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_syne.config.schema import DataConfig, ModelConfig, ParallelConfig, RunConfig, StageConfig
from megatron_syne.errors import ConfigError
from megatron_syne.models.config import resolve_model
from megatron_syne.planner.hardware import GIB, GPUS, gpu_named, gpu_of_device
from megatron_syne.planner.in_flight import Chunk, peak_bytes, schedule
from megatron_syne.planner.memory import COMPONENTS, NCCL_BYTES, RankMemory, memory_by_stage
from megatron_syne.planner.recompute import Unit
from megatron_syne.preflight.rules import check
from megatron_syne.preflight.size import model_parameters, stage_parameters

H100 = GPUS["h100"]
SMALL: dict[str, Any] = {
    "model_type": "llama",
    "num_layers": 8,
    "hidden_size": 256,
    "ffn_hidden_size": 512,
    "num_attention_heads": 8,
    "num_query_groups": 8,
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
    "layernorm_epsilon": 1e-5,
    "rotary_base": 5e5,
    "share_embeddings_and_output_weights": False,
}
UNIFORM = {"recompute_granularity": "full", "recompute_method": "uniform"}
BF16_GRADS = {"accumulate_allreduce_grads_in_fp32": False}


def planned(
    world: int = 1,
    gpu: str | None = "h100",
    model: str | dict[str, Any] = "llama3_8b",
    seq_length: int = 8192,
    **sections: Any,
) -> list[RankMemory]:
    """The plan of a configuration that the rules let pass; ``sections``: changed fields by section."""
    config = RunConfig(run_dir="run", data=DataConfig(mock=True, seq_length=seq_length))
    config.model = ModelConfig(preset=model) if isinstance(model, str) else ModelConfig(**model)
    train = {"global_batch_size": 128, "train_iters": 1} | sections.pop("train", {})
    for name, fields in (*sections.items(), ("train", train)):
        setattr(config, name, replace(getattr(config, name), **fields))
    resolved = resolve_model(config.model)
    check(config, resolved, world, "cpu" if gpu is None else "cuda")
    return memory_by_stage(config, resolved, world, None if gpu is None else GPUS[gpu])


def state(rank: RankMemory) -> int:
    return sum(rank.components[name] for name in ("parameters", "gradients", "optimizer"))


# --- known totals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world", "sections", "per_parameter"),
    [
        (8, {"parallel": {"use_distributed_optimizer": False}}, 18),
        (8, {}, 6 + 12 / 8),
        (64, {}, 6 + 12 / 64),
        (1, {"precision": {"params_dtype": "fp32"}}, 16),
        (
            8,
            {"parallel": {"use_distributed_optimizer": False}, "precision": BF16_GRADS},
            16,
        ),
    ],
)
def test_bytes_per_parameter_are_the_published_ones(
    world: int, sections: dict[str, Any], per_parameter: float
) -> None:
    """Megatron-Bridge: 18 bytes, 6 + 12 / shard with the distributed optimizer."""
    (rank,) = planned(world, **sections)
    expected = per_parameter * model_parameters(resolve_model(ModelConfig(preset="llama3_8b")))
    # without the distributed optimizer its fp32 copies of bf16 gradients go beyond the room of the activations
    beyond = 0
    if "precision" in sections and sections["precision"] == BF16_GRADS:
        room = rank.components["activations"] + rank.components["logits"]
        beyond = max(0, int(4 / 16 * expected) - room)
    assert state(rank) - beyond == pytest.approx(expected, rel=1e-6)


PUBLISHED: dict[str, tuple[int, str, dict[str, Any], dict[str, Any]]] = {
    "8B bf16, TP1 PP1 CP2, 8 GPUs (dgxc-benchmarking 25.02)": (
        8, "llama3_8b", {"context_parallel_size": 2}, BF16_GRADS),
    "8B FP8, the same (NeMo 24.12)": (
        8, "llama3_8b", {"context_parallel_size": 2}, {"fp8": "delayed", **BF16_GRADS}),
    "70B bf16, TP4 PP4 CP2 VP5, 64 GPUs (dgxc-benchmarking 25.02)": (
        64, "llama3_70b",
        {"tensor_model_parallel_size": 4, "sequence_parallel": True, "pipeline_model_parallel_size": 4,
         "context_parallel_size": 2, "virtual_pipeline_model_parallel_size": 5}, BF16_GRADS),
    "70B FP8, TP4 PP8 VP5, 64 GPUs (Megatron-Bridge 26.04)": (
        64, "llama3_70b",
        {"tensor_model_parallel_size": 4, "sequence_parallel": True, "pipeline_model_parallel_size": 8,
         "virtual_pipeline_model_parallel_size": 5}, {"fp8": "tensorwise", **BF16_GRADS}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layouts_fit_an_h100(name: str) -> None:
    """They ran, with gradients in bf16 as NVIDIA's performance recipes have them."""
    world, model, parallel, precision = PUBLISHED[name]
    stages = planned(
        world, model=model, parallel=parallel, precision=precision, train={"global_batch_size": 256}
    )
    fullest = max(rank.total for rank in stages)
    print(f"{name}: {fullest / GIB:.1f} GiB")
    assert 0.5 * H100.memory_bytes < fullest < H100.memory_bytes


def test_a_70b_model_does_not_fit_where_it_cannot() -> None:
    parallel = {"tensor_model_parallel_size": 8, "sequence_parallel": True}
    (rank,) = planned(8, model="llama3_70b", parallel=parallel)
    assert rank.components["parameters"] + rank.components["gradients"] > 0.6 * H100.memory_bytes
    assert rank.total > H100.memory_bytes


def test_activations_of_a_layer_by_hand() -> None:
    """Llama-3 8B, bf16, Transformer Engine: bytes per token and layer, counted off the module's table."""
    hidden, ffn, query, key, heads = 4096, 14336, 4096, 1024, 32
    layer = 2 * (4 * hidden + (query + 2 * key) + query + 3 * ffn) + 4 * (2 + heads)
    assert layer == 139_400
    tokens = 8192
    (rank,) = planned()
    rest = tokens * (8 + 2 * hidden + 4) + 4 * tokens * 128  # token numbers, final norm, rotary angles
    assert rank.components["activations"] == 32 * tokens * layer + rest
    # bf16 logits, the output layer's input and 13 bytes a token of labels and masks; gradients of input and weight
    gradients = 2 * hidden * (tokens + 128_256)
    assert rank.components["logits"] == tokens * (2 * 128_256 + 2 * hidden + 13) + gradients


def test_what_recomputation_leaves_by_hand() -> None:
    """Llama-3 8B with Transformer Engine: ``mlp`` takes its norm along; ``full`` leaves the input of each layer."""
    hidden, ffn, tokens = 4096, 14336, 8192
    mlp = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    kept, some, full = (planned(memory=m)[0].components["activations"] for m in ({}, mlp, UNIFORM))
    assert kept - some == 32 * tokens * (2 * hidden + 4 + 6 * ffn)
    rest = tokens * (8 + 2 * hidden + 4) + 4 * tokens * 128
    assert full == 32 * tokens * 2 * hidden + rest  # a layer computed again fits into the room of the logits
    norms = {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}
    assert planned(memory=norms)[0].components["activations"] == kept


# --- components --------------------------------------------------------------------------------------------


def test_all_components_are_there_and_only_a_gpu_has_a_margin() -> None:
    for gpu in ("h100", None):
        (rank,) = planned(gpu=gpu, model=SMALL, seq_length=512)
        assert tuple(rank.components) == COMPONENTS
        assert rank.total == sum(rank.components.values())
        assert (rank.components["margin"] > 0) == (gpu is not None)
    two = planned(2, model=SMALL, seq_length=512)[0].components["margin"]
    one = planned(1, model=SMALL, seq_length=512)[0].components["margin"]
    assert two - one == NCCL_BYTES[2]


def linear_numbers() -> int:
    model = resolve_model(ModelConfig(preset="llama3_8b"))
    tables = 2 * 128_256 * 4096
    return model_parameters(model) - tables - 65 * 4096


@pytest.mark.parametrize(
    ("gpu", "precision", "copies", "weights"),
    [
        ("h100", {"fp8": "delayed"}, 2, 0),
        ("h100", {"fp8": "blockwise"}, 2, 0),
        ("b200", {"fp8": "delayed"}, 1, 0),
        ("h100", {"fp8": "delayed", "fp8_param_gather": True}, 1, 1),
    ],
)
def test_fp8_copies(gpu: str, precision: dict[str, Any], copies: int, weights: int) -> None:
    (plain,) = planned(8, gpu=gpu)
    (rank,) = planned(8, gpu=gpu, precision=precision)
    assert rank.components["fp8"] == copies * linear_numbers()
    assert plain.components["parameters"] - rank.components["parameters"] == weights * linear_numbers()
    assert rank.components["activations"] < plain.components["activations"]
    assert plain.components["fp8"] == 0


def test_layers_in_bf16_have_no_fp8_copies() -> None:
    (rank,) = planned(8, precision={"fp8": "tensorwise", "first_last_layers_bf16": True})
    assert rank.components["fp8"] == 2 * linear_numbers() * 30 // 32


def test_the_optimizer_in_fewer_bits_and_on_the_host() -> None:
    aware: dict[str, Any] = {"use_precision_aware_optimizer": True}
    full = planned(8)[0].components["optimizer"]
    least = {**aware, "exp_avg_dtype": "fp8", "exp_avg_sq_dtype": "bf16", "main_params_dtype": "fp16"}
    assert planned(8, optimizer=least)[0].components["optimizer"] == full * 5 // 12
    half = {**aware, "optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}
    assert planned(8, optimizer=half)[0].components["optimizer"] == full // 2
    away = {**aware, "optimizer_cpu_offload": True}
    assert planned(8, optimizer=away)[0].components["optimizer"] == 0


def test_what_is_frozen_has_neither_gradients_nor_state() -> None:
    only = {"train_only": ["output_layer.*"]}
    (rank,) = planned(optimizer=only)
    table = 128_256 * 4096
    assert rank.components["gradients"] == 4 * table
    assert rank.components["optimizer"] == 12 * table
    assert rank.components["parameters"] == planned()[0].components["parameters"]


def test_parameters_are_those_of_each_stage() -> None:
    parallel: dict[str, Any] = {"pipeline_model_parallel_size": 4, "tensor_model_parallel_size": 2}
    for tied in (False, True):
        model = {**SMALL, "share_embeddings_and_output_weights": tied}
        ranks = planned(8, model=model, seq_length=512, parallel=parallel)
        counts = stage_parameters(resolve_model(ModelConfig(**model)), ParallelConfig(**parallel))
        assert [rank.components["parameters"] // 2 for rank in ranks] == counts
        assert [rank.stage for rank in ranks] == [0, 1, 2, 3]


def test_a_run_of_stages_takes_what_its_largest_takes() -> None:
    config = RunConfig(run_dir="run", data=DataConfig(mock=True, seq_length=512))
    config.model = ModelConfig(**SMALL)
    model = resolve_model(config.model)
    staged = replace(config, data=replace(config.data, mock=False, seq_length=64))
    staged.data.stages = [
        StageConfig(name="short", tokens=1, mixture={"a": 1.0}, seq_length=64),
        StageConfig(name="long", tokens=1, mixture={"a": 1.0}, seq_length=512),
    ]
    assert memory_by_stage(staged, model, 1, H100) == memory_by_stage(config, model, 1, H100)
    staged.data.stages.pop()
    assert memory_by_stage(staged, model, 1, H100)[0].total < memory_by_stage(config, model, 1, H100)[0].total


def test_layers_offloaded_to_the_host_keep_the_rest() -> None:
    (kept,) = planned()
    (some,) = planned(memory={"cpu_offloading": True, "cpu_offloading_num_layers": 16})
    (most,) = planned(memory={"cpu_offloading": True})
    assert most.components["activations"] < some.components["activations"] < kept.components["activations"]


def test_core_attention_recomputed_spares_little_and_costs_with_transformer_engine() -> None:
    """Attention keeps no scores any more: what is told of it in the module holds."""
    again = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    fp32 = {"params_dtype": "fp32"}
    cpu = [
        planned(gpu=None, model=SMALL, seq_length=512, memory=m, precision=fp32)[0].total for m in ({}, again)
    ]
    gpu = [planned(memory=m)[0].components["activations"] for m in ({}, again)]
    assert 0.97 * cpu[0] < cpu[1] < cpu[0]
    assert gpu[0] < gpu[1]


# --- what must hold of any layout ----------------------------------------------------------------------------

layouts = st.fixed_dictionaries(
    {
        "tensor_model_parallel_size": st.sampled_from([1, 2, 4]),
        "pipeline_model_parallel_size": st.sampled_from([1, 2, 4]),
        "context_parallel_size": st.sampled_from([1, 2]),
        "data_parallel_size": st.sampled_from([1, 2, 4]),
        "sequence_parallel": st.booleans(),
        "use_distributed_optimizer": st.booleans(),
    }
)
gpus = st.sampled_from(["h100", None])
platforms = st.sampled_from([("h100", "bf16"), (None, "bf16"), (None, "fp32")])


def tensors(gpu: str | None, parallel: dict[str, Any], **sections: Any) -> list[int]:
    """Per stage, bytes of tensors that are not there for collectives."""
    world = 1
    for name in ("tensor_model", "pipeline_model", "context", "data"):
        world *= parallel[f"{name}_parallel_size"]
    parallel = {**parallel}
    parallel["sequence_parallel"] = (
        parallel["sequence_parallel"] and parallel["tensor_model_parallel_size"] > 1
    )
    ranks = planned(world, gpu, SMALL, sections.pop("seq_length", 512), parallel=parallel, **sections)
    outside = ("margin", "communication")
    return [rank.total - sum(rank.components[name] for name in outside) for rank in ranks]


def never_more(less: list[int], more: list[int]) -> bool:
    return all(a <= b for a, b in zip(less, more, strict=True))


@settings(max_examples=40, deadline=None)
@given(parallel=layouts, platform=platforms)
def test_more_recomputation_is_never_more_memory(
    parallel: dict[str, Any], platform: tuple[str | None, str]
) -> None:
    gpu, dtype = platform
    mlp = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    block = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1}
    precision = {"params_dtype": dtype}
    none, some, one, full = (
        tensors(gpu, parallel, memory=memory, precision=precision) for memory in ({}, mlp, block, UNIFORM)
    )
    assert never_more(some, none)
    assert never_more(one, none)
    assert never_more(full, one)
    assert sum(full) < sum(none)


@settings(max_examples=40, deadline=None)
@given(parallel=layouts, platform=platforms, again=st.sampled_from([{}, UNIFORM]))
def test_more_ranks_are_never_more_memory(
    parallel: dict[str, Any], platform: tuple[str | None, str], again: dict[str, Any]
) -> None:
    gpu, dtype = platform
    sections: dict[str, Any] = {"memory": again, "precision": {"params_dtype": dtype}}
    here = tensors(gpu, parallel, **sections)
    axes = ["tensor_model_parallel_size", "data_parallel_size"]
    if gpu is not None:
        axes.append("context_parallel_size")  # on a CPU each rank gathers all keys, and needs masks
    for axis in axes:
        there = tensors(gpu, {**parallel, axis: 2 * parallel[axis]}, **sections)
        assert never_more(there, here), axis


@settings(max_examples=40, deadline=None)
@given(parallel=layouts, gpu=gpus, again=st.sampled_from([{}, UNIFORM]))
def test_more_tokens_and_fewer_shards_are_more_memory(
    parallel: dict[str, Any], gpu: str | None, again: dict[str, Any]
) -> None:
    here = tensors(gpu, parallel, memory=again)
    longer = tensors(gpu, parallel, memory=again, seq_length=1024)
    larger = tensors(gpu, parallel, memory=again, train={"micro_batch_size": 2})
    assert all(a < b for a, b in zip(here, longer, strict=True))
    assert all(a < b for a, b in zip(here, larger, strict=True))


# --- schedules -----------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 12), st.data())
def test_every_pass_has_its_place(stages: int, chunks: int, count: int, data: st.DataObject) -> None:
    if stages == 1:
        chunks = 1
    if chunks > 1:
        count *= stages  # as the engine asks for
    stage = data.draw(st.integers(0, stages - 1))
    passes = list(schedule(stage, stages, chunks, count))
    assert Counter(passes) == {(way, c): count for way in (True, False) for c in range(chunks)}
    under_way = [0] * chunks
    most = 0
    for forward, chunk in passes:
        under_way[chunk] += 1 if forward else -1
        assert under_way[chunk] >= 0
        most = max(most, sum(under_way))
    ahead = stages - stage - 1 if chunks == 1 else 2 * (stages - stage - 1) + (chunks - 1) * stages
    assert most == min(ahead + 1, count * chunks)


@given(st.integers(2, 5), st.integers(1, 3), st.integers(4, 9), st.data())
def test_a_few_groups_show_the_peak_of_many(
    stages: int, chunks: int, groups: int, data: st.DataObject
) -> None:
    """The peak is sought in three groups of micro-batches; played through in full it is the same."""
    stage = data.draw(st.integers(0, stages - 1))
    sizes = [data.draw(st.integers(1, 9)) for _ in range(chunks)]
    live = most = 0
    for forward, chunk in schedule(stage, stages, chunks, groups * stages):
        live += sizes[chunk] if forward else -sizes[chunk]
        most = max(most, live)
    parts = [Chunk([Unit(size)], 0, 0) for size in sizes]
    assert peak_bytes(parts, stage, stages, groups * stages, True, 0) == most


# --- GPUs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA H20", None),
        ("NVIDIA H200 NVL", None),
        ("Tesla V100-SXM2-16GB", None),
        ("", None),
    ],
)
def test_devices_are_known_by_torchs_names(device: str, name: str | None) -> None:
    found = gpu_of_device(device)
    assert (None if found is None else found.name) == name


def test_an_unknown_gpu_is_refused_with_the_known_ones() -> None:
    assert gpu_named("h200") is GPUS["h200"]
    with pytest.raises(ConfigError, match=r"'h300' is unknown; known: h100, .*b200"):
        gpu_named("h300")


def test_rates_are_without_sparsity_and_memory_is_less_than_the_name_says() -> None:
    for gpu in GPUS.values():
        assert gpu.fp8_flops in (0.0, pytest.approx(2 * gpu.bf16_flops, rel=0.02))
        assert gpu.memory_bytes < 192 * GIB
    assert H100.memory_bytes < 80 * GIB
