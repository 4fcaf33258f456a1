"""The planner's speeds against published ones, its pipeline against megatron-core's, its parts against each other."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_syne.config.schema import (
    DataConfig,
    MemoryConfig,
    ModelConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    TrainConfig,
)
from megatron_syne.models.config import resolve_model
from megatron_syne.monitor.speed import peak_flops
from megatron_syne.parallel.topology import chunk_layers
from megatron_syne.planner import costs, update
from megatron_syne.planner.calibration import FITTED, IN_USE, accuracy, error, fit
from megatron_syne.planner.hardware import GPUS
from megatron_syne.planner.model_state import rank_parameters
from megatron_syne.planner.published import ROWS
from megatron_syne.planner.speed import PARTS, StepTime, step_time
from megatron_syne.planner.stacks import CUDA_PLATFORM, MEGATRON, TORCHTITAN, TORCHTITAN_EAGER
from megatron_syne.planner.timeline import Task, pipeline_seconds, stage_order, timeline, warmup_forwards
from megatron_syne.preflight.size import model_parameters

H100 = GPUS["h100"]


# Published rows


def errors(*uses: str) -> list[float]:
    return [abs(error(row)) for row in ROWS if row.use in uses]


def test_speeds_of_llama3_on_h100_are_predicted() -> None:
    counted = errors("fitted", "unfitted")
    assert len(counted) == 21
    assert statistics.median(counted) <= 0.07
    assert max(counted) <= 0.15


def test_most_rows_are_predictions_and_as_good_without_the_fitted() -> None:
    unfitted = errors("unfitted")
    assert len(unfitted) >= len(errors("fitted"))
    assert statistics.median(unfitted) <= 0.07
    assert max(unfitted) <= 0.15
    assert accuracy() == (statistics.median(unfitted), max(unfitted), len(unfitted))


def test_counted_rows_are_8b_and_70b_on_h100() -> None:
    for row in ROWS:
        if row.use != "extra":
            assert row.preset in ("llama3_8b", "llama3_70b")
            assert row.gpu.bf16_flops == H100.bf16_flops and row.seq_length == 8192


def test_constants_are_what_their_rows_give() -> None:
    """The rows that give one constant each are met; the two TP 8 rows of one constant are missed to both sides."""
    missed = {row.name: error(row) for row in ROWS if row.use == "fitted"}
    pair = [missed.pop(f"{size} bf16 torchtitan TP8") for size in ("8B", "70B")]
    assert all(abs(one) < 0.002 for one in missed.values())
    assert abs(sum(pair)) < 0.005 and min(pair) < 0 < max(pair)
    assert fit() == pytest.approx(IN_USE, abs=0.001)
    assert {name for names in FITTED.values() for name in names} == {
        row.name for row in ROWS if row.use == "fitted"
    }


def test_constants_are_shares_that_kernels_reach() -> None:
    for stack in (MEGATRON, CUDA_PLATFORM, TORCHTITAN, TORCHTITAN_EAGER):
        for name, value in dataclasses.asdict(stack).items():
            if name.endswith(("share", "exposed")):
                assert 0 < value < 0.9, name
        assert stack.attention_backward_share < stack.attention_forward_share < stack.bf16_share


# The pipeline


@st.composite
def pipelines(
    draw: st.DrawFn, least: float = 0.1, most: float = 3
) -> tuple[int, list[float], list[float], int]:
    stages = draw(st.integers(1, 6))
    chunks = draw(st.integers(1, 4)) if stages > 1 else 1
    micro_batches = stages * draw(st.integers(1, 4)) if chunks > 1 else draw(st.integers(1, 12))
    seconds = st.lists(st.floats(least, most), min_size=stages, max_size=stages)
    return micro_batches, draw(seconds), draw(seconds), chunks


def ends(tasks: list[Task]) -> dict[tuple[int, int, int, str], float]:
    return {(task.stage, task.chunk, task.micro_batch, task.kind): task.end for task in tasks}


@settings(max_examples=60, deadline=None)
@given(pipelines(), st.floats(0, 0.5))
def test_every_task_runs_once_alone_and_after_what_it_needs(
    pipeline: tuple[int, list[float], list[float], int], p2p: float
) -> None:
    micro_batches, forward, backward, chunks = pipeline
    stages = len(forward)
    tasks = timeline(micro_batches, forward, backward, chunks, p2p)
    done = ends(tasks)
    assert len(tasks) == len(done) == 2 * stages * chunks * micro_batches
    assert [task.begin for task in tasks] == sorted(task.begin for task in tasks)
    for stage in range(stages):
        own = [task for task in tasks if task.stage == stage]
        for before, after in itertools.pairwise(own):
            assert before.end <= after.begin
    for task in tasks:
        times = forward if task.kind == "forward" else backward
        assert task.end - task.begin == pytest.approx(times[task.stage] / chunks)
        place = task.chunk * stages + task.stage  # of the model, from the embedding on
        step = -1 if task.kind == "forward" else 1
        if 0 <= place + step < stages * chunks:
            there = (place + step) % stages, (place + step) // stages
            wait = 0 if there[0] == task.stage else p2p
            assert done[*there, task.micro_batch, task.kind] + wait <= task.begin + 1e-9
        if task.kind == "backward":
            assert done[task.stage, task.chunk, task.micro_batch, "forward"] <= task.begin + 1e-9


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(1, 4),
    st.floats(0.1, 2),
    st.floats(0.1, 4),
)
def test_bubble_of_equal_stages(
    stages: int, groups: int, chunks: int, forward: float, backward: float
) -> None:
    """(p - 1) / (m v) of the work (arXiv 2104.04473, section 2.2)."""
    chunks = chunks if stages > 1 else 1
    m = stages * groups
    work = m * (forward + backward)
    length = max(task.end for task in timeline(m, [forward] * stages, [backward] * stages, chunks))
    assert length / work - 1 == pytest.approx((stages - 1) / (m * chunks), abs=1e-9)
    assert pipeline_seconds(m, [forward] * stages, [backward] * stages, chunks) == pytest.approx(length)


@settings(max_examples=60, deadline=None)
@given(pipelines(least=1, most=2), st.floats(1, 3))
def test_closed_length_is_an_upper_bound(
    pipeline: tuple[int, list[float], list[float], int], ratio: float
) -> None:
    """Of stages of which none takes over twice another's time, with one ratio of backward to forward."""
    micro_batches, forward, _, chunks = pipeline
    backward = [ratio * seconds for seconds in forward]
    closed = pipeline_seconds(micro_batches, forward, backward, chunks)
    exact = max(task.end for task in timeline(micro_batches, forward, backward, chunks))
    work = micro_batches * (1 + ratio) * max(forward)
    assert work <= exact * (1 + 1e-9)
    assert exact <= closed * (1 + 1e-9)


@pytest.mark.parametrize(("stages", "chunks"), [(4, 1), (8, 1), (4, 2), (8, 5)])
def test_a_heavier_last_stage_is_exact(stages: int, chunks: int) -> None:
    """What the output layer does to a pipeline."""
    forward = [1.0] * (stages - 1) + [1.3]
    backward = [2.0] * (stages - 1) + [2.6]
    exact = max(task.end for task in timeline(8 * stages, forward, backward, chunks))
    assert pipeline_seconds(8 * stages, forward, backward, chunks) == pytest.approx(exact)


@pytest.mark.parametrize(
    ("stages", "micro_batches", "chunks"), [(4, 32, 1), (8, 64, 1), (4, 16, 2), (8, 32, 5)]
)
def test_waiting_for_sends_is_the_timelines(stages: int, micro_batches: int, chunks: int) -> None:
    run = config(pp=stages, vpp=chunks if chunks > 1 else None, batch=micro_batches)
    model = resolve_model(run.model)
    found = step_time(run, model, stages, H100).parts["pipeline communication"]
    one = 8192 * 8192 * 2 / (H100.nvlink_bandwidth * MEGATRON.link_share)
    passes = [1.0] * stages, [2.0] * stages
    length = max(task.end for task in timeline(micro_batches, *passes, chunks, one))
    assert found == pytest.approx(length - pipeline_seconds(micro_batches, *passes, chunks), rel=1e-6)


def test_timeline_refuses_what_the_schedule_cannot_run() -> None:
    with pytest.raises(ValueError, match="multiple of 2"):
        timeline(3, [1, 1], [1, 1], 2)
    with pytest.raises(ValueError, match="per stage"):
        timeline(3, [1, 1], [1])


class Neighbours:
    """What megatron-core's counting asks of a pipeline."""

    def __init__(self, stage: int, stages: int, chunks: int | None) -> None:
        self.stage, self.stages = stage, stages
        self.virtual_pipeline_model_parallel_size = chunks
        self.pp_group = self

    def size(self) -> int:
        return self.stages

    def rank(self) -> int:
        return self.stage


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_order_is_the_engines(stages: int, chunks: int, groups: int) -> None:
    """Warm-up counts and the order of chunks and micro-batches as megatron-core's own functions give them."""
    schedules = pytest.importorskip("megatron.core.pipeline_parallel.schedules")
    m = stages * groups
    for stage in range(stages):
        pipeline = Neighbours(stage, stages, chunks if chunks > 1 else None)
        total, _, warmup, _ = schedules.get_pp_rank_microbatches(m, chunks, stages, p2p_communicator=pipeline)
        order = stage_order(stage, stages, m, chunks)
        assert warmup_forwards(stage, stages, m, chunks) == min(warmup, total)
        kinds = [step[0] for step in order]
        rest = total - min(warmup, total)
        assert kinds == ["forward"] * (total - rest) + ["forward", "backward"] * rest + ["backward"] * (
            total - rest
        )
        table = schedules.get_schedule_table(m, chunks, stages if chunks > 1 else m)
        assert [step[1:] for step in order if step[0] == "forward"] == [(chunk, mb) for mb, chunk in table]
        assert [step[1:] for step in order if step[0] == "backward"] == [
            (chunks - 1 - chunk, mb) for mb, chunk in table
        ]


# A step


def config(
    preset: str = "llama3_70b",
    tp: int = 1,
    pp: int = 1,
    vpp: int | None = None,
    cp: int = 1,
    batch: int = 64,
    micro: int = 1,
    seq: int = 8192,
    fp8: str | None = None,
    memory: MemoryConfig | None = None,
    **parallel: object,
) -> RunConfig:
    return RunConfig(
        run_dir="run",
        platform="cuda",
        model=ModelConfig(preset=preset),
        parallel=ParallelConfig(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp,
            context_parallel_size=cp,
            sequence_parallel=tp > 1,
            **parallel,  # type: ignore[arg-type]
        ),
        memory=memory or MemoryConfig(),
        data=DataConfig(seq_length=seq, mock=True),
        precision=PrecisionConfig(fp8=fp8),  # type: ignore[arg-type]
        train=TrainConfig(micro_batch_size=micro, global_batch_size=batch, train_iters=1),
    )


def predict(run: RunConfig, world: int) -> StepTime:
    return step_time(run, resolve_model(run.model), world, H100)


FULL = MemoryConfig(recompute_granularity="full", recompute_method="uniform")


def test_parts_add_up_and_rates_follow() -> None:
    time = predict(config(tp=4, pp=4, vpp=5, cp=2), 64)
    assert tuple(time.parts) == PARTS and all(seconds >= 0 for seconds in time.parts.values())
    assert time.tokens_per_second_per_gpu == pytest.approx(64 * 8192 / sum(time.parts.values()) / 64)
    flops = time.tokens_per_second_per_gpu * 4.492e11
    assert time.mfu == pytest.approx(flops / 989.4e12, rel=1e-3)
    assert predict(config(tp=4, pp=8, fp8="tensorwise"), 64).peak_flops == H100.fp8_flops


def test_step_is_the_timeline_and_what_comes_once() -> None:
    """The closed sum is the simulated pipeline plus communication, gradients and optimizer."""
    time = predict(config(tp=4, pp=8, batch=256), 64)
    tasks = timeline(time.num_microbatches, time.forward_seconds, time.backward_seconds)
    once = sum(time.parts[name] for name in ("pipeline communication", "dp communication", "optimizer"))
    assert time.seconds - once == pytest.approx(max(task.end for task in tasks), rel=1e-6)


def test_full_recompute_is_one_more_forward_of_the_layers() -> None:
    run = config("llama3_8b")
    plain, full = predict(run, 1), predict(config("llama3_8b", memory=FULL), 1)
    forward, _ = costs.layer(costs.rank_of(run, resolve_model(run.model), H100, CUDA_PLATFORM))
    assert full.parts["recompute"] == pytest.approx(64 * 32 * forward.seconds)
    assert full.seconds - plain.seconds == pytest.approx(full.parts["recompute"])
    assert 1.2 < full.seconds / plain.seconds < 4 / 3


def test_less_recompute_takes_less() -> None:
    def again(**memory: object) -> float:
        run = config(tp=8, pp=2, memory=MemoryConfig(**memory))  # type: ignore[arg-type]
        return predict(run, 16).parts["recompute"]

    full = again(recompute_granularity="full", recompute_method="uniform")
    block = again(recompute_granularity="full", recompute_method="block", recompute_num_layers=10)
    attention = again(recompute_granularity="selective")
    both = again(recompute_granularity="selective", recompute_modules=["core_attn", "mlp", "layernorm"])
    assert block == pytest.approx(full / 4)
    assert 0 < attention < both < full
    assert again() == 0


def test_stage_with_the_output_layer_sets_the_pace() -> None:
    time = predict(config(tp=4, pp=4), 16)
    assert time.forward_seconds[0] == time.forward_seconds[2] < time.forward_seconds[3]
    lighter = predict(
        config(tp=4, pp=4, num_layers_in_first_pipeline_stage=20, num_layers_in_last_pipeline_stage=18), 16
    )
    # 80 = 20 + 21 + 21 + 18
    assert max(lighter.forward_seconds) < max(time.forward_seconds)
    assert lighter.tokens_per_second_per_gpu > time.tokens_per_second_per_gpu


def test_layers_kept_in_bf16_take_longer_than_fp8() -> None:
    run = config(tp=4, fp8="tensorwise")
    all_fp8 = predict(run, 4)
    run.precision.first_last_layers_bf16 = True
    run.precision.num_layers_at_start_in_bf16 = run.precision.num_layers_at_end_in_bf16 = 40
    bf16 = predict(config(tp=4), 4)
    assert all_fp8.seconds < predict(run, 4).seconds == pytest.approx(bf16.seconds, rel=0.02)


def test_overlap_hides_communication() -> None:
    slow = predict(config(tp=4, pp=8, batch=256), 256)
    fast = predict(
        config(
            tp=4, pp=8, batch=256, overlap_grad_reduce=True, overlap_param_gather=True, tp_comm_overlap=True
        ),
        256,
    )
    for part in ("tp communication", "dp communication"):
        assert 0 < fast.parts[part] < slow.parts[part] / 2
    interleaved = predict(config(tp=4, pp=8, vpp=5, batch=256), 256)
    assert interleaved.parts["pipeline bubble"] == pytest.approx(slow.parts["pipeline bubble"] / 5)


def test_small_pieces_are_less_efficient() -> None:
    """TP and CP beyond need, and short micro-batches, cost tokens/s."""

    def rate(world: int, **changes: object) -> float:
        return predict(config("llama3_8b", **changes), world).tokens_per_second_per_gpu  # type: ignore[arg-type]

    assert rate(1) > rate(2, tp=2) > rate(8, tp=8)
    assert rate(1) > rate(2, cp=2) > rate(8, cp=8)
    assert rate(1, seq=2048, micro=4) > rate(1, seq=2048)


def test_checkpoint_takes_its_bytes() -> None:
    run = config("llama3_8b")
    model = resolve_model(run.model)
    assert update.checkpoint_bytes(run, model) == 14 * model_parameters(model)
    slow, fast = (step_time(run, model, 8, H100, checkpoint_bandwidth=rate) for rate in (1e9, 1e10))
    assert slow.checkpoint_seconds == pytest.approx(112.4, rel=1e-3)
    assert fast.checkpoint_seconds == pytest.approx(slow.checkpoint_seconds / 10)


def test_a_checkpoint_is_fp32_whatever_the_optimizer_keeps() -> None:
    run = config("llama3_8b")
    model = resolve_model(run.model)
    run.optimizer.use_precision_aware_optimizer = True
    run.optimizer.exp_avg_dtype = run.optimizer.exp_avg_sq_dtype = "bf16"
    assert update.checkpoint_bytes(run, model) == 14 * model_parameters(model)


def test_offloaded_optimizer_waits_for_the_host() -> None:
    """For the copies, and for Adam at the rate of the host's memory, shared by a node's GPUs."""
    run = config("llama3_8b", use_distributed_optimizer=True)
    optimizer = run.optimizer
    plain = predict(run, 8).parts["optimizer"]
    optimizer.optimizer_cpu_offload = True
    shard = model_parameters(resolve_model(run.model)) / 8
    copies = shard * (4 + 2) / update.HOST_LINK
    host = shard * (4 + 24 + 2) * 8 / update.HOST_MEMORY  # gradient, three fp32 read and written, bf16 weight
    whole = predict(run, 8).parts["optimizer"]
    assert copies + host < whole < copies + host + plain
    optimizer.overlap_cpu_optimizer_d2h_h2d = True
    assert host < predict(run, 8).parts["optimizer"] < whole - copies / 2
    optimizer.overlap_cpu_optimizer_d2h_h2d = False
    optimizer.optimizer_offload_fraction = 0.5
    assert predict(run, 8).parts["optimizer"] == pytest.approx((whole + plain) / 2)


# Activations in host memory


def test_offloaded_activations_wait_for_the_host() -> None:
    """What the copies take beyond the layers that they hide behind, both ways: 1.1 GB a layer here."""

    def offloaded(layers: int | None, **changes: object) -> StepTime:
        memory = MemoryConfig(cpu_offloading=True, cpu_offloading_num_layers=layers)
        return predict(config("llama3_8b", memory=memory, **changes), 8)  # type: ignore[arg-type]

    run = config("llama3_8b")
    plain, some, most = predict(run, 8), offloaded(8), offloaded(31)
    assert plain.parts["activation offload"] == 0
    one = update.offload_seconds(run, resolve_model(run.model), 0)
    assert one * update.HOST_LINK == pytest.approx(1.14e9, rel=0.05)
    # each of 8 micro-batches copies each of 31 layers to the host and back, behind all 32
    forward, backward = costs.layer(costs.rank_of(run, resolve_model(run.model), H100, CUDA_PLATFORM))
    shows = 8 * (31 * 2 * one - 32 * (forward.seconds + backward.seconds))
    assert most.parts["activation offload"] == pytest.approx(shows)
    assert most.seconds - plain.seconds == pytest.approx(shows)
    assert 0 < some.parts["activation offload"] < most.parts["activation offload"] / 4
    assert offloaded(None).parts == most.parts
    assert offloaded(31, fp8="tensorwise").parts["activation offload"] < shows


# Frozen parameters


def frozen(run: RunConfig, *train_only: str, freeze: tuple[str, ...] = ()) -> RunConfig:
    run.optimizer.train_only, run.optimizer.freeze = list(train_only), list(freeze)
    return run


MATRICES = ("*.linear_*.weight", "output_layer.weight")


def test_frozen_matrices_have_no_weight_gradient() -> None:
    """A third of the products; gradients, optimizer and checkpoint follow what trains."""
    plain = predict(config("llama3_8b"), 8)
    rest = predict(frozen(config("llama3_8b"), freeze=MATRICES), 8)
    # weight gradients take a little more than a third: they are added to fp32 buffers
    assert 0.63 < rest.parts["matrices"] / plain.parts["matrices"] < 2 / 3
    for part in ("attention", "elementwise"):
        assert rest.parts[part] == plain.parts[part]
    share = (128256 + 65) * 4096 / 8.0303e9  # embedding and norms
    for part in ("dp communication", "optimizer"):
        assert rest.parts[part] == pytest.approx(plain.parts[part] * share, rel=0.01)
    assert rest.checkpoint_seconds == pytest.approx(
        plain.checkpoint_seconds * (2 + 12 * share) / 14, rel=1e-3
    )
    feed_forward = predict(frozen(config("llama3_8b"), freeze=("*.mlp.linear_*",)), 8)
    assert rest.parts["matrices"] < feed_forward.parts["matrices"] < plain.parts["matrices"]


def test_no_backward_pass_below_the_first_layer_that_trains() -> None:
    plain = predict(config("llama3_8b"), 8)
    first, last = (predict(frozen(config("llama3_8b"), f"decoder.layers.{n}.*"), 8) for n in (0, 31))
    assert last.seconds < 0.55 * first.seconds < 0.55 * plain.seconds
    assert first.parts["attention"] == plain.parts["attention"]
    run = config("llama3_8b")
    forward, backward = costs.attention_seconds(
        costs.rank_of(run, resolve_model(run.model), H100, CUDA_PLATFORM)
    )
    assert last.parts["attention"] == pytest.approx(8 * (32 * forward + backward))
    embedding = predict(frozen(config("llama3_8b"), "decoder.layers.31.*", "embedding.*"), 8)
    assert embedding.parts["attention"] == plain.parts["attention"]
    # recomputation begins the graph at the embedding, whatever is frozen
    again = predict(frozen(config("llama3_8b", memory=FULL), "decoder.layers.31.*"), 8)
    assert again.parts["attention"] == plain.parts["attention"] and again.parts["recompute"] > 0


def test_only_the_first_chunk_goes_without_a_backward_pass() -> None:
    """Tensors that pipeline stages receive ask for a gradient."""
    last = predict(frozen(config(tp=4, pp=4), "decoder.layers.79.*"), 32)
    assert last.backward_seconds[0] == 0 < last.backward_seconds[1] == last.backward_seconds[2]
    chunks = predict(frozen(config(tp=4, pp=4, vpp=5), "decoder.layers.79.*"), 32)
    assert chunks.backward_seconds[0] == pytest.approx(0.8 * chunks.backward_seconds[1])
    # what the first stage has to update is waited for, though the last sets the pace
    first = predict(frozen(config(tp=4, pp=4), "decoder.layers.0.*"), 32)
    assert first.parts["optimizer"] == pytest.approx(last.parts["optimizer"]) and first.parts["optimizer"] > 0


def test_a_frozen_weight_gathers_nothing_again() -> None:
    run = config(tp=4)
    rank = costs.rank_of(run, resolve_model(run.model), H100, CUDA_PLATFORM)
    one = costs.tp_collective_seconds(rank)
    backward = costs.layer(rank, trained=frozenset())[1]
    assert backward.tp == pytest.approx(
        2 * (one + one)
    )  # of two pairs: gathered and scattered once, both seen


@pytest.mark.parametrize(
    ("preset", "tp", "pp"), [("llama3_70b", 4, 4), ("llama3_2_1b", 2, 2), ("llama3_2_1b", 2, 1)]
)
@pytest.mark.parametrize(
    ("train_only", "freeze"),
    [
        (["*.layers.0.*", "*final*"], []),
        ([], ["*embedding*"]),
        ([], ["*.mlp.*", "output*"]),
        (["*norm*"], []),
    ],
)
def test_numbers_that_train_are_those_of_the_memory_plan(
    preset: str, tp: int, pp: int, train_only: list[str], freeze: list[str]
) -> None:
    run = frozen(config(preset, tp=tp, pp=pp), *train_only, freeze=tuple(freeze))
    model = resolve_model(run.model)
    trained, rank = update.what_trains(run, model), costs.rank_of(run, model, H100, CUDA_PLATFORM)
    assert trained is not None
    assert trained.numbers(rank, chunk_layers(run.parallel, model.num_layers or 0)) == [
        sum(p.size for chunk in chunks for p in chunk if p.trains) for chunks in rank_parameters(run, model)
    ]


def test_all_trains_where_no_pattern_says_otherwise() -> None:
    run = config("llama3_8b")
    plain = predict(run, 8)
    assert update.what_trains(run, resolve_model(run.model)) is None
    every = predict(frozen(run, "*"), 8)
    assert every.parts == plain.parts and every.checkpoint_seconds == plain.checkpoint_seconds


@pytest.mark.parametrize("emulation", [False, True])
def test_mfu_is_of_the_peak_that_products_run_at(emulation: bool) -> None:
    """Emulated FP8 computes in bf16; the same peak as the trainer's log."""
    run = config(tp=4, fp8="tensorwise")
    run.precision.fp8_emulation = emulation
    found = predict(run, 4).peak_flops
    assert found == (H100.bf16_flops if emulation else H100.fp8_flops)
    assert found == peak_flops(run, "NVIDIA H100 80GB HBM3")


def test_names_of_rows_are_unique() -> None:
    assert max(Counter(row.name for row in ROWS).values()) == 1
