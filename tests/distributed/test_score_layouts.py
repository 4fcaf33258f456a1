"""Perplexities under our own model, in every layout, are those that transformers computes."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from .conftest import DEMO, make_seed
from .ranks import logs_of, run_ranks, start_ranks, wait_ranks
from .test_layouts import CP2, PP2, SP, TP2

FIRST3 = "parallel.num_layers_in_first_pipeline_stage=3"
VPP2 = "parallel.virtual_pipeline_model_parallel_size=2"
PADDED = "model.make_vocab_size_divisible_by=128"
UNEVEN = "parallel.pipeline_model_parallel_layout='Et|t|t|ttL'"

CONFIG = """
run_dir: {folder}/unused
platform: cpu
model: {{hf_path: {model}}}
precision: {{params_dtype: fp32}}
checkpoint: {{initialize_from: {model}}}
"""


def write_documents(folder: Path, texts: list[str]) -> Path:
    """JSONL with a number in each line."""
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(texts)))
    return path


def arguments_of(
    folder: Path, model: Path, tokenizer: Path, name: str, overrides: list[str], **options: int
) -> list[str]:
    """Command line of one scoring run that writes ``<name>.jsonl``."""
    config = folder / "run.yaml"
    config.write_text(CONFIG.format(folder=folder, model=model))
    more = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    return [
        "--config", str(config), *overrides, "--tokenizer", str(tokenizer), *more,
        "--input", str(folder / "in.jsonl"), "--output", str(folder / f"{name}.jsonl"),
    ]  # fmt: skip


def by_transformers(folder: Path, model: Path, tokenizer: Path, context: int) -> list[dict]:
    """The judge: each document by itself, window by window, unpadded, through transformers' own loss."""
    import torch
    from transformers import AutoModelForCausalLM

    from megatron_syne.data.tokenizer import load_tokenizer

    judge = AutoModelForCausalLM.from_pretrained(model, torch_dtype=torch.float32).eval()
    encoder = load_tokenizer(tokenizer)
    result = []
    for line in (folder / "in.jsonl").read_text().splitlines():
        ids = [encoder.bos_id, *encoder.encode(json.loads(line)["text"])]
        total = 0.0
        for at in range(0, len(ids) - 1, context):
            window = torch.tensor([ids[at : at + context + 1]])
            with torch.no_grad():
                logits = judge(window[:, :-1]).logits[0].double()
            total += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
        count = len(ids) - 1
        value = torch.tensor(total / count).exp().item() if count else None
        result.append({"perplexity": value, "tokens": count})
    return result


def largest_difference(path: Path, expected: list[dict]) -> float:
    """Largest relative difference; order, counts and nulls must be equal."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["n"] for row in found] == list(range(len(expected)))
    assert [row["tokens"] for row in found] == [row["tokens"] for row in expected]
    pairs = [(row["perplexity"], judge["perplexity"]) for row, judge in zip(found, expected, strict=True)]
    assert all((ours is None) == (theirs is None) for ours, theirs in pairs)
    return max(abs(ours / theirs - 1) for ours, theirs in pairs if ours is not None)


@pytest.mark.slow
def test_stories260k_in_every_layout(shared_data: Path, tmp_path: Path) -> None:
    model = shared_data / "stories260k"
    lines = (shared_data / "corpus" / "book-en.jsonl").read_text().splitlines()[:9]
    whole = [json.loads(line)["text"] for line in lines]
    texts = [text[: 40 + 350 * n] for n, text in enumerate(whole)]
    texts += ["", "a", "Once upon a time, there was a little girl named Lily. " * 60]
    write_documents(tmp_path, texts)
    expected = by_transformers(tmp_path, model, model, context=200)
    layouts = {
        2: {"tp2_sp": [TP2, SP], "pp2": [PP2, FIRST3], "cp2": [CP2], "dp2": []},
        4: {
            "tp2_pp2_sp": [TP2, PP2, FIRST3, SP],
            "tp2_dp2": [TP2],
            "pp2_vpp2_dp2": [PP2, VPP2, UNEVEN],
            "tp2_cp2_sp": [TP2, CP2, SP],
            "pp2_vpp2_cp2": [PP2, VPP2, UNEVEN, CP2],
        },
    }
    for world_size, named in layouts.items():
        jobs = tmp_path / "jobs.json"
        jobs.write_text(
            json.dumps([
                arguments_of(tmp_path, model, model, name, overrides, context=200, batch_tokens=500)
                for name, overrides in named.items()
            ])
        )  # fmt: skip
        run_ranks(world_size, ["-m", "distributed.score_worker", str(jobs)])
        for name in named:
            difference = largest_difference(tmp_path / f"{name}.jsonl", expected)
            print(f"stories260k {name}: {difference:.1e}")
            assert difference <= 1e-3, name


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """SIGKILL in the midst of it: the second run begins where the first was.

    The vocabulary is padded by 245 rows; each would add exp(0) to the denominator if it counted.
    """
    model, tokenizer = make_seed(tmp_path / "seed", vocab_size=2571), DEMO / "base_model"
    lines = (DEMO / "texts" / "en_web.valid.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"][:300] for line in lines]
    with (tmp_path / "in.jsonl").open("w") as stream:  # parts of 4 MiB
        stream.writelines(
            json.dumps({"text": texts[n % len(texts)], "n": n, "ballast": "x" * 100_000}) + "\n"
            for n in range(200)
        )
    command = ["-m", "megatron_syne.score"]
    run_ranks(2, [*command, *arguments_of(tmp_path, model, tokenizer, "whole", [TP2, PADDED])])
    expected = by_transformers(tmp_path, model, tokenizer, context=256)
    assert largest_difference(tmp_path / "whole.jsonl", expected) <= 1e-5

    killed = arguments_of(tmp_path, model, tokenizer, "killed", [TP2, PADDED])
    ranks = start_ranks(2, [*command, *killed])
    journal = tmp_path / "killed.jsonl.journal"
    end = time.monotonic() + 120
    while not journal.exists() or journal.read_bytes().count(b"\n") < 2:
        assert time.monotonic() < end and ranks[0].poll() is None, logs_of(ranks[0])
        time.sleep(0.005)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGKILL)
    wait_ranks(ranks)
    assert not (tmp_path / "killed.jsonl").exists()
    ranks = start_ranks(2, [*command, *killed])
    assert wait_ranks(ranks) == [0, 0], logs_of(ranks[0])
    assert "goes on after" in logs_of(ranks[0])
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not journal.exists()


def test_a_bad_line_ends_all_ranks(tmp_path: Path) -> None:
    model, tokenizer = make_seed(tmp_path / "seed", vocab_size=2571), DEMO / "base_model"
    (tmp_path / "in.jsonl").write_text('{"text": "good"}\n{"text": 3}\n')
    ranks = start_ranks(
        2, ["-m", "megatron_syne.score", *arguments_of(tmp_path, model, tokenizer, "out", [])]
    )
    assert wait_ranks(ranks) == [65, 70]
    assert "in.jsonl:2:" in logs_of(ranks[0]) and "Traceback" not in logs_of(ranks[0]) + logs_of(ranks[1])
    assert not (tmp_path / "out.jsonl").exists()
