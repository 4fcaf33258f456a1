"""Recomputation changes the memory and not the losses; the optimizer's formats change both, within what is stated.

Recomputed layers give the losses of kept ones to the bit, but for ``layernorm``: there the gradients of the
residual stream are summed in another order. Formats are held to the plain optimizer under bf16 weights.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from .conftest import Bench
from .ranks import run_ranks
from .test_layouts import CP2, NO_SAVE, PP2, SHORT, SP, TP2, VPP2

pytestmark = pytest.mark.slow

FULL, SELECTIVE = (f"memory.recompute_granularity={kind}" for kind in ("full", "selective"))
UNIFORM, BLOCK = (f"memory.recompute_method={method}" for method in ("uniform", "block"))
EACH1, EACH2 = (f"memory.recompute_num_layers={count}" for count in (1, 2))


def modules(names: str) -> list[str]:
    return [SELECTIVE, f"memory.recompute_modules=[{names}]"]


KEPT: list[str] = []
RECOMPUTED = {
    "core_attn": [SELECTIVE],
    "mlp": modules("mlp"),
    "layernorm": modules("layernorm"),
    "all_modules": modules("core_attn,mlp,layernorm"),
    "uniform": [FULL, UNIFORM],
    "uniform_2": [FULL, UNIFORM, EACH2],
    "block": [FULL, BLOCK],
    "block_1": [FULL, BLOCK, EACH1],
}
FROZEN = ["optimizer.freeze=[embedding.*]"]
DOCUMENTS = "data.reset_attention_mask=true"
# 8 steps
FEW = [*SHORT, "data.stages.0.tokens=768", "data.stages.1.tokens=256"]
ORDER = 2e-6
"""Of the loss in fp32, where gradients are summed in another order; measured 4.8e-7."""


def losses(result: dict) -> list[str]:
    return [row["loss"] for row in result["steps"]]


def gap(one: list[str], other: list[str]) -> float:
    """Largest difference of the losses of two runs."""
    return max(abs(float.fromhex(a) - float.fromhex(b)) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def recomputed(bench: Bench) -> dict[str, dict]:
    one = {"single.kept": KEPT, "frozen.kept": FROZEN, "frozen.uniform": [*FROZEN, FULL, UNIFORM]}
    one |= {f"single.{name}": overrides for name, overrides in RECOMPUTED.items()}
    one["documents.kept"] = [DOCUMENTS]
    one |= {f"documents.{name}": [DOCUMENTS, *RECOMPUTED[name]] for name in ("core_attn", "uniform")}
    two = {}
    for layout, where, names in (
        ("tp2_sp", [TP2, SP], ("core_attn", "all_modules", "uniform_2", "block_1")),
        ("cp2", [CP2], ("core_attn", "uniform")),
        ("pp2_vpp2", [PP2, VPP2, "train.micro_batch_size=1"], ("core_attn", "mlp", "uniform", "block")),
    ):
        two[f"{layout}.kept"] = where
        two |= {f"{layout}.{name}": [*where, *RECOMPUTED[name]] for name in names}
    two["tp2.kept"] = [TP2]
    two["tp2.distributed"] = [TP2, FULL, UNIFORM, "memory.distribute_saved_activations=true"]
    result = {}
    for world_size, jobs in ((1, one), (2, two)):
        jobs = {name: [*FEW, *overrides] for name, overrides in jobs.items()}
        result |= bench.train(world_size, jobs, dict.fromkeys(jobs, NO_SAVE))
    return result


def test_recomputed_layers_give_the_losses_of_kept_ones(recomputed: dict[str, dict]) -> None:
    compared = 0
    for name, result in recomputed.items():
        layout, _, mode = name.partition(".")
        if mode == "kept":
            continue
        found, expected = losses(result), losses(recomputed[f"{layout}.kept"])
        assert len(found) == 8
        if mode in ("layernorm", "all_modules"):
            assert gap(found, expected) <= ORDER, name
        else:
            assert found == expected, name
            norms = [
                [row["grad_norm"] for row in each["steps"]] for each in (result, recomputed[f"{layout}.kept"])
            ]
            assert norms[0] == norms[1], name
        compared += 1
    assert compared == len(RECOMPUTED) + 3 + 10 + 1


def test_layers_behind_a_frozen_embedding_train(recomputed: dict[str, dict]) -> None:
    """The losses that are compared are of a run that learns."""
    found = [float.fromhex(loss) for loss in losses(recomputed["frozen.uniform"])]
    assert found[-1] < found[0] - 0.1
    assert losses(recomputed["frozen.kept"]) != losses(recomputed["single.kept"])


# --- formats of the optimizer ------------------------------------------------------------------------------

BF16 = "precision.params_dtype=bf16"
AWARE = [BF16, "optimizer.use_precision_aware_optimizer=true"]
MASTER16 = "optimizer.main_params_dtype=fp16"
GRADS16 = ["optimizer.main_grads_dtype=bf16", "precision.accumulate_allreduce_grads_in_fp32=false"]


def moments(first: str, second: str) -> list[str]:
    return [f"optimizer.exp_avg_dtype={first}", f"optimizer.exp_avg_sq_dtype={second}"]


LEAST = [*AWARE, *moments("fp8", "bf16"), MASTER16, *GRADS16]
FORMATS = {
    "bf16": [*AWARE, *moments("bf16", "bf16")],
    "fp16": [*AWARE, *moments("fp16", "fp16")],
    "fp8_fp16": [*AWARE, *moments("fp8", "fp16")],
    "master_fp16": [*AWARE, MASTER16],
    "grads_bf16": [*AWARE, *GRADS16],
    "least": LEAST,
}
TOLERANCE = 1e-2
"""Of the loss (7.8 to 7.4) against the plain optimizer over 20 steps; measured at most 6.4e-3, fp16 master
weights. Second moments in FP8, which are refused, were 35 away."""
RESUMED_ELSEWHERE = 3e-3
"""As layouts differ under bf16; the scales of FP8 moments are of other parts of a tensor there. Measured at most
1.3e-3."""
HALF = "train.exit_interval=10"


@pytest.fixture(scope="module")
def formats(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Two replicas, so that the state is sharded."""
    folder = tmp_path_factory.mktemp("formats")
    jobs = {"plain": [BF16], "aware": AWARE, **FORMATS}
    overlap = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
    overlap += ["parallel.ddp_bucket_size=20000"]
    jobs |= {"aware.overlap": [*AWARE, *overlap], "least.overlap": [*LEAST, *overlap]}
    options = dict.fromkeys(jobs, NO_SAVE)
    stopped = {"plain": [BF16], "bf16": FORMATS["bf16"], "least": LEAST}
    for name, overrides in stopped.items():
        jobs[f"{name}.first"] = [*overrides, HALF, f"run_dir={folder / name}"]
    result = bench.train(2, {name: [*SHORT, *overrides] for name, overrides in jobs.items()}, options)
    jobs = {f"{name}.second": [*overrides, f"run_dir={folder / name}"] for name, overrides in stopped.items()}
    for before, after, overrides in (
        ("least", "tp2", [*LEAST, TP2, SP]),
        ("least", "plain", [BF16]),
        ("plain", "bf16", FORMATS["bf16"]),
        ("plain", "least", LEAST),
    ):
        copy = folder / f"{before}_to_{after}"
        shutil.copytree(folder / before, copy)
        jobs[f"{before}_to_{after}"] = [*overrides, f"run_dir={copy}"]
    jobs = {name: [*SHORT, *overrides] for name, overrides in jobs.items()}
    return result | bench.train(2, jobs, dict.fromkeys(jobs, NO_SAVE))


def test_the_precision_aware_optimizer_in_fp32_is_the_plain_one(formats: dict[str, dict]) -> None:
    assert losses(formats["aware"]) == losses(formats["plain"])


@pytest.mark.parametrize("name", FORMATS)
def test_formats_train_beside_the_plain_optimizer(formats: dict[str, dict], name: str) -> None:
    found, plain = losses(formats[name]), losses(formats["plain"])
    assert len(found) == 20
    assert found != plain, "the format was not used"
    difference = gap(found, plain)
    print(f"{name}: largest loss difference {difference:.1e}")
    assert difference <= TOLERANCE
    assert float.fromhex(found[-1]) < float.fromhex(found[0]) - 0.3


def test_overlapped_in_small_buckets_it_is_the_same(formats: dict[str, dict]) -> None:
    assert gap(losses(formats["aware.overlap"]), losses(formats["aware"])) <= RESUMED_ELSEWHERE


def test_overlapped_in_small_buckets_formats_train_alike(formats: dict[str, dict]) -> None:
    """Buckets cut tensors elsewhere, and each part has a scale of its own: other rounding from the first step."""
    difference = gap(losses(formats["least.overlap"]), losses(formats["plain"]))
    print(f"least, in small buckets: largest loss difference {difference:.1e}")
    assert difference <= TOLERANCE


@pytest.mark.parametrize("name", ["plain", "bf16", "least"])
def test_saved_formats_go_on_to_the_bit(formats: dict[str, dict], name: str) -> None:
    assert formats[f"{name}.second"]["first_step"] == 10
    both = losses(formats[f"{name}.first"]) + losses(formats[f"{name}.second"])
    assert both == losses(formats[name])


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("least_to_tp2", "least"),
        ("least_to_plain", "least"),
        ("plain_to_bf16", "plain"),
        ("plain_to_least", "plain"),
    ],
)
def test_another_layout_or_format_goes_on(formats: dict[str, dict], name: str, beside: str) -> None:
    found = losses(formats[name])
    assert formats[name]["first_step"] == 10
    difference = gap(found, losses(formats[beside])[10:])
    print(f"{name}: largest loss difference {difference:.1e}")
    assert difference <= RESUMED_ELSEWHERE
    assert found != losses(formats[beside])[10:]


# --- bytes -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    folder = tmp_path_factory.mktemp("bytes")
    jobs = {"kept": KEPT, **RECOMPUTED, "plain": [BF16], **FORMATS}
    listed = [
        {"name": name, "config": str(bench.config), "overrides": overrides}
        for name, overrides in jobs.items()
    ]
    path: Path = folder / "jobs.json"
    path.write_text(json.dumps(listed))
    run_ranks(1, ["-m", "distributed.memory_worker", str(path)])
    result = json.loads((folder / "results.json").read_text())
    for name, each in result.items():
        print(f"{name}: {each['activations']:,} bytes of activations, {each['state']:,} of state")
    return result


def test_recomputation_keeps_fewer_bytes(measured: dict[str, dict[str, float]]) -> None:
    kept = {name: measured[name]["activations"] for name in ("kept", *RECOMPUTED)}
    assert all(kept[name] < kept["kept"] for name in RECOMPUTED)
    assert kept["all_modules"] < min(kept[name] for name in ("core_attn", "mlp", "layernorm"))
    assert kept["block"] == kept["uniform"] < kept["block_1"]
    assert kept["uniform"] < 0.4 * kept["kept"]  # the rest is the logits
    assert kept["uniform_2"] < kept["uniform"]


def test_formats_hold_fewer_bytes(measured: dict[str, dict[str, float]]) -> None:
    """Of each weight, in bytes: moments, and the master weight where the optimizer holds it."""
    weights = measured["plain"]["state"] / 8
    per_weight = {name: measured[name]["state"] / weights for name in FORMATS}
    assert per_weight == {
        "bf16": 2 + 2 + 4,
        "fp16": 2 + 2 + 4,
        "fp8_fp16": 1 + 2 + 4,
        "master_fp16": 4 + 4 + 2,
        "grads_bf16": 4 + 4 + 4,
        "least": 1 + 2 + 2,
    }
