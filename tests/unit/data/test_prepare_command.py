"""Options of ``tools/prepare_data.py`` that only its command line has, or that cross several modules."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from prepared import TEXTS, many_texts, write_jsonl

from megatron_syne.data.tokens.reader import IndexedReader


def run(repository: Path, *arguments: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    line = [sys.executable, repository / "tools" / "prepare_data.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    return subprocess.run(list(map(str, line)), input=stdin, capture_output=True, env=environment)


def test_standard_input_gives_what_a_file_gives(
    tmp_path: Path, tokenizer_dir: Path, repository: Path
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", many_texts(60))
    base = ["--tokenizer", tokenizer_dir, "--output-prefix"]
    assert run(repository, "--input", source, *base, tmp_path / "x").returncode == 0
    packed = gzip.compress(source.read_bytes())
    done = run(repository, "--input", "-", *base, tmp_path / "y", "--workers", "2", stdin=packed)
    assert done.returncode == 0, done.stderr
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"x{ending}").read_bytes() == (tmp_path / f"y{ending}").read_bytes()
    manifest = json.loads((tmp_path / "y.json").read_text())
    assert manifest["sources"][0]["file"] == "-" and manifest["sources"][0]["bytes"] == len(packed)
    cut = run(repository, "--input", "-", *base, tmp_path / "z", stdin=packed[:-9])
    assert cut.returncode == 65 and b"-:61:" in cut.stderr and b"ends early" in cut.stderr


def test_numbers_kept_lie_beside_their_documents(
    tmp_path: Path, tokenizer_dir: Path, repository: Path
) -> None:
    records = [{"text": text, "ppl": 100 / (n + 1), "rank": n} for n, text in enumerate(many_texts(40))]
    records[7]["text"] = "short"
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    base = ["--input", source, "--tokenizer", tokenizer_dir, "--output-prefix", tmp_path / "x"]
    assert run(repository, *base, "--keep", "ppl", "rank").returncode == 0
    kept = [record for record in records if record["text"] != "short"]
    for name in ("ppl", "rank"):
        numbers = np.load(tmp_path / f"x.{name}.npy", allow_pickle=False)
        assert numbers.dtype == np.float64 and numbers.tolist() == [record[name] for record in kept]
    manifest = json.loads((tmp_path / "x.json").read_text())
    assert manifest["fields"]["ppl"]["bytes"] == (tmp_path / "x.ppl.npy").stat().st_size
    assert run(repository, *base, "--overwrite", "--keep", "rank").returncode == 0
    assert not (tmp_path / "x.ppl.npy").exists() and (tmp_path / "x.rank.npy").exists()
    for field in ("../ppl", "", "a.b"):
        refused = run(repository, *base, "--overwrite", "--keep", field)
        assert refused.returncode == 64 and b"cannot name a file" in refused.stderr
    records[3]["ppl"] = float("nan")
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    refused = run(repository, *base, "--overwrite", "--keep", "ppl")
    assert refused.returncode == 65 and b"a.jsonl:4:" in refused.stderr and b"finite number" in refused.stderr


def test_a_folder_of_texts_without_eod(tmp_path: Path, tokenizer_dir: Path, repository: Path) -> None:
    (tmp_path / "in").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "in" / f"{number}.txt").write_text(text, "utf-8")
    (tmp_path / "in" / "notes.md").write_text("left out")
    base = ["--input", tmp_path / "in", "--tokenizer", tokenizer_dir, "--output-prefix", tmp_path / "x"]
    done = run(repository, *base, "--no-append-eod")
    assert done.returncode == 0 and b"1 files of other kinds are left out" in done.stderr
    reader = IndexedReader(tmp_path / "x")
    assert reader.num_documents == len(TEXTS)
    assert not any(0 in reader.document(number) for number in range(len(TEXTS)))


def test_fill_in_the_middle_needs_its_tokens(tmp_path: Path, tokenizer_dir: Path, repository: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    base = [
        "--input",
        source,
        "--tokenizer",
        tokenizer_dir,
        "--output-prefix",
        tmp_path / "x",
        "--fim-rate",
        "0.5",
    ]
    for more, message in (
        ([], b"--fim-tokens PREFIX MIDDLE SUFFIX"),
        (["--fim-tokens", "<p>", "<m>", "<s>"], b"not in the vocabulary: <p>, <m>, <s>"),
    ):
        refused = run(repository, *base, *more)
        assert refused.returncode == 64 and message in refused.stderr
    assert not list(tmp_path.glob("x*"))
