"""Shared fixtures: where real inputs from outside lie, when they are there."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # megatron-core's fused functions need a compiler
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real inputs (a trained Llama, Meta's tokenizer, text) kept beside the checkout."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real inputs are absent: expected the folder ../shared/data beside the checkout")
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Callable[[str], AbstractContextManager[Path]]:
    """``with small_disk("12m") as disk``: a real disk of that size; skips where none may be mounted."""

    @contextmanager
    def mounted(size: str) -> Iterator[Path]:
        disk = tmp_path / "disk"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs the right to mount a small tmpfs")
        try:
            yield disk
        finally:
            subprocess.run(["umount", str(disk)], check=True)

    return mounted


# The files whose tests take longest, by folder or name: begun first, so that no process ends up alone with them.
LONGEST = (
    "/distributed/",
    "/slurm/",
    "test_tools",
    "test_engine",
    "test_parity",
    "/families/",
    "test_torch_dist",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; the order within a file stays."""

    def place(item: pytest.Item) -> int:
        path = item.path.as_posix()
        return next((index for index, part in enumerate(LONGEST) if part in path), len(LONGEST))

    items.sort(key=place)
