from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prepared import TEXTS, many_texts, write_jsonl

from megatron_syne.data.documents.atomic import Outputs
from megatron_syne.data.documents.inputs import open_input
from megatron_syne.data.preparation import prepare as room
from megatron_syne.data.preparation.prepare import Job, prepare
from megatron_syne.data.tokenizer import load_tokenizer
from megatron_syne.data.tokens.reader import IndexedReader
from megatron_syne.errors import CannotCreate, ConfigError, DataError, MissingInput, SecurityRefusal


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def adds_up(counts: dict[str, Any]) -> bool:
    return counts["lines"] == counts["documents"] + sum(counts["dropped"].values()) + counts["other_part"]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder for outputs only."""
    return tmp_path / "out"


def test_documents_tokens_and_manifest(tmp_path: Path, out: Path, tokenizer_dir: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", [TEXTS[0], "", " \n", "short", TEXTS[1]])
    second = write_jsonl(tmp_path / "b.jsonl", [TEXTS[2]])
    second.write_bytes(second.read_bytes() + b"\n")
    (manifest,) = prepare(Job([first, second], tokenizer_dir, out / "x", min_tokens=10))
    reader = IndexedReader(out / "x")
    tokenizer = load_tokenizer(tokenizer_dir)
    kept = [TEXTS[0], TEXTS[1], TEXTS[2]]
    assert [reader.document(n).tolist() for n in range(3)] == [[*tokenizer.encode(t), 0] for t in kept]
    counts = manifest["counts"]
    assert counts["dropped"] == {"blank": 1, "empty": 2, "malformed": 0, "too_short": 1}
    assert (counts["lines"], counts["documents"], counts["tokens"]) == (7, 3, reader.num_tokens)
    assert counts["bytes"] == sum(len(text.encode()) for text in kept)
    assert adds_up(counts)
    assert manifest["max_token_id"] == max(max(tokenizer.encode(text)) for text in kept)
    assert manifest["dtype"] == "uint16"
    assert manifest == json.loads((out / "x.json").read_text())
    for name in ("bin", "idx"):
        data = (out / f"x.{name}").read_bytes()
        assert manifest["files"][name] == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert [source["sha256"] for source in manifest["sources"]] == [
        hashlib.sha256(file.read_bytes()).hexdigest() for file in (first, second)
    ]
    assert sorted(files(out)) == ["x.bin", "x.idx", "x.json"]


def test_min_tokens_counts_before_eos(tmp_path: Path, out: Path, tokenizer_dir: Path) -> None:
    length = len(load_tokenizer(tokenizer_dir).encode(TEXTS[0]))
    source = write_jsonl(tmp_path / "a.jsonl", [TEXTS[0]])
    (manifest,) = prepare(Job([source], tokenizer_dir, out / "x", min_tokens=length))
    assert manifest["counts"]["tokens"] == length + 1
    with pytest.raises(DataError, match=r"no document is left of 1 lines \(.*too short 1"):
        prepare(Job([source], tokenizer_dir, out / "y", min_tokens=length + 1))
    assert sorted(files(out)) == ["x.bin", "x.idx", "x.json"]


def test_same_bytes_for_any_number_of_workers(
    tmp_path: Path, out: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", many_texts(3000))
    job = {"inputs": [source], "tokenizer": tokenizer_dir, "valid_fraction": 0.1}
    prepare(Job(**job, output_prefix=out / "one" / "x", valid_prefix=out / "one" / "v"))
    monkeypatch.setattr(room, "_BYTES_PER_WORKER", 1)
    monkeypatch.setattr(room, "open_input", partial(open_input, block_bytes=1 << 14))
    prepare(Job(**job, output_prefix=out / "two" / "x", valid_prefix=out / "two" / "v", workers=2))
    assert files(out / "one") == files(out / "two")


def test_a_bad_line_met_by_a_worker_is_named_and_nothing_is_written(
    tmp_path: Path, out: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", many_texts(2000))
    size = source.stat().st_size
    with open(source, "ab") as stream:
        stream.write(b'{"text": 1}\n{"text": 2}\n')
    monkeypatch.setattr(room, "_BYTES_PER_WORKER", 1)
    with pytest.raises(DataError, match=rf"a\.jsonl:2001:{size}: field 'text' must be a string"):
        prepare(Job([source], tokenizer_dir, out / "x", workers=2))
    assert not files(out)


def test_validation_is_disjoint_deterministic_and_keeps_copies_together(
    tmp_path: Path, out: Path, tokenizer_dir: Path
) -> None:
    texts = many_texts(400) * 2  # each document twice
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    job = Job([source], tokenizer_dir, out / "t", valid_prefix=out / "v", valid_fraction=0.2, min_tokens=5)
    train, valid = prepare(job)
    parts = [IndexedReader(out / name) for name in "tv"]
    train_texts, valid_texts = (
        {reader.document(n).tobytes() for n in range(reader.num_documents)} for reader in parts
    )
    assert not train_texts & valid_texts
    assert len(train_texts) + len(valid_texts) == 400
    assert 50 < len(valid_texts) < 110
    assert train["counts"]["documents"] + valid["counts"]["documents"] == 800
    assert adds_up(train["counts"]) and adds_up(valid["counts"])
    assert (train["split"]["part"], valid["split"]["part"]) == ("train", "valid")
    # another order of lines: the same choice
    shuffled = write_jsonl(tmp_path / "b.jsonl", texts[::-1])
    prepare(
        Job(**{**vars(job), "inputs": [shuffled], "output_prefix": out / "t2", "valid_prefix": out / "v2"})
    )
    again = IndexedReader(out / "v2")
    assert {again.document(n).tobytes() for n in range(again.num_documents)} == valid_texts
    prepare(Job(**{**vars(job), "output_prefix": out / "t3", "valid_prefix": out / "v3", "seed": 9}))
    other = IndexedReader(out / "v3")
    assert {other.document(n).tobytes() for n in range(other.num_documents)} != valid_texts


def test_skip_sets_bad_lines_aside_whole(tmp_path: Path, out: Path, tokenizer_dir: Path) -> None:
    bad = [b'{"text": "ab\xff"}', b"{", b'{"txt": "a"}', b'{"text": "\\ud800"}']
    good = json.dumps({"text": TEXTS[0]}).encode()
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"\n".join([good, *bad, good]))
    (manifest,) = prepare(Job([source], tokenizer_dir, out / "x", on_error="skip"))
    assert manifest["counts"]["dropped"]["malformed"] == 4 and manifest["counts"]["documents"] == 2
    assert adds_up(manifest["counts"])
    records = [json.loads(line) for line in (out / "x.quarantine.jsonl").read_text().splitlines()]
    assert [record["raw"].encode("utf-8", "surrogateescape") for record in records] == bad
    assert [record["line"] for record in records] == [2, 3, 4, 5]
    # once mended and prepared again, no stale quarantine is left
    source.write_bytes(good)
    prepare(Job([source], tokenizer_dir, out / "x", on_error="skip", overwrite=True))
    assert sorted(files(out)) == ["x.bin", "x.idx", "x.json"]


def test_existing_output_is_refused_and_replaced_only_when_asked(
    tmp_path: Path, out: Path, tokenizer_dir: Path
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    prepare(Job([source], tokenizer_dir, out / "x"))
    before = files(out)
    other = write_jsonl(tmp_path / "b.jsonl", many_texts(10))
    with pytest.raises(CannotCreate, match=r"x\.bin: exists already.*--overwrite"):
        prepare(Job([other], tokenizer_dir, out / "x"))
    broken = tmp_path / "c.jsonl"
    broken.write_text("{")
    with pytest.raises(DataError):
        prepare(Job([broken], tokenizer_dir, out / "x", overwrite=True))
    assert files(out) == before
    prepare(Job([other], tokenizer_dir, out / "x", overwrite=True))
    assert IndexedReader(out / "x").num_documents == 10


@pytest.mark.parametrize(
    ("change", "error", "part"),
    [
        ({"inputs": []}, ConfigError, "at least one"),
        ({"inputs": ["a.jsonl", "./a.jsonl"]}, ConfigError, "given twice"),
        ({"inputs": ["nope.jsonl"]}, MissingInput, "nope.jsonl"),
        ({"tokenizer": "nope"}, MissingInput, "no tokenizer here"),
        ({"workers": 0}, ConfigError, "--workers"),
        ({"valid_prefix": "v", "valid_fraction": 1.0}, ConfigError, "between 0 and 1"),
        ({"valid_prefix": "v", "valid_fraction": 1e-12}, DataError, "raise --valid-fraction"),
        ({"valid_prefix": "out/x"}, ConfigError, "must differ"),
        ({"json_key": "body"}, DataError, "a.jsonl:1:0: no field 'body'"),
        ({"output_prefix": "a.jsonl/x"}, CannotCreate, "cannot be created"),
    ],
)
def test_bad_jobs(
    tmp_path: Path,
    tokenizer_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    error: type[Exception],
    part: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    job = {"inputs": ["a.jsonl"], "tokenizer": tokenizer_dir, "output_prefix": "out/x"} | change
    with pytest.raises(error) as caught:
        prepare(Job(**job))
    assert part in str(caught.value)
    assert not [name for name in tmp_path.rglob("*") if name.suffix in (".bin", ".idx", ".json", ".tmp")]


def test_no_eos_named_is_refused(tmp_path: Path, out: Path, tokenizer_dir: Path) -> None:
    shutil.copy(tokenizer_dir / "tokenizer.json", tmp_path)
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(DataError, match="no end-of-text token is named"):
        prepare(Job([source], tmp_path, out / "x"))


def test_two_runs_for_one_prefix_and_left_overs_of_a_killed_one(
    tmp_path: Path, out: Path, tokenizer_dir: Path
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with Outputs() as running:
        running.create(out / "x.bin")
        with pytest.raises(CannotCreate, match="another run is writing"):
            prepare(Job([source], tokenizer_dir, out / "x"))
    assert not files(out)
    (out / "x.bin.tmp").write_bytes(b"left by a killed run, longer than what comes" * 1000)
    prepare(Job([source], tokenizer_dir, out / "x"))
    assert sorted(files(out)) == ["x.bin", "x.idx", "x.json"]
    IndexedReader(out / "x").verify()


def test_a_planted_link_is_not_written_through(tmp_path: Path, out: Path, tokenizer_dir: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    target = tmp_path / "precious"
    target.write_text("precious")
    out.mkdir()
    (out / "x.bin.tmp").symlink_to(target)
    with pytest.raises(CannotCreate):
        prepare(Job([source], tokenizer_dir, out / "x"))
    (out / "x.bin.tmp").unlink()
    os.link(target, out / "x.bin.tmp")
    with pytest.raises(SecurityRefusal):
        prepare(Job([source], tokenizer_dir, out / "x"))
    assert target.read_text() == "precious"


def test_a_full_disk_leaves_nothing(tmp_path: Path, tokenizer_dir: Path) -> None:
    """The file-size limit of the process stands in for a full disk: an OSError out of a real write()."""
    source = write_jsonl(tmp_path / "a.jsonl", many_texts(20_000))
    out = tmp_path / "out"
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from megatron_syne.data.preparation.prepare import Job, prepare\n"
        "prepare(Job([sys.argv[1]], sys.argv[2], sys.argv[3]))\n"
    )
    arguments = [str(source), str(tokenizer_dir), str(out / "x")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode != 0 and "File too large" in done.stderr
    assert not files(out)


# --- the command -------------------------------------------------------------------------------------------


def command(repository: Path, *arguments: str | Path) -> list[str]:
    return [sys.executable, str(repository / "tools" / "prepare_data.py"), *map(str, arguments)]


def run(repository: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    return subprocess.run(command(repository, *arguments), capture_output=True, text=True, env=environment)


def test_command_prepares_verifies_and_needs_no_torch(
    tmp_path: Path, out: Path, tokenizer_dir: Path, repository: Path
) -> None:
    (tmp_path / "block").mkdir()
    (tmp_path / "block" / "torch.py").write_text("raise ImportError('torch was imported')")
    source = write_jsonl(tmp_path / "a.jsonl", [*many_texts(50), "x"])
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'block'}:{repository}"}
    arguments = ["--input", source, "--tokenizer", tokenizer_dir, "--output-prefix", out / "x"]
    split = ["--valid-prefix", out / "v", "--valid-fraction", "0.2", "--workers", "2"]
    done = subprocess.run(
        command(repository, *arguments, *split), capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    assert "of 51 lines, dropped 1 (too short 1); uint16" in done.stdout
    assert sorted(files(out)) == ["v.bin", "v.idx", "v.json", "x.bin", "x.idx", "x.json"]
    assert run(repository, "--verify", out / "x", out / "v").returncode == 0
    data = bytearray((out / "x.bin").read_bytes())
    data[100] ^= 1
    (out / "x.bin").write_bytes(data)
    damaged = run(repository, "--verify", out / "v", out / "x")
    assert damaged.returncode == 65 and "x.bin: SHA-256 is" in damaged.stderr


def test_command_exit_codes(tmp_path: Path, out: Path, tokenizer_dir: Path, repository: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    base = ["--tokenizer", tokenizer_dir, "--output-prefix", out / "x"]
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "x"}\n{"text": ')
    for arguments, code, message in (
        (["--input", bad, *base], 65, f"error: {bad}:2:"),
        (["--input", tmp_path / "no", *base], 66, "no such file"),
        (base, 64, "required: --input"),
        (["--input", source, "--frob"], 64, "--frob"),
        (["--input", source, *base], 0, ""),
        (["--input", source, *base], 73, "exists already"),
    ):
        done = run(repository, *arguments)
        assert done.returncode == code, done.stderr
        assert message in done.stderr and "Traceback" not in done.stderr


def test_command_runs_several_jobs(tmp_path: Path, out: Path, tokenizer_dir: Path, repository: Path) -> None:
    jobs: list[str | Path] = []
    for name, count in (("a", 5), ("b", 7)):
        jobs += ["--job", write_jsonl(tmp_path / f"{name}.jsonl", many_texts(count)), out / name]
    done = run(repository, "--tokenizer", tokenizer_dir, *jobs)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[1].split(",")[0] for line in done.stdout.splitlines()] == [
        " 5 documents",
        " 7 documents",
    ]
    assert IndexedReader(out / "b").num_documents == 7
    assert run(repository, "--tokenizer", tokenizer_dir, *jobs, "--output-prefix", "x").returncode == 64


def half_way(process: subprocess.Popen[str], out: Path) -> list[int]:
    """Wait until tokens are written; returns the ids of the workers."""
    while process.poll() is None and not ((tmp := out / "x.bin.tmp").exists() and tmp.stat().st_size):
        time.sleep(0.02)
    assert process.poll() is None, "it finished before it could be disturbed"
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_killed_half_way_then_started_again(
    tmp_path: Path, out: Path, tokenizer_dir: Path, repository: Path
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", many_texts(32_000))
    arguments = ["--input", source, "--tokenizer", tokenizer_dir, "--output-prefix", out / "x"]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    start = partial(subprocess.Popen, env=environment, stderr=subprocess.PIPE, text=True)

    process = start(command(repository, *arguments, "--workers", "2"))
    workers = half_way(process, out)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    _, said = process.communicate()
    assert process.returncode == 74 and "error: a tokenising worker died" in said
    assert not files(out)

    process = start(command(repository, *arguments, "--workers", "2"))
    workers = half_way(process, out)
    process.kill()
    process.communicate()
    assert not (out / "x.bin").exists() and not (out / "x.json").exists()
    deadline = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers)), "workers outlived their parent"

    assert run(repository, *arguments).returncode == 0
    prepare(Job([source], tokenizer_dir, tmp_path / "other" / "x"))
    assert files(out) == files(tmp_path / "other")


def test_real_corpora_with_two_real_tokenizers(shared_data: Path, out: Path) -> None:
    for folder, dtype in (("stories260k", np.uint16), ("llama3-tokenizer", np.int32)):
        tokenizer = load_tokenizer(shared_data / folder)
        source = shared_data / "corpus" / "book-cn.jsonl"
        prefix = out / folder
        (manifest,) = prepare(Job([source], shared_data / folder, prefix))
        reader = IndexedReader(prefix)
        reader.check_vocab(tokenizer.vocab_size)
        assert reader.dtype == dtype
        assert manifest["counts"]["lines"] == 3001 and adds_up(manifest["counts"])
        assert all(reader.document(n)[-1] == tokenizer.eos_id for n in range(reader.num_documents))
        first = json.loads(source.read_text("utf-8").splitlines()[0])["text"]
        assert tokenizer.decode(reader.document(0)[:-1].tolist()) == first
