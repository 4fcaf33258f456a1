"""Checkpoints pass between the CPU's local layers and Transformer Engine's, bit for bit. Not run on a GPU yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .lab import Lab

pytestmark = pytest.mark.gpu

NEXT = 0.01
"""Of the loss: five steps on another platform after five on this one, bf16, as the whole curves."""


def tensors(run: Path, step: int) -> dict[str, Any]:
    """Every tensor of a checkpoint by its key, whole; read by torch alone."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    path = run / "checkpoints" / f"iter_{step:07d}"
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state = {
        key: torch.empty(each.size, dtype=each.properties.dtype)
        for key, each in metadata.items()
        if isinstance(each, TensorStorageMetadata)
    }
    dcp.load(state, checkpoint_id=path, no_dist=True)
    return state


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Keys that are in one alone, or hold other bits."""
    import torch

    return sorted(
        key for key in one.keys() | other.keys()
        if key not in one or key not in other or not torch.equal(one[key], other[key])
    )  # fmt: skip


def test_weights_and_optimizer_come_back_to_the_bit(lab: Lab) -> None:
    """Written on the CPU, loaded into Transformer Engine's layers and optimizer, written there: the same tensors."""
    assert lab.result("exact", "resaved")["step"] == 5
    before = tensors(lab.plan.run_dir("reference", "written"), 5)
    after = tensors(lab.plan.run_dir("exact", "resaved"), 5)
    moments = [key for key in before if "exp_avg" in key]
    lab.figure("checkpoint CPU to GPU to file", tensors=len(before), of_the_optimizer=len(moments))
    # 9 kinds of parameter, the layers of one kind in one tensor: the weight, its master in fp32, two moments
    assert len(before) == 4 * 9 and len(moments) == 2 * 9 and all(bool(before[key].any()) for key in moments)
    assert differing(before, after) == []


def test_the_cpu_goes_on_from_there_as_if_it_had_never_left(lab: Lab) -> None:
    """CPU 5 steps, GPU loads and saves, CPU 5 steps more: the losses of 10 steps on the CPU, to the bit."""
    assert lab.result("back", "from_resaved")["first_step"] == 5
    assert lab.hexes("back", "from_resaved") == lab.hexes("reference", "whole")[5:10]


def near(lab: Lab, what: str, found: list[float], expected: list[float]) -> None:
    gaps = [abs(a / b - 1) for a, b in zip(found, expected, strict=True)]
    lab.figure(what, relative_gaps=gaps)
    assert len(gaps) == 5 and max(gaps) < NEXT


def test_the_gpu_goes_on_from_the_cpus_checkpoint(lab: Lab) -> None:
    assert lab.result("exact", "from_cpu")["first_step"] == 5
    found, expected = lab.losses("exact", "from_cpu"), lab.losses("reference", "whole")[5:10]
    near(lab, "GPU from the CPU's checkpoint", found, expected)


def test_the_cpu_goes_on_from_the_gpus_checkpoint(lab: Lab) -> None:
    assert lab.result("back", "from_gpu")["first_step"] == 5
    found, expected = lab.losses("back", "from_gpu"), lab.losses("exact", "stopped.second")
    near(lab, "CPU from the GPU's checkpoint", found, expected)


def test_written_beside_the_training_it_is_the_same(lab: Lab) -> None:
    """``checkpoint.async_save``: the tensors of the checkpoints at steps 5 and 10 and the losses, to the bit; nothing
    of step 5 is written before step 6 has changed all values in place."""
    assert set(lab.result("exact", "written_async")["held_back"]) == {5}
    assert lab.hexes("exact", "written_async") == lab.hexes("exact", "whole")[:10]
    lab.result("exact", "stopped.second")
    for step in (5, 10):
        at_once = tensors(lab.plan.run_dir("exact", "stopped"), step)
        beside = tensors(lab.plan.run_dir("exact", "written_async"), step)
        assert len(at_once) == 4 * 9 and differing(at_once, beside) == [], step
