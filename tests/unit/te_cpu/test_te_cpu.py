"""The CUDA platform trains: its own code, megatron-core's and Transformer Engine's Python, over stand-in kernels.

Nothing of it runs on a GPU here, so kernels, speed and their rounding remain to be seen there (``tests/gpu``). Needs
Transformer Engine's Python files (``make probes``, 0.7 MB).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
BASE = """
run_dir: {folder}/run
model: {{hf_path: {model}}}
data:
  seq_length: 64
  sources: {{en: {{path: {folder}/en}}}}
  stages: [{{name: one, tokens: 1024, mixture: {{en: 1.0}}}}]
optimizer: {{lr: 3.0e-4}}
schedule: {{lr_decay_style: cosine, lr_warmup_init: 1.0e-4, lr_warmup_iters: 2}}
precision: {{params_dtype: bf16}}
train: {{micro_batch_size: 2, global_batch_size: 4}}
checkpoint: {{initialize_from: {model}}}
monitor: {{tensorboard: false, progress: false}}
"""
FP32 = ["precision.params_dtype=fp32"]
HALF = ["train.exit_interval=2"]
GATHER = ["precision.fp8_param_gather=true"]
DOCUMENTS = ["data.reset_attention_mask=true", "train.micro_batch_size=1"]
FROZEN = ["optimizer.freeze=[decoder.layers.1.*,embedding.*]"]
OVERLAP = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
BF16_GRADIENTS = ["precision.accumulate_allreduce_grads_in_fp32=false"]
FULL = ["memory.recompute_granularity=full", "memory.recompute_method=uniform"]
RECIPES = ("delayed", "tensorwise", "blockwise")
# The same on both platforms, compared with each other.
BOTH: dict[str, list[str]] = {
    "bf16": [],
    "fp32": FP32,
    "documents": DOCUMENTS,
    "frozen": [*FP32, *FROZEN],
    "z_loss": [*FP32, "train.z_loss=1e-2"],
    **{recipe: [f"precision.fp8={recipe}"] for recipe in RECIPES},
}
CUDA: dict[str, list[str]] = {
    **{f"{recipe}_gather": [f"precision.fp8={recipe}", *GATHER] for recipe in RECIPES},
    "z_loss_bf16": ["train.z_loss=1e-2"],
    "bf16_gradients": BF16_GRADIENTS,
    "overlap": OVERLAP,
    "delayed_recomputed": ["precision.fp8=delayed", *FULL],
    "delayed_watched": ["precision.fp8=delayed"],
    "delayed_guarded": [
        "precision.fp8=delayed", "precision.fp8_guard.interval=2", "precision.fp8_guard.max_loss_gap=1.0"
    ],
    "moments": ["optimizer.use_precision_aware_optimizer=true", "optimizer.exp_avg_dtype=bf16"],
}  # fmt: skip
WAITS = {
    "megatron/core/distributed/finalize_model_grads.py": 1,  # whether there are any tokens
    "megatron/core/optimizer/clip_grads.py": 1,  # the norm of the gradients
    "megatron_syne/platform/cuda.py": 1,  # our one reduction
}
"""Where the host waits for the device in a step, and how often."""
PROBES = {name: "Gradients" for name in ("bf16", "fp32", "frozen", "bf16_gradients")} | {
    "delayed_watched": "Engine",
    "overlap": "Waits",
    "delayed": "Waits",
    "documents": "Waits",
}


def te_folder() -> Path:
    """Where the Python files of Transformer Engine lie; skips where they do not."""
    folder = Path(os.environ.get("MEGATRON_SYNE_TE_NAMES") or Path(sys.prefix) / "te_names")
    if not (folder / "transformer_engine").is_dir():
        pytest.skip(f"Transformer Engine's Python files are absent from {folder}: run `make probes`")
    return folder


def smaller(source: Path, folder: Path) -> Path:
    """The demo's base model less two of its four layers, its MLP of a width that blockwise scaling can tile."""
    import torch
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"num_hidden_layers": 2, "intermediate_size": 384})
    )

    def cut(name: str, value: torch.Tensor) -> torch.Tensor:
        if "gate_proj" in name or "up_proj" in name:
            return value[:384].clone()
        return value[:, :384].clone() if "down_proj" in name else value

    tensors = load_file(source / "model.safetensors")
    kept = {n: cut(n, t) for n, t in tensors.items() if "layers.2." not in n and "layers.3." not in n}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def trained(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Results by platform and name; jobs named ``on`` went on from the other platform's checkpoint."""
    te, folder = te_folder(), tmp_path_factory.mktemp("te_cpu")
    demo = repository / "examples" / "demo"
    subprocess.run(
        [sys.executable, str(repository / "tools/prepare_data.py"), "--tokenizer", str(demo / "base_model"),
         "--input", str(demo / "texts/en_web.valid.jsonl"), "--output-prefix", str(folder / "en")],
        check=True,
    )  # fmt: skip
    model = smaller(demo / "base_model", folder / "model")
    config = folder / "run.yaml"
    config.write_text(BASE.format(folder=folder, model=model))
    env = {name: value for name, value in os.environ.items() if not name.startswith("NVTE_")}
    env |= {"OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(te), str(repository), str(HERE.parent)])

    def run(
        platform: str, file: str, jobs: dict[str, list[str]], saves: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        where, runs = folder / f"{file}_jobs", folder / platform
        where.mkdir()
        listed = [
            {
                "name": name,
                "config": str(config),
                "platform": platform,
                "saves": name in saves,
                "overrides": [
                    f"run_dir={runs / name.removesuffix('_on')}",
                    f"platform={platform}",
                    *overrides,
                ],
                **({"probe": PROBES[name]} if platform == "cuda" and name in PROBES else {}),
            }
            for name, overrides in jobs.items()
        ]
        (where / "jobs.json").write_text(json.dumps(listed))
        done = subprocess.run(
            [sys.executable, str(HERE / "worker.py"), str(where / "jobs.json")],
            env=env, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads((where / "results.json").read_text())

    results = {"cpu": run("cpu", "cpu", {**BOTH, "on": [*FP32, *HALF]}, saves=("on",))}
    half = folder / "cuda" / "on"
    shutil.copytree(folder / "cpu" / "on", half)
    jobs = {**BOTH, **CUDA, "from": [*FP32, *HALF], "on": FP32}
    jobs |= {"half8": [*BOTH["delayed"], *HALF], "half8_on": BOTH["delayed"]}
    results["cuda"] = run("cuda", "cuda", jobs, saves=("from", "half8"))
    shutil.rmtree(folder / "cpu" / "on")
    shutil.copytree(folder / "cuda" / "from", folder / "cpu" / "on")
    results["cpu_on"] = run("cpu", "cpu_on", {"on": FP32})
    return results


def losses(result: dict[str, Any]) -> list[float]:
    assert "error" not in result, result["error"]
    return [step["loss"] for step in result["steps"]]


def furthest(left: list[float], right: list[float]) -> float:
    assert len(left) == len(right) > 0
    return max(abs(a - b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("name", BOTH)
def test_trains_to_the_losses_of_the_cpu_platform(trained: dict[str, Any], name: str) -> None:
    """fp32: 1e-5; bf16: 3e-3. FP8: the emulation's rounding, 1e-2 (its products are of other order)."""
    tolerance = 1e-2 if name in RECIPES else 1e-5 if "fp32" in str(BOTH[name]) else 3e-3
    cpu, cuda = (losses(trained[platform][name]) for platform in ("cpu", "cuda"))
    assert furthest(cpu, cuda) < tolerance
    norms = [[step["grad_norm"] for step in trained[p][name]["steps"]] for p in ("cpu", "cuda")]
    assert furthest(*norms) < max(2.0 * tolerance, 0.02 * max(norms[0])) if tolerance > 1e-5 else 1e-3


def test_z_loss_is_not_rounded_away(trained: dict[str, Any]) -> None:
    """It moves the first gradient, in bf16 as far as in fp32 (2 %)."""
    norms = {}
    for name in ("fp32", "z_loss", "bf16", "z_loss_bf16"):
        losses(trained["cuda"][name])
        norms[name] = trained["cuda"][name]["steps"][0]["grad_norm"]
    assert norms["z_loss"] > 1.05 * norms["fp32"] and norms["z_loss_bf16"] > 1.05 * norms["bf16"]
    assert norms["z_loss_bf16"] == pytest.approx(norms["z_loss"], rel=0.02)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_weights_begin_as_loaded(trained: dict[str, Any], recipe: str) -> None:
    """``fp8_param_gather``: after the first update too, for which the engine would take other master weights."""
    assert furthest(losses(trained["cuda"][f"{recipe}_gather"]), losses(trained["cuda"][recipe])) < 0.1


@pytest.mark.parametrize(("name", "other"), [("overlap", "bf16"), ("delayed_recomputed", "delayed")])
def test_same_to_the_bit(trained: dict[str, Any], name: str, other: str) -> None:
    assert losses(trained["cuda"][name]) == losses(trained["cuda"][other])


def test_moments_in_fewer_bits(trained: dict[str, Any]) -> None:
    assert 0.0 < furthest(losses(trained["cuda"]["moments"]), losses(trained["cuda"]["bf16"])) < 3e-3


def test_checkpoints_go_both_ways(trained: dict[str, Any]) -> None:
    """Local layers -> Transformer Engine's and back, in the middle of a run: fp32, 1e-5."""
    whole = losses(trained["cpu"]["fp32"])
    assert furthest(losses(trained["cuda"]["on"]), whole[2:]) < 1e-5
    assert furthest(losses(trained["cpu_on"]["on"]), whole[2:]) < 1e-5


def test_fp8_state_goes_on_to_the_bit(trained: dict[str, Any]) -> None:
    assert losses(trained["cuda"]["half8_on"]) == losses(trained["cuda"]["delayed"])[2:]


def test_fused_paths_are_taken(trained: dict[str, Any]) -> None:
    """Weight gradients into the buffer by the product, Transformer Engine's cross-entropy and its Adam."""
    cuda = trained["cuda"]
    for name, kind in (
        ("bf16", "torch.float32"),
        ("bf16_gradients", "torch.bfloat16"),
        ("fp32", "torch.float32"),
    ):
        found, calls = cuda[name]["found"], cuda[name]["calls"]
        assert found["types"] == [kind]
        assert len(found["fused"]) == 8  # four linear layers of two transformer layers
        assert calls["gemm_out"] + calls["gemm_accumulate"] == 8 * 2 * 4  # micro-batches, steps
        assert calls["cross_entropy"] == 2 * 4
        assert calls["adam"] >= 4 and calls["l2norm"] == 4
    assert "cross_entropy" not in cuda["z_loss_bf16"]["calls"]  # it would round the z-loss away


def test_frozen_weights_stay(trained: dict[str, Any]) -> None:
    found, calls = trained["cuda"]["frozen"]["found"], trained["cuda"]["frozen"]["calls"]
    assert not [name for name in found["moved"] if "layers.1." in name or "embedding" in name]
    assert [name for name in found["moved"] if "layers.0.mlp.linear_fc1.weight" in name]
    assert calls["gemm_out"] + calls["gemm_accumulate"] == 4 * 2 * 4


def test_fp8_layers_as_the_guard_has_them(trained: dict[str, Any]) -> None:
    """State, its round trip, evaluation without a trace, everything or one layer in bf16."""
    result = trained["cuda"]["delayed_watched"]
    losses(result)
    found = result["found"]
    assert len(found["names"]) == 8 == len(found["watched"])
    for fact in ("fresh", "scaled", "doubled", "quantizer_sees_it", "round_trip", "evaluated", "untouched"):
        assert found[fact], fact
    assert found["disabled"] == 0 and found["in_fp8"] > 0
    assert found["one_in_bf16"] == found["in_fp8"] // 2


def test_looking_changes_nothing(trained: dict[str, Any]) -> None:
    """The steps until a layer is put into bf16, and those of a guarded run, are those of a run left alone."""
    alone = losses(trained["cuda"]["delayed"])
    assert losses(trained["cuda"]["delayed_watched"])[:3] == alone[:3]
    assert losses(trained["cuda"]["delayed_guarded"]) == alone
    assert losses(trained["cuda"]["delayed_watched"])[3:] != alone[3:]


@pytest.mark.parametrize("name", ["overlap", "delayed", "documents"])
def test_the_host_waits_three_times_a_step(trained: dict[str, Any], name: str) -> None:
    """Whatever the number of micro-batches; and nothing is copied to the device out of a list, which waits too."""
    result = trained["cuda"][name]
    losses(result)
    waits = Counter(each.split()[1].rpartition(":")[0] for each in result["found"]["waits"])
    on_host = ["megatron/core/tensor_parallel/random.py"]  # states of the CPU's random numbers
    if name == "documents":  # their ids never leave it
        on_host.append("megatron_syne/platform/cuda.py")
    for where in on_host:
        waits.pop(where, None)
    assert waits == {where: count for where, count in WAITS.items() if where not in on_host}
    assert result["found"]["copies"] == []


def test_it_says_what_it_uses(trained: dict[str, Any]) -> None:
    line = trained["cuda"]["delayed"]["described"]
    assert "Transformer Engine 2.11" in line and "flash-attn not found" in line
    assert "attention cuDNN's" in line and "apex not found" in line and "Triton" in line
