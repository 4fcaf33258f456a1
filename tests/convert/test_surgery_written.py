"""Surgery through the real planner and engine: any format out, a certificate that tells the whole story."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from surgery_toys import logits, same_bits, whole

from megatron_syne.config.schema import ParallelConfig
from megatron_syne.convert.certificate import read_certificate, verify
from megatron_syne.convert.engine import convert
from megatron_syne.convert.formats.detect import open_weights
from megatron_syne.convert.formats.hf import open_hf, plan_hf
from megatron_syne.convert.formats.shards import plan_shards
from megatron_syne.convert.surgery.depth import expand_blocks
from megatron_syne.convert.surgery.merging import add_task_vectors, slerp
from megatron_syne.convert.surgery.record import read_record
from megatron_syne.convert.surgery.vocabulary import extend_vocab
from megatron_syne.errors import CannotCreate


@pytest.mark.parametrize("jobs", [1, 4])
def test_a_merge_is_written_and_verified(tmp_path: Path, toy_maker: Any, jobs: int) -> None:
    """SLERP's first pass is made by whichever thread comes first: the bytes are the same."""
    a, b = (toy_maker(tmp_path / n, torch.bfloat16, initializer_range=r) for n, r in (("a", 0.1), ("b", 0.2)))
    merged = slerp(open_hf(a), open_hf(b), 0.4)
    convert(merged, plan_hf(merged, max_shard_size="30KB"), tmp_path / "out", jobs=jobs)
    verify(tmp_path / "out")
    assert same_bits(open_hf(tmp_path / "out"), slerp(open_hf(a), open_hf(b), 0.4))
    source = read_certificate(tmp_path / "out")["source"]
    assert source["operation"] == "merge-slerp" and source["parameters"] == {"t": 0.4}
    assert {name: entry["folder"] for name, entry in source["inputs"].items()} == {"1": "a", "2": "b"}
    assert set(source["files"]) == {"1/model.safetensors", "2/model.safetensors"}


def test_operations_are_chained_into_shards_and_back(
    tmp_path: Path, toy_maker: Any, shared_data: Path
) -> None:
    """extend-vocab, then expand-blocks, written as shards, read back, merged with itself, written for the hub."""
    stories, tokenizer = shared_data / "stories260k", tmp_path / "tokenizer"
    tokenizer.mkdir()
    shutil.copyfile(stories / "tokenizer.model", tokenizer / "tokenizer.model")
    (tokenizer / "added_tokens.json").write_text(json.dumps({"<|user|>": 512, "<|model|>": 513}))
    first = extend_vocab(open_hf(stories), tokenizer, init="subword")
    both = expand_blocks(first, num_new=1)
    parallel = ParallelConfig(tensor_model_parallel_size=4, pipeline_model_parallel_size=2)
    convert(both, plan_shards(both, parallel), tmp_path / "shards")
    verify(tmp_path / "shards")
    shards = open_weights(tmp_path / "shards")
    assert same_bits(shards, both)
    record = read_record(tmp_path / "shards")
    assert record is not None
    assert record["new_layers"] == [5] and record["new_tokens"] == [[512, 514]]
    assert [one["operation"] for one in record["operations"]] == ["extend-vocab", "expand-blocks"]
    again = add_task_vectors(shards, [open_weights(tmp_path / "shards")], [1.0])
    convert(again, plan_hf(again), tmp_path / "hf")
    assert same_bits(open_hf(tmp_path / "hf"), both)
    inner = read_certificate(tmp_path / "hf")["source"]["inputs"]["base"]["certificate"]
    assert inner["operation"] == "expand-blocks"
    assert inner["inputs"]["source"]["inputs"]["source"]["folder"] == "stories260k"
    text = torch.arange(3, 60)[None]
    assert torch.allclose(logits(stories, text), logits(tmp_path / "hf", text)[..., :512], atol=1e-5)
    assert {"tokenizer.model", "added_tokens.json"} <= {p.name for p in (tmp_path / "hf").iterdir()}


def test_nothing_is_written_into_an_input(tmp_path: Path, toy_maker: Any) -> None:
    a, b = toy_maker(tmp_path / "a"), toy_maker(tmp_path / "b")
    merged = slerp(open_hf(a), open_hf(b), 0.5)
    with pytest.raises(CannotCreate, match="never written to"):
        convert(merged, plan_hf(merged), b / "out")
    assert not (b / "out").exists()


def test_memory_and_torch(tmp_path: Path, toy_maker: Any) -> None:
    """Neither an embedding nor a layer is ever whole in memory, and torch is not imported."""
    big = {"num_hidden_layers": 1, "vocab_size": 60000, "hidden_size": 512, "intermediate_size": 64}
    toy = toy_maker(tmp_path / "toy", torch.bfloat16, **big)  # two tables of 61 MB
    program = """
import resource, sys
from pathlib import Path
import numpy, blake3
from megatron_syne.convert.formats.hf import open_hf, plan_hf
from megatron_syne.convert.surgery.merging import slerp, add_task_vectors
from megatron_syne.convert.surgery.derived import Derived

a, b = open_hf(Path(sys.argv[1])), open_hf(Path(sys.argv[1]))
block = numpy.empty((1000, 1024), numpy.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for merged in (slerp(a, b, 0.5), add_task_vectors(a, [b, a], [1, 1])):
    for first in range(0, 60000, 1000):
        merged.read("lm_head.weight", (first, first + 1000), block)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, "torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(toy)], capture_output=True, text=True, timeout=300, check=True
    )
    megabytes, torch_there = done.stdout.split()
    assert int(megabytes) < 40 and torch_there == "False"


def test_a_tile_at_the_seam_of_old_and_new_rows(tmp_path: Path, toy_maker: Any, shared_data: Path) -> None:
    stories, tokenizer = shared_data / "stories260k", tmp_path / "tokenizer"
    tokenizer.mkdir()
    shutil.copyfile(stories / "tokenizer.model", tokenizer / "tokenizer.model")
    (tokenizer / "added_tokens.json").write_text(json.dumps({f"<{i}>": 512 + i for i in range(9)}))
    found = extend_vocab(open_hf(stories), tokenizer, init="random", pad_to=16)
    name = "model.embed_tokens.weight"
    at_once = whole(found, name)
    for rows in (1, 7, 511, 513):
        assert np.array_equal(whole(found, name, rows), at_once)
