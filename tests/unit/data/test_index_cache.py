from __future__ import annotations

import errno
import fcntl
import hashlib
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from prepared import random_documents
from token_sources import open_documents, write_source

from megatron_syne.data.tokens import index_cache
from megatron_syne.data.tokens.index_cache import CachedArray, Entry, IndexCache
from megatron_syne.data.tokens.reader import IndexedReader
from megatron_syne.data.tokens.streams import Concatenated
from megatron_syne.errors import CannotCreate, DataError

KEY = {"of": "a test", "number": 3}
FORK = multiprocessing.get_context("fork")


def content() -> Entry:
    numbers = np.random.default_rng(0).integers(0, 2**32, 3000).astype(np.uint32)
    return Entry({"total": 7}, {"a": CachedArray(numbers), "b": CachedArray(np.arange(11, dtype=np.int64))})


def same(found: index_cache.HeldEntry) -> bool:
    expected = content()
    return found.facts == expected.facts and all(
        np.array_equal(found.whole(name), array.whole()) for name, array in expected.arrays.items()
    )


def never() -> Entry:
    raise AssertionError("made again")


def entry_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_an_entry_is_made_once_and_read_in_parts(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    assert same(IndexCache(folder).hold("kind", KEY, content))
    held = IndexCache(folder).hold("kind", KEY, never)
    assert same(held) and held.size("a") == 3000
    values = content().arrays["a"].whole()
    for start, stop in ((0, 0), (0, 1), (255, 257), (2999, 3000), (0, 3000), (700, 1800)):
        assert np.array_equal(held.read("a", start, stop), values[start:stop])
    for kind, key in (("other", KEY), ("kind", {**KEY, "number": 4})):
        with pytest.raises(AssertionError, match="made again"):
            IndexCache(folder).hold(kind, key, never)
    assert len(list(folder.iterdir())) == 1  # and what failed to be made leaves nothing


def test_without_a_folder_nothing_is_kept() -> None:
    assert same(IndexCache(None).hold("kind", KEY, content))
    with pytest.raises(AssertionError, match="made again"):
        IndexCache(None).hold("kind", KEY, never)


def test_any_damage_is_noticed_told_and_made_good(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = IndexCache(tmp_path / "cache")
    cache.hold("kind", KEY, content)
    path = entry_file(tmp_path / "cache")
    data = path.read_bytes()
    rng = random.Random(0)
    damaged = [data[:keep] for keep in (0, 1, 47, 48, 200, len(data) // 2, len(data) - 1)] + [data + b"\0"]
    for at in [*range(0, 400), *rng.sample(range(len(data)), 300), len(data) - 1]:
        damaged.append(data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :])
    for wrong in damaged:
        caplog.clear()
        path.write_bytes(wrong)
        assert same(cache.hold("kind", KEY, content))
        assert "is damaged" in caplog.text and str(path) in caplog.text
        assert path.read_bytes() == data


def test_an_entry_under_another_name_is_not_taken_for_it(tmp_path: Path) -> None:
    cache = IndexCache(tmp_path / "cache")
    cache.hold("kind", {"number": 1}, content)
    one = entry_file(tmp_path / "cache")
    data = one.read_bytes()
    one.unlink()
    cache.hold("kind", {"number": 2}, content)
    other = entry_file(tmp_path / "cache")
    other.write_bytes(data)
    cache.hold("kind", {"number": 2}, content)
    assert other.read_bytes() != data


def test_damage_found_while_reading_spares_what_another_has_made_meanwhile(tmp_path: Path) -> None:
    made = []

    def make() -> Entry:
        made.append(1)
        return content()

    held = IndexCache(tmp_path / "cache").hold("kind", KEY, make)
    path = entry_file(tmp_path / "cache")
    with open(path, "r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\xff")
    IndexCache(tmp_path / "second").hold("kind", KEY, content)
    os.replace(entry_file(tmp_path / "second"), path)
    assert same(held) and made == [1]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotCreate, match=r"index cache .*file.* has to be made.*data\.index_cache"):
        IndexCache(tmp_path / "file").hold("kind", KEY, content)
    IndexCache(tmp_path / "cache").hold("kind", KEY, content)
    (tmp_path / "cache").chmod(0o555)
    try:
        assert same(IndexCache(tmp_path / "cache").hold("kind", KEY, never))
        if os.geteuid() != 0:
            with pytest.raises(CannotCreate, match="Permission denied"):
                IndexCache(tmp_path / "cache").hold("other", KEY, content)
    finally:
        (tmp_path / "cache").chmod(0o755)


def test_a_full_disk_is_told_as_that_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        IndexCache(tmp_path / "cache").hold("kind", KEY, content)
    assert list((tmp_path / "cache").iterdir()) == []


def test_where_there_are_no_locks_or_one_is_never_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = IndexCache(tmp_path / "cache")
    cache.hold("kind", KEY, content)
    path = entry_file(tmp_path / "cache")
    path.unlink()
    building = path.with_name(path.name + ".building")
    monkeypatch.setattr(index_cache, "_LONGEST_WAIT_SECONDS", 0.05)
    with open(building, "wb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert same(cache.hold("kind", KEY, content))
    assert path.exists()
    path.unlink()

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert same(cache.hold("kind", KEY, content)) and path.exists()


def rank(folder: Path, source: Path, answers: multiprocessing.SimpleQueue[str], marks: Path) -> None:
    """One rank of a job: opens the source and reads a little of two epochs."""
    made = index_cache.IndexCache.entry

    def counted(self: IndexCache, kind, key, make):  # type: ignore[no-untyped-def]
        def marked() -> Entry:
            with open(marks, "a") as stream:
                stream.write(kind + "\n")
            time.sleep(0.002)  # long enough to be killed in
            return make()

        return made(self, kind, key, marked)

    index_cache.IndexCache.entry = counted  # type: ignore[method-assign]
    documents = open_documents(source, cache=folder, top_fraction=0.7, top_by="quality")
    stream = Concatenated(documents)
    digest = hashlib.sha256()
    for position in (0, documents.tokens // 2, documents.tokens + 5):
        digest.update(repr(stream.pieces(position, 50, 50)).encode())
    answers.put(digest.hexdigest())


def test_four_ranks_of_two_jobs_race_for_the_cache_and_some_are_killed(tmp_path: Path) -> None:
    count = 300
    source = write_source(
        tmp_path / "x", random_documents(count), {"quality": [float(n % 17) for n in range(count)]}
    )
    expected: multiprocessing.SimpleQueue[str] = FORK.SimpleQueue()
    alone = FORK.Process(target=rank, args=(tmp_path / "alone", source, expected, tmp_path / "marks"))
    alone.start()
    digest = expected.get()
    alone.join()
    files = {path.name: path.read_bytes() for path in (tmp_path / "alone").iterdir()}
    assert len(files) == 4  # checks, subset, two epochs
    rng, killings = random.Random(1), 0
    for race in range(25):
        folder, marks = tmp_path / f"race{race}", tmp_path / f"marks{race}"
        answers: multiprocessing.SimpleQueue[str] = FORK.SimpleQueue()
        ranks = [FORK.Process(target=rank, args=(folder, source, answers, marks)) for _ in range(8)]
        for process in ranks:
            process.start()
        killed = rng.sample(ranks, 3) if race % 2 else []
        for process in killed:
            time.sleep(rng.uniform(0, 0.01))
            process.kill()
        for process in ranks:
            process.join(60)
            assert process.exitcode in ((0, -signal.SIGKILL) if process in killed else (0,))
        killings += sum(process.exitcode != 0 for process in ranks)
        survivors = sum(process.exitcode == 0 for process in ranks)
        assert [answers.get() for _ in range(survivors)] == [digest] * survivors
        found = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert {name: data for name, data in found.items() if not name.endswith(".building")} == files
        if not killed:
            assert found == files and len(marks.read_text().split()) == 4  # each made by one rank alone
    assert killings


def test_threads_of_one_process_wait_for_each_other_too(tmp_path: Path) -> None:
    made = []

    def slow() -> Entry:
        made.append(1)
        time.sleep(0.05)
        return content()

    cache, right = IndexCache(tmp_path / "cache"), []
    threads = [
        threading.Thread(target=lambda: right.append(same(cache.hold("kind", KEY, slow)))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 6 and len(made) == 1


def test_checks_of_an_index_are_remembered_until_a_file_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = write_source(tmp_path / "x", random_documents(40))
    cache = IndexCache(tmp_path / "cache")
    tokens = IndexedReader(prefix, cache=cache).num_tokens
    with monkeypatch.context() as patch:
        patch.setattr("megatron_syne.data.tokens.reader.check_index", lambda *_: pytest.fail("checked again"))
        assert IndexedReader(prefix, cache=cache).num_tokens == tokens
    idx = Path(f"{prefix}.idx")
    data = bytearray(idx.read_bytes())
    data[40] ^= 1
    idx.write_bytes(data)
    with pytest.raises(DataError, match=r"x\.idx"):
        IndexedReader(prefix, cache=cache)


def test_an_index_that_agrees_with_itself_but_not_with_the_manifest(tmp_path: Path) -> None:
    prefix = write_source(tmp_path / "x", [np.arange(4), np.arange(4, 10)])
    whole = Path(f"{prefix}.idx").read_bytes()
    write_source(tmp_path / "y", [np.arange(6), np.arange(6, 10)])
    Path(f"{prefix}.idx").write_bytes((tmp_path / "y.idx").read_bytes())
    with pytest.raises(DataError, match=r"x\.idx: SHA-256 is .* the manifest says"):
        IndexedReader(prefix, cache=IndexCache(tmp_path / "cache"))
    Path(f"{prefix}.idx").write_bytes(whole)
    IndexedReader(prefix, cache=IndexCache(tmp_path / "cache"))
