"""The parts of a step are timed on the device. Not run yet on any machine: written without a GPU at hand."""

from __future__ import annotations

import subprocess
import sys

import pytest

# a mark returns at once, while the products before it take the device some time
CODE = """
import time, torch
from megatron_syne.platform.cuda import CudaPlatform
platform = CudaPlatform()
assert platform.device_name == torch.cuda.get_device_name(0)
a = torch.randn(8192, 8192, device="cuda")
a @ a
torch.cuda.synchronize()
began = time.perf_counter()
begin = platform.mark()
for _ in range(50):
    a @ a
end = platform.mark()
queued = time.perf_counter() - began
float(a[0, 0])
waited = time.perf_counter() - began
taken = platform.seconds_between(begin, end)
assert queued < taken <= waited, (queued, taken, waited)
"""


@pytest.mark.gpu
def test_marks_time_the_device_and_not_the_host() -> None:
    probe = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    if subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode:
        pytest.skip("no CUDA GPU is visible")
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
