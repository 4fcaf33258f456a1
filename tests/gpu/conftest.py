"""Where the GPU tests run: on a GPU, or with ``--rehearse`` on the CPU platform, or nowhere.

    pytest -m gpu tests/gpu              # on a machine with a GPU and Transformer Engine
    pytest tests/gpu --rehearse          # the same tests on the CPU platform: proves the machinery, no kernel
    pytest tests/gpu --rehearse stand-in # on the CUDA platform's own code over tests/unit/te_cpu, with Transformer
                                         # Engine's Python files on PYTHONPATH

``MEGATRON_SYNE_GPU_FIGURES``: a file to which each test appends what it measured, one JSON object per line.
``MEGATRON_SYNE_SHARED_DATA``: the folder of real inputs, where it does not lie beside the checkout.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_syne.platform.base import has_gpu

from .lab import ENVIRONMENT, Lab

ORDER = ("basics", "training", "checkpoints", "resume", "fp8", "memory", "watching")
"""The most important first: a lease may end before the tests do."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Known where ``tests/gpu`` is named on the command line."""
    places = ("cpu", "stand-in")
    parser.addoption(
        "--rehearse", nargs="?", const="cpu", choices=places, help="run the GPU tests without a GPU"
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In the order of :data:`ORDER`; other folders' tests stay where they are."""
    here = Path(__file__).parent
    places = [index for index, item in enumerate(items) if item.path.parent == here]
    own = sorted(
        (items[i] for i in places), key=lambda item: ORDER.index(item.path.stem.removeprefix("test_cuda_"))
    )
    for index, item in zip(places, own, strict=True):
        items[index] = item


def gpu_missing() -> str | None:
    """Why these tests cannot run here, or None; asked in a process of its own, so that CUDA does not start here, and
    not at all where there is no driver."""
    if not has_gpu() and shutil.which("nvidia-smi") is None:
        return "no CUDA GPU is visible"
    code = (
        "import torch, sys\n"
        "if not torch.cuda.is_available(): sys.exit('no CUDA GPU is visible')\n"
        "import transformer_engine.pytorch, megatron.core"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    return (done.stderr.splitlines() or ["?"])[-1] if done.returncode else None


@pytest.fixture(scope="session")
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """The session's worker processes and what they found."""
    rehearse = request.config.getoption("--rehearse", default=None)
    if not rehearse and (reason := gpu_missing()):
        pytest.skip(reason)
    shared = os.environ.get("MEGATRON_SYNE_SHARED_DATA")
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    found = Lab(tmp_path_factory.mktemp("gpu"), rehearse, Path(shared) if shared else beside)
    yield found
    found.stop()
