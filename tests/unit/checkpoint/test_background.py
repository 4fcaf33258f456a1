"""Copies in host memory, threads that write, and where a parameter lies across ranks."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from megatron_syne.checkpoint import background
from megatron_syne.checkpoint.background import Abandoned, Beside, HostCopies, write_bucket
from megatron_syne.checkpoint.capture import parts_of


def test_copies_are_kept_apart_from_what_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "wait_for_device", lambda: None)
    copies = HostCopies(pin=False)
    live = [torch.arange(6.0).view(2, 3), torch.ones(4, dtype=torch.bfloat16)]
    first = [copies.copy(each) for each in live]
    copies.wait()
    for each in live:
        each.add_(1)
    assert first[0].tolist() == [[0, 1, 2], [3, 4, 5]] and first[1].tolist() == [1] * 4
    copies.begin()
    again = [copies.copy(each) for each in live]
    assert [each.data_ptr() for each in again] == [each.data_ptr() for each in first]
    assert again[0].tolist() == [[1, 2, 3], [4, 5, 6]]
    copies.begin()
    other = copies.copy(torch.zeros(5))
    assert other.shape == (5,)


def test_locked_memory_is_unlocked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it is freed, and where it gives way to another size; where locking fails it is used as it is."""
    locked: list[int] = []
    monkeypatch.setattr(background, "page_lock", lambda tensor: locked.append(tensor.numel()) or 0)
    monkeypatch.setattr(background, "unlock", lambda tensor: locked.remove(tensor.numel()))
    copies = HostCopies(pin=True)
    for sizes, expected in (((3, 4, 5), [3, 4, 5]), ((3, 6, 5), [3, 5, 6]), ((3, 6, 5), [3, 5, 6])):
        copies.begin()
        for size in sizes:
            copies.copy(torch.ones(size))
        assert sorted(locked) == expected
    copies.close()
    assert not locked
    monkeypatch.setattr(background, "page_lock", lambda tensor: 2)
    assert copies.copy(torch.ones(3)).tolist() == [1, 1, 1] and not copies.pin
    copies.close()


def test_work_beside_hands_on_its_result_and_its_error() -> None:
    gate = threading.Event()
    work = Beside(gate.wait)
    assert not work.done
    gate.set()
    assert work.result() is True and work.done

    def fails() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        Beside(fails).result()


def test_writing_stops_when_told_to(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    from torch.distributed.checkpoint.filesystem import _StorageWriterTransforms
    from torch.distributed.checkpoint.metadata import MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

    item = WriteItem(index=MetadataIndex("w"), type=WriteItemType.TENSOR)
    bucket = (str(tmp_path / "a"), "a", ([], [(item, torch.ones(3))]))
    with pytest.raises(Abandoned):
        write_bucket(bucket, _StorageWriterTransforms(), stop)
    stop.clear()
    (result,) = write_bucket(bucket, _StorageWriterTransforms(), stop)
    assert result.size_in_bytes == (tmp_path / "a").stat().st_size


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0, 10, {0: range(10)}),
        (5, 15, {0: range(5), 1: range(5, 10)}),
        (10, 20, {1: range(10)}),
        (2, 38, {0: range(8), 1: range(8, 18), 2: range(18, 28), 3: range(28, 36)}),
    ],
)
def test_parts_cover_a_parameter(start: int, end: int, expected: dict[int, range]) -> None:
    assert parts_of(start, end, shard=10, size=4) == expected
