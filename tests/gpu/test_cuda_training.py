"""The CUDA platform for real: Transformer Engine in bf16 and FP8, one process, from the demo's base model.

Not run yet on any machine: these tests were written without a GPU at hand.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO = REPOSITORY / "examples" / "demo"


def gpu_missing() -> str | None:
    """Why these tests cannot run here, or None."""
    probe = subprocess.run(
        [sys.executable, "-c", "import torch, sys; sys.exit(not torch.cuda.is_available())"],
        capture_output=True,
    )
    if probe.returncode:
        return "no CUDA GPU is visible"
    probe = subprocess.run(
        [sys.executable, "-c", "import torch, transformer_engine.pytorch"], capture_output=True, text=True
    )
    if probe.returncode:
        return f"Transformer Engine cannot be imported: {(probe.stderr.splitlines() or ['?'])[-1]}"
    return None


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps on English text, from the demo's base model."""
    reason = gpu_missing()
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("cuda")
    subprocess.run(
        [sys.executable, str(REPOSITORY / "tools/prepare_data.py"), "--tokenizer", str(DEMO / "base_model"),
         "--input", str(DEMO / "texts/en_web.valid.jsonl"), "--output-prefix", str(folder / "en")],
        check=True,
    )  # fmt: skip
    (folder / "run.yaml").write_text(f"""
run_dir: run
model: {{hf_path: {DEMO / "base_model"}}}
data:
  seq_length: 256
  sources: {{en: {{path: en, max_epochs: .inf}}}}
  stages: [{{name: only, tokens: 81920, mixture: {{en: 1.0}}}}]
optimizer: {{lr: 3.0e-4}}
schedule: {{lr_decay_style: constant}}
train: {{micro_batch_size: 4, global_batch_size: 16}}
checkpoint: {{initialize_from: {DEMO / "base_model"}}}
monitor: {{tensorboard: false}}
""")
    return folder / "run.yaml"


def losses(run_yaml: Path, name: str, *overrides: str) -> list[float]:
    """Train with overrides; the loss of each step."""
    run = run_yaml.parent / name
    subprocess.run(
        [
            sys.executable,
            "-m",
            "megatron_syne.train",
            "--config",
            str(run_yaml),
            f"run_dir={run}",
            *overrides,
        ],
        check=True,
        env={**os.environ, "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
    )
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.gpu
def test_bf16_on_the_gpu_follows_bf16_on_the_cpu(run_yaml: Path) -> None:
    """Different kernels, same arithmetic: within 1 % of the loss at every step."""
    on_gpu, on_cpu = losses(run_yaml, "gpu", "platform=cuda"), losses(run_yaml, "cpu", "platform=cpu")
    assert len(on_gpu) == len(on_cpu) == 20
    assert max(abs(a / b - 1) for a, b in zip(on_gpu, on_cpu, strict=True)) < 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_fp8_recipe_follows_bf16(run_yaml: Path, recipe: str) -> None:
    """Within 3 % of bf16 at every one of 20 steps."""
    bf16 = losses(run_yaml, f"bf16_beside_{recipe}", "platform=cuda")
    fp8 = losses(run_yaml, recipe, "platform=cuda", f"precision.fp8={recipe}")
    assert max(abs(a / b - 1) for a, b in zip(fp8, bf16, strict=True)) < 0.03
