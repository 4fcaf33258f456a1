"""The files are those of megatron-core's builder and of Megatron-LM's script, byte for byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from prepared import many_texts, write_jsonl

from megatron_syne.data.preparation.prepare import Job, prepare
from megatron_syne.data.tokenizer import load_tokenizer


@pytest.mark.parametrize("folder", ["stories260k", "llama3-tokenizer"])
@pytest.mark.parametrize("eod", [True, False])
def test_same_bytes_as_megatron_core(tmp_path: Path, shared_data: Path, folder: str, eod: bool) -> None:
    pytest.importorskip("megatron.core")
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    source = write_jsonl(tmp_path / "a.jsonl", many_texts(300))
    tokenizer = load_tokenizer(shared_data / folder)
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for text in many_texts(300):
        tokens = tokenizer.encode(text) + ([tokenizer.eos_id] if eod else [])
        builder.add_document(np.array(tokens), [len(tokens)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    prepare(Job([source], shared_data / folder, tmp_path / "ours", append_eod=eod))
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"ours{ending}").read_bytes() == (tmp_path / f"theirs{ending}").read_bytes()


@pytest.mark.parametrize("eod", [True, False])
def test_same_bytes_as_megatron_lms_script(tmp_path: Path, shared_data: Path, eod: bool) -> None:
    checkout = os.environ.get("MEGATRON_LM")
    if not checkout:
        pytest.skip("MEGATRON_LM names no checkout of Megatron-LM")
    corpus = [
        json.loads(line)["text"]
        for line in (shared_data / "corpus/book-cn.jsonl").read_text("utf-8").splitlines()
    ]
    source = write_jsonl(tmp_path / "a.jsonl", [text for text in corpus if text.strip()][:500])
    folder = shared_data / "llama3-tokenizer"
    python = os.environ.get("MEGATRON_LM_PYTHON", sys.executable)
    script = [
        python,
        Path(checkout) / "tools/preprocess_data.py",
        "--input",
        source,
        "--workers",
        "1",
    ]
    kind = [
        "--tokenizer-type",
        "HuggingFaceTokenizer",
        "--tokenizer-model",
        folder,
        "--tokenizer-hf-no-include-special-tokens",
    ]
    out = ["--output-prefix", tmp_path / "theirs", *(["--append-eod"] if eod else [])]
    path = os.pathsep.join([checkout, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [str(part) for part in [*script, *kind, *out]], capture_output=True, text=True, env=environment
    )
    last = done.stderr.strip().splitlines()[-1:]
    if last and last[0].startswith(("ModuleNotFoundError", "ImportError")):
        pytest.skip(f"this Megatron-LM does not run with {python}: {last[0]}")
    assert done.returncode == 0, done.stderr[-2000:]
    prepare(Job([source], folder, tmp_path / "ours", min_tokens=0, append_eod=eod))
    for ending in (".bin", ".idx"):
        theirs = tmp_path / f"theirs_text_document{ending}"
        assert (tmp_path / f"ours{ending}").read_bytes() == theirs.read_bytes()


def test_bos_is_put_before_each_document(tmp_path: Path, tokenizer_dir: Path) -> None:
    from megatron_syne.data.tokens.reader import IndexedReader

    texts = many_texts(20)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    tokenizer = load_tokenizer(tokenizer_dir)
    for eod in (True, False):
        prepare(
            Job([source], tokenizer_dir, tmp_path / "x", prepend_bos=True, append_eod=eod, overwrite=True)
        )
        reader = IndexedReader(tmp_path / "x")
        end = [tokenizer.eos_id] if eod else []
        for number, text in enumerate(texts):
            expected = [tokenizer.bos_id, *tokenizer.encode(text), *end]
            assert reader.document(number).tolist() == expected
