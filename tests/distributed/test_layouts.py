"""Every layout trains to the same losses as one process, from one seed checkpoint.

The table is of what megatron-core can run: each axis alone (uneven stages and explicit layouts among them),
each pair of axes, and what is known to go together badly: overlap with VPP and with CP, tied embeddings with
PP, more TP ranks than KV heads, a sliding window over CP. All jobs of a world size are trained by one start of
processes, and none saves: that was most of the time.
"""

from __future__ import annotations

import pytest

from .conftest import Bench, make_seed

SP = "parallel.sequence_parallel=true"
TP2, TP4 = (f"parallel.tensor_model_parallel_size={size}" for size in (2, 4))
PP2, PP4 = (f"parallel.pipeline_model_parallel_size={size}" for size in (2, 4))
VPP2 = "parallel.virtual_pipeline_model_parallel_size=2"
CP2, CP4 = (f"parallel.context_parallel_size={size}" for size in (2, 4))

OVERLAP = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
WHOLE = "parallel.use_distributed_optimizer=false"
REDUCE = "parallel.overlap_grad_reduce=true"
FIRST1 = "parallel.num_layers_in_first_pipeline_stage=1"
FIRST3, LAST1 = (
    "parallel.num_layers_in_first_pipeline_stage=3",
    "parallel.num_layers_in_last_pipeline_stage=1",
)


def cut(layout: str) -> str:
    """An explicit layout string."""
    return f"parallel.pipeline_model_parallel_layout='{layout}'"


# model -> world size -> layout -> overrides; what is left of the world is DP
LAYOUTS: dict[str, dict[int, dict[str, list[str]]]] = {
    "plain": {
        1: {"single": []},
        2: {
            "tp2": [TP2],
            "tp2_sp": [TP2, SP],
            "pp2": [PP2],
            "pp2_uneven": [PP2, FIRST3, LAST1],
            "pp2_cut": [PP2, cut("Et|tttL")],
            "pp2_vpp2": [PP2, VPP2],
            "pp2_vpp2_cut": [PP2, VPP2, cut("E|tt|t|tL")],
            "cp2": [CP2],
            "cp2_overlap": [CP2, *OVERLAP],
            "cp2_whole": [CP2, WHOLE],
            "dp2": [],
            "dp2_overlap": OVERLAP,
            "dp2_whole": [WHOLE],
            "dp2_whole_overlap": [WHOLE, REDUCE],
        },
        4: {
            "tp4_sp": [TP4, SP],
            "pp4": [PP4],
            "pp4_cut": [PP4, cut("E|tt|t|tL")],
            "pp4_vpp2_batched": [PP4, VPP2, cut("E|t|t||t|t||L"), "parallel.overlap_p2p_comm=false"],
            "cp4": [CP4],
            "dp4_overlap": [*OVERLAP, "train.micro_batch_size=1"],
            "tp2_pp2_sp": [TP2, PP2, SP],
            "tp2_pp2_vpp2_sp": [TP2, PP2, VPP2, SP],
            "tp2_cp2": [TP2, CP2],
            "tp2_cp2_sp": [TP2, CP2, SP],
            "tp2_dp2_sp": [TP2, SP],
            "tp2_dp2_sp_overlap": [TP2, SP, *OVERLAP],
            "pp2_cp2": [PP2, CP2],
            "pp2_vpp2_cp2_overlap": [PP2, VPP2, CP2, *OVERLAP],
            "pp2_dp2": [PP2],
            "pp2_dp2_uneven_overlap": [PP2, FIRST1, *OVERLAP],
            "pp2_dp2_whole": [PP2, WHOLE],
            "pp2_vpp2_dp2_overlap": [PP2, VPP2, *OVERLAP],
            "pp2_vpp2_dp2_whole_overlap": [PP2, VPP2, WHOLE, REDUCE],
            "cp2_dp2_overlap": [CP2, *OVERLAP],
        },
        8: {
            "tp2_pp2_cp2_sp": [TP2, PP2, CP2, SP],
            "pp2_vpp2_cp2_dp2_overlap": [PP2, VPP2, CP2, *OVERLAP],
        },
    },
    # tied embeddings, 2 KV heads, each token sees the 12 last
    "tied": {
        1: {"single": []},
        2: {
            "pp2": [PP2],
            "pp2_overlap": [PP2, *OVERLAP],
            "pp2_vpp2": [PP2, VPP2],
            "cp2": [CP2],
            "tp2_sp": [TP2, SP],
        },
        4: {
            "tp4": [TP4],
            "tp4_sp": [TP4, SP],
            "tp2_pp2_sp": [TP2, PP2, SP],
            "tp2_cp2_sp": [TP2, CP2, SP],
            "pp2_vpp2_dp2_overlap": [PP2, VPP2, *OVERLAP],
            "pp2_dp2_whole": [PP2, WHOLE],
            "pp2_cp2": [PP2, CP2],
            "cp4": [CP4],
        },
    },
}
NAMES = [
    f"{dtype}.{model}.{name}"
    for dtype in ("fp32", "bf16")
    for model, worlds in LAYOUTS.items()
    for layouts in worlds.values()
    for name in layouts
]
TOLERANCE = {"fp32": 5e-6, "bf16": 3e-3}
NORM_TOLERANCE = 5e-5
"""Relative, of the gradient norm in fp32: three times the largest that was measured (1.4e-5, TP 4)."""
STEPS = 20
NO_SAVE = {"saves": False}
# 12 and 8 steps of 4 short samples: for tests elsewhere that compare fp32 alone
SHORT = [
    "data.seq_length=32",
    "train.global_batch_size=4",
    "data.stages.0.tokens=1536",
    "data.stages.1.tokens=1024",
]

Steps = list[tuple[float, float]]


def loss_and_norm(result: dict) -> Steps:
    """Of each step of a job."""
    return [(float.fromhex(row["loss"]), row["grad_norm"]) for row in result["steps"]]


def batches(dtype: str, overrides: list[str]) -> list[str]:
    """Pipelines get four micro-batches; elsewhere two are faster. fp32 has short samples too; bf16 would be so noisy
    with 4 x 32 tokens to a step that runs drift apart from rounding alone (3.5e-3)."""
    short, piped = dtype == "fp32", any("pipeline" in each for each in overrides)
    size = (1 if piped else 2) if short else (2 if piped else 4)
    return [*(SHORT if short else []), f"train.micro_batch_size={size}"]


@pytest.fixture(scope="module")
def tied_model(bench: Bench) -> list[str]:
    shape = {"tie_word_embeddings": True, "num_key_value_heads": 2, "sliding_window": 12}
    seed = make_seed(bench.folder / "tied", "Mistral", **shape)
    return [f"model.hf_path={seed}", f"checkpoint.initialize_from={seed}"]


@pytest.fixture(scope="module")
def found(bench: Bench, tied_model: list[str]) -> dict[str, Steps]:
    """``found["fp32.plain.pp2"]``: loss and gradient norm of each step."""
    result: dict[str, Steps] = {}
    for world_size in sorted({size for worlds in LAYOUTS.values() for size in worlds}):
        jobs = {}
        for dtype in TOLERANCE:
            for model, worlds in LAYOUTS.items():
                for name, overrides in worlds.get(world_size, {}).items():
                    own = [*(tied_model if model == "tied" else []), *batches(dtype, overrides)]
                    jobs[f"{dtype}.{model}.{name}"] = [
                        *own,
                        *overrides,
                        f"precision.params_dtype={dtype}",
                    ]
        for key, each in bench.train(world_size, jobs, dict.fromkeys(jobs, NO_SAVE)).items():
            result[key] = loss_and_norm(each)
    return result


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith(".single")])
def test_layout_trains_to_the_losses_of_one_process(found: dict[str, Steps], name: str) -> None:
    dtype, model, _ = name.split(".")
    single, layout = found[f"{dtype}.{model}.single"], found[name]
    assert len(single) == len(layout) == STEPS
    pairs = list(zip(single, layout, strict=True))
    loss = max(abs(a - b) for (a, _), (b, _) in pairs)
    norm = max(abs(a / b - 1) for (_, a), (_, b) in pairs)
    print(f"{name}: largest difference of the loss {loss:.1e}, of the gradient norm {norm:.1e} of it")
    assert loss <= TOLERANCE[dtype]
    if dtype == "fp32":
        assert norm <= NORM_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("model", LAYOUTS)
def test_the_run_learns_so_that_a_wrong_gradient_would_show(found: dict[str, Steps], model: str) -> None:
    losses = [loss for loss, _ in found[f"fp32.{model}.single"]]
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.slow
def test_the_window_and_the_tied_embedding_are_there(found: dict[str, Steps]) -> None:
    plain, tied = found["fp32.plain.single"], found["fp32.tied.single"]
    assert min(abs(a - b) for (a, _), (b, _) in zip(plain, tied, strict=True)) > 1e-3


@pytest.mark.slow
def test_a_checkpoint_goes_from_and_to_context_parallelism(bench: Bench, found: dict[str, Steps]) -> None:
    folder = bench.folder / "context"
    half, options = "train.exit_interval=10", batches("fp32", [])
    jobs = {}
    for name, first, second in (("from", [CP2], []), ("to", [], [CP2])):
        run = f"run_dir={folder / name}"
        jobs[f"{name}.first"] = [*options, *first, run, half]
        jobs[f"{name}.second"] = [*options, *second, run]
    results = bench.train(2, jobs, {name: NO_SAVE for name in jobs if name.endswith("second")})
    for name in ("from", "to"):
        steps = [
            row for half_run in ("first", "second") for row in loss_and_norm(results[f"{name}.{half_run}"])
        ]
        assert results[f"{name}.second"]["first_step"] == 10
        assert [loss for loss, _ in steps] == pytest.approx(
            [loss for loss, _ in found["fp32.plain.single"]], abs=TOLERANCE["fp32"]
        )
