"""The search: what it lists is legal, what it lists first is the best, and its reasons are the numbers' own."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_syne.config.loader import load_config, to_yaml
from megatron_syne.config.schema import ModelConfig, RunConfig, SourceConfig, StageConfig
from megatron_syne.errors import ConfigError
from megatron_syne.models.config import resolve_model
from megatron_syne.planner.found import Found, remedies
from megatron_syne.planner.hardware import GIB, Gpu, gpu_named
from megatron_syne.planner.layouts import changed, layouts
from megatron_syne.planner.search import PLATFORM, Candidate, evaluate, neighbours, place, reasons, search
from megatron_syne.planner.shapes import shapes
from megatron_syne.preflight.rules import check

H100 = gpu_named("h100")


def run_of(preset: str, global_batch_size: int, seq_length: int = 8192) -> RunConfig:
    config = RunConfig(run_dir="run", model=ModelConfig(preset=preset))
    config.data.mock, config.data.seq_length = True, seq_length
    config.train.train_iters, config.train.global_batch_size = 100, global_batch_size
    return config


def toy(global_batch_size: int = 16, seq_length: int = 4096) -> RunConfig:
    """A model so small that all its layouts can be looked at one by one."""
    config = run_of("llama3_8b", global_batch_size, seq_length)
    config.model = ModelConfig(preset="llama3_2_1b", num_layers=6)
    return config


def staged(tmp_path: Path) -> RunConfig:
    config = toy()
    config.data.mock, config.train.train_iters = False, None
    config.data.sources = {"text": SourceConfig(path=str(tmp_path / "text"))}
    config.data.stages = [
        StageConfig(name="short", tokens=4_000_000, mixture={"text": 1.0}),
        StageConfig(
            name="long", tokens=1_000_000, mixture={"text": 1.0}, seq_length=16384, global_batch_size=4
        ),
    ]
    return config


def found_by(config: RunConfig, world_size: int, gpu: Gpu = H100) -> list[Candidate]:
    return search(config, resolve_model(config.model), world_size, gpu)


@pytest.fixture(scope="module")
def candidates_8b() -> list[Candidate]:
    return found_by(run_of("llama3_8b", 128), 8)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"data.reset_attention_mask": True},
        {"data.reset_attention_mask": True, "data.reset_position_ids": True, "data.packing": "greedy"},
        {"train.rampup_batch_size": [8, 4, 400]},
        {"precision.fp8": "delayed"},
        {"precision.fp8": "blockwise", "precision.fp8_param_gather": True},
        {
            "precision.fp8": "tensorwise",
            "precision.first_last_layers_bf16": True,
            "precision.num_layers_at_start_in_bf16": 2,
        },
        {"parallel.cp_comm_type": "a2a", "parallel.tp_comm_overlap": True},
        {"parallel.overlap_grad_reduce": True, "parallel.overlap_param_gather": True},
        {"parallel.use_distributed_optimizer": False},
        {"memory.cpu_offloading": True, "memory.cpu_offloading_num_layers": 2},
        {"memory.distribute_saved_activations": True},
        {"optimizer.use_precision_aware_optimizer": True, "optimizer.optimizer_cpu_offload": True},
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_every_candidate_passes_the_trainers_rules(options: dict[str, object]) -> None:
    config = changed(toy(), options)
    model = resolve_model(config.model)
    candidates = found_by(config, 8)
    assert len(candidates) > 5
    for each in candidates:
        check(each.config, model, 8, "cuda")


@pytest.mark.parametrize("documents", [False, True])
def test_every_candidate_passes_the_rules_of_stages(documents: bool, tmp_path: Path) -> None:
    config = changed(staged(tmp_path), {"data.reset_attention_mask": documents})
    model = resolve_model(config.model)
    for each in found_by(config, 8):
        assert not _layout_problems(each.config, model)


def _layout_problems(config: RunConfig, model: ModelConfig) -> str:
    """What the trainer says of a run, less what it says of its data, which does not exist here."""
    try:
        check(config, model, 8, "cuda")
    except ConfigError as error:
        words = ("parallel.", "batch", "reset_attention_mask")
        return "\n".join(line for line in str(error).splitlines() if any(word in line for word in words))
    return ""


def test_the_order_is_fits_first_then_fastest(candidates_8b: list[Candidate]) -> None:
    fitting = [each for each in candidates_8b if each.fits(H100)]
    rest = [each for each in candidates_8b if not each.fits(H100)]
    assert fitting and rest
    assert candidates_8b[: len(fitting)] == fitting
    assert [each.run_seconds for each in fitting] == sorted(each.run_seconds for each in fitting)
    assert [each.peak_bytes for each in rest] == sorted(each.peak_bytes for each in rest)
    assert len({place(each.config) for each in candidates_8b}) == len(candidates_8b)


@pytest.mark.parametrize("gibibytes", [2, 4, 6, 10, 79])
@pytest.mark.parametrize("fp8", [None, "delayed"])
def test_what_is_left_out_could_not_be_first(gibibytes: int, fp8: str | None) -> None:
    """Against looking at every legal layout, on a GPU small enough that recompute and micro-batch decide."""
    gpu = replace(H100, memory_bytes=gibibytes * GIB)
    config = toy()
    config.precision = replace(config.precision, fp8=fp8)  # type: ignore[arg-type]
    model = resolve_model(config.model)
    stages = shapes(config, model)
    every = [
        evaluate(own, stages, 4, gpu, overrides)
        for own, overrides in layouts(config, model, stages, 4, gpu.gpus_per_node, PLATFORM)
    ]
    found = search(config, model, 4, gpu)
    assert len(found) <= len(every)
    fitting = [each.run_seconds for each in every if each.fits(gpu)]
    if fitting:
        assert found[0].fits(gpu)
        assert found[0].run_seconds == min(fitting)
    else:
        assert not any(each.fits(gpu) for each in found)
        assert found[0].peak_bytes == min(each.peak_bytes for each in every)


def test_overrides_written_into_a_file_give_the_same_plan(
    candidates_8b: list[Candidate], tmp_path: Path
) -> None:
    base = run_of("llama3_8b", 128)
    (tmp_path / "base.yaml").write_text(to_yaml(base))
    for number, each in enumerate([candidates_8b[0], candidates_8b[5], candidates_8b[-1]]):
        tree: dict[str, dict[str, object]] = {}
        for key, value in each.overrides.items():
            section, option = key.split(".")
            tree.setdefault(section, {})[option] = value
        path = tmp_path / f"{number}.yaml"
        path.write_text("base: base.yaml\n" + yaml.safe_dump(tree))
        config = load_config(path)
        model = resolve_model(config.model)
        check(config, model, 8, "cuda")
        again = evaluate(config, shapes(config, model), 8, H100)
        assert (again.memory, again.time, again.run_seconds) == (each.memory, each.time, each.run_seconds)


def test_to_write_is_what_differs() -> None:
    config = toy()
    config.parallel.tensor_model_parallel_size = 2
    candidates = found_by(config, 8)
    written = Found(H100, candidates, config).to_write
    assert changed(config, written).parallel == candidates[0].config.parallel
    assert changed(config, written).memory == candidates[0].config.memory
    assert all(candidates[0].overrides[key] == value for key, value in written.items())
    assert len(written) < len(candidates[0].overrides)


def test_neighbours_differ_in_one_thing_and_decide(candidates_8b: list[Candidate]) -> None:
    best, others = candidates_8b[0], candidates_8b[1:]
    found = neighbours(best, others)
    assert {"TP", "PP", "micro-batch", "recompute"} <= {axis for axis, _ in found}
    for axis, other in found:
        differ = [
            name
            for name, mine, its in zip(
                ("TP", "PP", "VPP", "CP", "micro-batch", "recompute"),
                place(best.config),
                place(other.config),
                strict=True,
            )
            if mine != its
        ]
        assert differ in ([axis], ["PP", "VPP"])
        assert not other.fits(H100) or other.run_seconds >= best.run_seconds
    lines = reasons(best, others, H100)
    assert len(lines) == len(found)
    for line, (axis, other) in zip(lines, found, strict=True):
        assert line.startswith(f"{axis} ")
        if other.fits(H100):
            said = re.search(r"([\d.]+) s a step slower", line)
            assert said and float(said[1]) == pytest.approx(other.time.seconds - best.time.seconds, abs=0.006)
        else:
            said = re.search(r"does not fit, ([\d.]+) GiB too many", line)
            assert said and float(said[1]) == pytest.approx(other.peak_bytes / GIB - 79.1, abs=1.0)


def test_stages_share_one_layout(tmp_path: Path) -> None:
    """Memory of the longest sequences, speed of the most tokens, time of both."""
    config = staged(tmp_path)
    model = resolve_model(config.model)
    stages = shapes(config, model)
    assert [(each.name, each.seq_length, each.global_batch_size) for each in stages] == [
        ("short", 4096, 16),
        ("long", 16384, 4),
    ]
    best = search(config, model, 8, H100)[0]
    alone = [evaluate(best.config, [stage], 8, H100) for stage in stages]
    assert best.memory == alone[1].memory
    assert best.peak_bytes > alone[0].peak_bytes
    assert best.time == alone[0].time
    assert best.run_seconds == pytest.approx(sum(each.run_seconds for each in alone))


def test_a_ramp_keeps_its_batches(tmp_path: Path) -> None:
    config = staged(tmp_path)
    config.data.stages = config.data.stages[:1]
    config.train.rampup_batch_size = [4, 4, 64]
    stages = shapes(config, resolve_model(config.model))
    assert [size for size, _ in stages[0].batches] == [4, 8, 12, 16]
    assert sum(size * count * 4096 for size, count in stages[0].batches) == stages[0].tokens
    for each in found_by(config, 8):
        unit = each.config.train.micro_batch_size * (each.config.parallel.data_parallel_size or 1)
        assert all(size % unit == 0 for size in (4, 8, 12, 16))
        steps = [
            (
                evaluate(
                    changed(each.config, {"train.rampup_batch_size": [], "train.global_batch_size": size}),
                    [replace(stages[0], batches=((size, count),))],
                    8,
                    H100,
                ).run_seconds
            )
            for size, count in stages[0].batches
        ]
        assert each.run_seconds == pytest.approx(sum(steps))
        assert each.run_seconds < each.time.seconds * stages[0].iterations


def test_nothing_fits_and_what_would_help() -> None:
    config = run_of("llama3_8b", 128)
    gpu = replace(H100, memory_bytes=20 * GIB)
    model = resolve_model(config.model)
    candidates = search(config, model, 2, gpu)
    assert not candidates[0].fits(gpu)
    found = Found(gpu, candidates, config)
    assert found.fit == 0
    assert found.reasons == []
    assert found.misses == candidates[:3]
    said = list(remedies(config, model, 2, gpu))
    count = int(said[0].split()[0])
    assert search(config, model, count, gpu)[0].fits(gpu)
    assert not search(config, model, count // 2, gpu)[0].fits(gpu)


def test_a_saver_that_is_named_does_help() -> None:
    config = run_of("llama3_8b", 128)
    model = resolve_model(config.model)
    gpu = replace(H100, memory_bytes=66 * GIB)
    said = [line for line in remedies(config, model, 2, gpu) if "exp_avg_dtype" in line]
    assert said
    texts = said[0].partition(":")[0].split()
    options = dict(text.split("=") for text in texts)
    smaller = changed(config, {key: yaml.safe_load(value) for key, value in options.items()})
    assert search(smaller, model, 2, gpu)[0].fits(gpu)
    assert not search(config, model, 2, gpu)[0].fits(gpu)


def test_no_layout_is_legal() -> None:
    """The rules' words on the plainest layout say what to change."""
    with pytest.raises(ConfigError, match=r"no layout of 7 GPUs is legal.*nearest legal: 126 or 133"):
        found_by(run_of("llama3_8b", 128), 7)
    with pytest.raises(ConfigError, match=r"no layout of 8 GPUs is legal.*max_position_embeddings = 8192"):
        found_by(run_of("llama3_8b", 128, seq_length=16384), 8)


def test_a_broken_rule_elsewhere_is_said_as_by_the_trainer() -> None:
    config = toy()
    config.resilience.exit_signals = ["SIGNONE"]
    with pytest.raises(ConfigError, match="SIGNONE"):
        found_by(config, 8)


@pytest.mark.parametrize("key", ["data.seq_length", "train.global_batch_size", "train.micro_batch_size"])
def test_sizes_that_are_none_are_said_as_by_the_trainer(key: str) -> None:
    config = changed(toy(), {key: 0})
    with pytest.raises(ConfigError) as trainers:
        check(config, resolve_model(config.model), 8, "cuda")
    with pytest.raises(ConfigError) as ours:
        found_by(config, 8)
    assert str(ours.value) == str(trainers.value)


def test_layers_that_pp_does_not_divide() -> None:
    """Llama-3.1 405B has 126 layers: with 16 stages 7 on the first and the last (arXiv 2407.21783, section 3.3.2)."""
    config = run_of("llama3_1_405b", 2048)
    model = resolve_model(config.model)
    stages = shapes(config, model)
    uneven = [
        own.parallel
        for own, _ in layouts(config, model, stages, 1024, 8, PLATFORM, ("none",), 1)
        if own.parallel.pipeline_model_parallel_size == 16
    ]
    assert uneven
    for parallel in uneven:
        assert parallel.num_layers_in_first_pipeline_stage == 7
        assert parallel.num_layers_in_last_pipeline_stage == 7


def test_the_first_is_like_what_nvidia_runs() -> None:
    """70B on 64 H100s: NVIDIA publishes TP 4 x PP 4 x CP 2 with VPP 5 and TP 4 x PP 8 with VPP 5."""
    first = found_by(run_of("llama3_70b", 128), 64)[0]
    tp, pp, vpp, cp, micro, recompute = place(first.config)
    assert (tp, micro, recompute) == (4, 1, 0)
    assert (pp, cp) in ((4, 2), (8, 1))
    assert vpp >= 5
