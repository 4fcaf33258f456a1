"""What each platform makes of document ids. On CUDA only the arithmetic, on the host: no GPU is touched."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

IDS = [[0, 0, 1, 2, 2, 2, 5, 5]]

SNIPPET = """
import json, sys
from megatron_syne.errors import run_cli

def main():
    import torch
    from megatron_syne.platform.{module} import {kind}
    platform = {kind}()
    platform._device = torch.device("cpu")
    mask, packed = platform.document_attention(torch.tensor({ids}, dtype=torch.int32))
    print(json.dumps({{
        "mask": None if mask is None else [list(mask.shape), mask.int().tolist()],
        "packed": None if packed is None else [
            packed.qkv_format, packed.cu_seqlens_q.tolist(), packed.cu_seqlens_kv.tolist(),
            str(packed.cu_seqlens_q.dtype), packed.max_seqlen_q, packed.max_seqlen_kv],
    }}))

sys.exit(run_cli(main))
"""


def attention(module: str, kind: str, ids: list[list[int]]) -> subprocess.CompletedProcess[str]:
    code = SNIPPET.format(module=module, kind=kind, ids=ids)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_cpu_masks_the_later_and_the_others() -> None:
    done = attention("cpu", "CpuPlatform", IDS)
    found = json.loads(done.stdout)
    assert found["packed"] is None and found["mask"][0] == [1, 1, 8, 8]
    seen = [[int(not (i >= j and IDS[0][i] == IDS[0][j])) for j in range(8)] for i in range(8)]
    assert found["mask"][1] == [[seen]]


def test_cuda_packs_the_lengths() -> None:
    done = attention("cuda", "CudaPlatform", IDS)
    assert json.loads(done.stdout) == {
        "mask": None,
        "packed": ["thd", [0, 2, 3, 6, 8], [0, 2, 3, 6, 8], "torch.int32", 3, 3],
    }


@pytest.mark.parametrize("rows", [2, 3])
def test_cuda_packs_one_sample_at_a_time(rows: int) -> None:
    done = attention("cuda", "CudaPlatform", IDS * rows)
    assert done.returncode == 64 and f"needs train.micro_batch_size 1, found {rows}" in done.stderr
