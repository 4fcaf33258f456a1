"""No platform starts on a machine that cannot carry it, and none falls back in silence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SNIPPET = """
import sys
from megatron_syne.config.schema import PrecisionConfig
from megatron_syne.errors import run_cli

def main():
    {body}

sys.exit(run_cli(main))
"""


def run_python(body: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter: platforms are chosen before anything heavy is imported."""
    return subprocess.run(
        [sys.executable, "-c", SNIPPET.format(body=body)],
        capture_output=True,
        text=True,
        env={**os.environ, "TORCH_COMPILE_DISABLE": "1", **env},
    )


def test_cuda_without_a_gpu_is_refused() -> None:
    done = run_python(
        "from megatron_syne.platform.base import select\n    select('cuda').start(0, PrecisionConfig())",
        CUDA_VISIBLE_DEVICES="",
    )
    assert done.returncode == 64, done.stderr
    assert "platform: cuda" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("fp8", ["delayed", "tensorwise", "blockwise"])
def test_fp8_without_transformer_engine_names_the_import(fp8: str) -> None:
    done = run_python(
        "from megatron_syne.platform.cuda import require_transformer_engine\n"
        f"    require_transformer_engine(PrecisionConfig(fp8='{fp8}'))"
    )
    assert done.returncode == 64, done.stderr
    assert f"precision.fp8: '{fp8}'" in done.stderr
    assert "import transformer_engine failed: ModuleNotFoundError" in done.stderr


def test_a_broken_transformer_engine_is_named_too(tmp_path: Path) -> None:
    """It raises RuntimeError where a library is missing, not ImportError."""
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text(
        "raise RuntimeError('cudnn shared object not found.')"
    )
    done = run_python(
        "from megatron_syne.platform.cuda import require_transformer_engine\n"
        "    require_transformer_engine(PrecisionConfig(fp8='delayed'))",
        PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
    )
    assert done.returncode == 64, done.stderr
    assert "RuntimeError: cudnn shared object not found." in done.stderr


def test_a_broken_transformer_engine_does_not_touch_the_cpu_platform(tmp_path: Path) -> None:
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise RuntimeError('empty meta package')")
    done = run_python(
        "from megatron_syne.platform.base import select\n"
        "    select('cpu').start(0, PrecisionConfig())\n"
        "    import torch\n"
        "    assert torch.empty(1, device='cuda').device.type == 'cpu'",
        PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("fp8", "expected"), [("'delayed'", True), ("None", False)])
def test_the_cpu_platform_says_that_fp8_is_emulated(fp8: str, expected: bool) -> None:
    done = run_python(
        "from megatron_syne.platform.base import select\n"
        "    platform = select('cpu')\n"
        f"    platform.start(0, PrecisionConfig(fp8={fp8}))\n"
        "    print(platform.describe())"
    )
    assert done.returncode == 0, done.stderr
    assert ("; FP8 delayed, emulated (bf16 products)" in done.stdout) == expected
    assert ("FP8" in done.stdout) == expected


def test_the_cpu_platform_hides_gpus() -> None:
    done = run_python(
        "import os\n"
        "    from megatron_syne.platform.base import select\n"
        "    select('cpu')\n"
        "    assert os.environ['CUDA_VISIBLE_DEVICES'] == ''",
        CUDA_VISIBLE_DEVICES="0",
    )
    assert done.returncode == 0, done.stderr


def test_what_is_addressed_to_cuda_stays_on_the_cpu() -> None:
    """By every spelling that the engine and torch have, with other options and without."""
    done = run_python(
        "from megatron_syne.platform.base import select\n"
        "    select('cpu').start(0, PrecisionConfig())\n"
        "    import torch\n"
        "    x = torch.ones(2)\n"
        "    moved = [x.to('cuda', non_blocking=True), x.to('cuda'), x.to(device='cuda', dtype=torch.bfloat16),\n"
        "             x.cuda(0), x.cuda(non_blocking=True), torch.zeros(2, device='cuda', pin_memory=True)]\n"
        "    assert all(each.device == torch.device('cpu') for each in moved)\n"
        "    assert moved[2].dtype is torch.bfloat16 and x.type(torch.float64).dtype is torch.float64\n"
        "    assert x.type() == 'torch.cuda.FloatTensor'"
    )
    assert done.returncode == 0, done.stderr
