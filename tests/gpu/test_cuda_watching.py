"""Watching costs the GPU no waiting, and tells the truth. Not run on a GPU yet."""

from __future__ import annotations

import pytest

from .lab import Lab

pytestmark = pytest.mark.gpu

RUNS = ("bf16", "delayed", "tensorwise")
MEBIBYTE = 2**20


def test_marks_time_the_device_and_not_the_host(lab: Lab) -> None:
    """A mark returns at once, while the products before it take the device some time."""
    found = lab.result("main", "marks")
    lab.figure("marks", **found)
    assert found["queued"] < found["taken"] <= found["waited"]


def test_norms_are_the_cpus(lab: Lab) -> None:
    """Per layer and of the parameters, three steps in fp32: within 1e-3 of each."""
    found, expected = (lab.result(group, "norms")["rows"] for group in ("exact", "reference"))
    names = [name for name in expected[0] if "norm" in name]
    far = {
        name: max(abs(a[name] / b[name] - 1) for a, b in zip(found, expected, strict=True)) for name in names
    }
    lab.figure("norms beside the CPU's", number=len(names), largest_relative_gap=max(far.values()))
    assert len(found) == 3 and len(names) >= 4 + 3 + 2
    assert max(far.values()) < 1e-3, far


@pytest.mark.parametrize("name", RUNS)
def test_a_step_waits_for_the_device_at_most_twice(lab: Lab, name: str) -> None:
    """By torch's own count over 20 steps."""
    syncs = lab.result("main", f"watched.{name}")["syncs"]
    lab.figure("waits of the host per step", run=name, total=sum(syncs.values()), **syncs)
    assert 0 < sum(syncs.values()) <= 2, syncs


@pytest.mark.parametrize("name", RUNS)
def test_memory_does_not_grow(lab: Lab, name: str) -> None:
    """Bytes allocated after each of 21 steps: the same, give or take 1 MiB of what the logger holds."""
    allocated = lab.result("main", f"watched.{name}")["allocated"]
    lab.figure(
        "bytes allocated after a step",
        run=name,
        first=allocated[0],
        last=allocated[-1],
        largest=max(allocated),
    )
    assert len(allocated) == 21
    assert max(allocated) - allocated[0] <= MEBIBYTE
