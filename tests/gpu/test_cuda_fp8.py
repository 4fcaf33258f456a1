"""Transformer Engine's FP8 for real: trains as bf16 does, agrees with its emulation, keeps its state, is guarded.

Not run yet on any machine: these tests were written without a GPU at hand.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from distributed.test_fp8_training import LIMIT, means, prepared
from test_cuda_training import gpu_missing

RECIPES = ("delayed", "tensorwise", "blockwise")
HERE = Path(__file__).resolve().parent
ENVIRONMENT = {**os.environ, "CUDA_DEVICE_MAX_CONNECTIONS": "1"}


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 steps of the demo model on the demo's mixture."""
    reason = gpu_missing()
    if reason:
        pytest.skip(reason)
    return prepared(tmp_path_factory.mktemp("cuda_fp8"))


def train(run_yaml: Path, name: str, *overrides: str) -> list[dict[str, Any]]:
    """Train with overrides; what each step logged."""
    run = run_yaml.parent / name
    subprocess.run(
        [sys.executable, "-m", "megatron_syne.train", "--config", str(run_yaml), f"run_dir={run}",
         "platform=cuda", *overrides],
        check=True,
        env=ENVIRONMENT,
    )  # fmt: skip
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def bf16(run_yaml: Path) -> list[float]:
    """Mean loss of each window of the run in bf16."""
    return means([row["loss_hex"] for row in train(run_yaml, "bf16")])


def unsupported(recipe: str) -> str | None:
    """Why this GPU has no kernels for a recipe, or None; asked in a process of its own."""
    question = "is_fp8_block_scaling_available" if recipe == "blockwise" else "is_fp8_available"
    code = (
        "import torch; from transformer_engine.pytorch.quantization import FP8GlobalStateManager as manager; "
        f"able, reason = manager.{question}(); print('' if able else reason or 'not supported')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip() or None


def needs(recipe: str) -> None:
    """Skip where there is no GPU, or none with this recipe."""
    if reason := gpu_missing() or unsupported(recipe):
        pytest.skip(f"{recipe}: {reason}")


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_loss_is_within_one_percent_of_bf16(run_yaml: Path, bf16: list[float], recipe: str) -> None:
    """300 steps: every window of 20, and so the last. The guard looks along and finds nothing."""
    needs(recipe)
    rows = train(
        run_yaml, recipe, f"precision.fp8={recipe}",
        "precision.fp8_guard.interval=50", "precision.fp8_guard.max_loss_gap=0.05",
    )  # fmt: skip
    gaps = [abs(a / b - 1) for a, b in zip(means([row["loss_hex"] for row in rows]), bf16, strict=True)]
    assert len(rows) == 300 and 0 < max(gaps) < LIMIT
    looks = [row for row in rows if "fp8/loss_gap" in row]
    assert [row["step"] for row in looks] == [50, 100, 150, 200, 250, 300]
    assert all(0 < row["fp8/loss_gap"] < 0.05 and row["fp8/bf16_layers"] == 0 for row in looks)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_looking_changes_nothing(run_yaml: Path, recipe: str) -> None:
    """Deterministic kernels, ten steps, with and without the guard: the same bits."""
    needs(recipe)
    end = ["train.exit_interval=10", f"precision.fp8={recipe}"]
    found = []
    for name, guard in (("plain", []), ("guarded", ["precision.fp8_guard.interval=3"])):
        run = run_yaml.parent / f"{name}_{recipe}"
        done = subprocess.run(
            [sys.executable, "-m", "megatron_syne.train", "--config", str(run_yaml), f"run_dir={run}",
             "platform=cuda", *end, *guard],
            env={**ENVIRONMENT, "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
        )  # fmt: skip
        assert done.returncode == 75
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found.append([row["loss_hex"] for row in rows])
    assert found[0] == found[1] and len(found[0]) == 10


@pytest.mark.gpu
def test_state_and_fallback_survive_a_resume(run_yaml: Path) -> None:
    """Stopped after step 5: the resumed run begins with the amax histories and scales that were saved."""
    needs("delayed")
    import torch

    folder = run_yaml.parent / "state"
    for part, stop in (("first", 5), ("second", 10)):
        subprocess.run(
            [sys.executable, str(HERE / "fp8_state_worker.py"), str(folder / part), str(run_yaml),
             f"run_dir={folder / 'run'}", "platform=cuda", "precision.fp8=delayed",
             "precision.fp8_guard.interval=4", "precision.fp8_guard.max_loss_gap=1.0e-12",
             f"train.exit_interval={stop}"],
            check=True,
            env=ENVIRONMENT,
        )  # fmt: skip
    end, start = (
        torch.load(folder / name, weights_only=True) for name in ("first/end.pt", "second/start.pt")
    )
    assert start["state"].keys() == end["state"].keys() and len(start["state"]) == 4 * 4 * 3 * 2
    for key, value in end["state"].items():
        assert torch.equal(start["state"][key], value), key
    assert any(value.any() for key, value in end["state"].items() if key.endswith("amax_history"))
    assert end["bf16_layers"] == [0, 1, 2, 3]  # no gap is that small, so step 4 was in bf16 already


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("fp8_format", ["hybrid", "e4m3"])
def test_the_emulation_agrees_with_the_kernels(recipe: str, fp8_format: str) -> None:
    """One linear layer, four rounds with growing values: output and both gradients to 1 % of their norm (both
    round the same values to FP8; they differ in the order of the sums and in bf16 roundings of what leaves)."""
    needs(recipe)
    done = subprocess.run(
        [sys.executable, str(HERE / "fp8_kernels_worker.py"), recipe, fp8_format],
        capture_output=True, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rounds = json.loads(done.stdout.splitlines()[-1])
    assert len(rounds) == 4
    for found in rounds:
        assert all(found[name] < 0.01 for name in ("output", "grad_input", "grad_weight")), rounds
        assert all(found[f"{name}_lossless"] > 0.01 for name in ("output", "grad_weight")), "FP8 was not on"
