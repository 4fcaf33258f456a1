"""Which kernels a CUDA run is given, as far as that can be told without a GPU."""

from __future__ import annotations

import os
import sysconfig

import pytest
import torch

from megatron_syne.config.schema import RunConfig
from megatron_syne.platform import cuda_kernels


@pytest.mark.parametrize(
    ("fields", "failure", "expected"),
    [
        ({}, None, "te"),
        ({"precision.params_dtype": "fp32", "train.z_loss": 1e-4}, None, "te"),
        ({"train.z_loss": 1e-4}, None, "native"),  # bf16 would round it away
        ({"train.deterministic_mode": True}, None, None),
        ({}, "no C compiler", None),
    ],
)
def test_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, object], failure: str | None, expected: str | None
) -> None:
    monkeypatch.setattr(cuda_kernels, "triton_failure", lambda: failure)
    config = RunConfig(run_dir="unused")
    for name, value in ({"precision.params_dtype": "bf16"} | fields).items():
        section, _, field = name.partition(".")
        assert hasattr(getattr(config, section), field)
        setattr(getattr(config, section), field, value)
    options = cuda_kernels.cross_entropy_options(config)
    assert options["cross_entropy_loss_fusion"] is (expected is not None)
    assert options.get("cross_entropy_fusion_impl") == expected


def test_determinism_is_asked_for_and_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        cuda_kernels.be_deterministic(True)
        assert [os.environ.get(name) for name in names] == ["0", ":4096:8", "Ring"]
        assert torch.are_deterministic_algorithms_enabled()
        cuda_kernels.be_deterministic(False)
        assert "NVTE_ALLOW_NONDETERMINISTIC_ALGO" not in os.environ
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def test_triton_needs_a_compiler_and_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    find = cuda_kernels.triton_failure.__wrapped__
    monkeypatch.setattr(cuda_kernels, "import_failure", lambda module: None)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(cuda_kernels.shutil, "which", lambda name: None)
    assert "compiler" in str(find())
    monkeypatch.setattr(cuda_kernels.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    assert find() == "/nowhere/Python.h is missing (package python3-dev)"
