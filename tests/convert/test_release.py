"""Release folders: complete, loadable by transformers, true to the run, within the licence, nothing private."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_syne.config.loader import load_config
from megatron_syne.convert.certificate import verify
from megatron_syne.convert.engine import convert
from megatron_syne.convert.formats.detect import open_weights
from megatron_syne.data.mixture.ledger import make_ledger
from megatron_syne.data.mixture.planning import plan_mixture
from megatron_syne.errors import CannotCreate, ConfigError, DataError, MissingInput, SecurityRefusal
from megatron_syne.release.folder import plan_release, publish

LLAMA3 = "META LLAMA 3 COMMUNITY LICENSE AGREEMENT\n\nMeta Llama 3 Version Release Date: April 18, 2024\n"
NOTICE = (
    "Meta Llama 3 is licensed under the Meta Llama 3 Community License, "
    "Copyright © Meta Platforms, Inc. All Rights Reserved."
)
TOKEN = "hf_" + "Q" * 34

RUN = """
run_dir: .
platform: cpu
parallel: {tensor_model_parallel_size: 2, pipeline_model_parallel_size: 2, sequence_parallel: true}
data:
  seq_length: 256
  sources:
    en: {path: data/en}
    zh_web: {path: data/zh_web}
    zh_book: {path: data/zh_book}
    qa: {path: data/qa}
  stages:
    - name: bilingual_adaptation
      tokens: 1_000_000
      mixture:
        zh: {share: 0.2, of: {zh_web: 0.7, zh_book: 0.3}}
        en: 0.8
    - {name: synthetic_enhancement, tokens: 400_000, mixture: {en: 0.8, qa: 0.2}}
optimizer: {lr: 1.0e-3, min_lr: 1.0e-4}
schedule:
  lr_decay_style: WSD
  lr_warmup_init: 1.0e-5
  lr_warmup_tokens: 40_000
  lr_wsd_decay_iters: 90
  lr_wsd_decay_style: minus_sqrt
train: {micro_batch_size: 8, global_batch_size: 16}
checkpoint: {initialize_from: shards}
launch: {env: {WANDB_API_KEY: 0123456789abcdef0123456789abcdef01234567}}
"""
STATE: dict[str, Any] = {
    "layout": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "data_parallel_size": 3},
}
ORIGIN = {
    "source": {
        "kind": "hf",
        "folder": "Meta-Llama-3-8B",
        "hub": {"id": "meta-llama/Meta-Llama-3-8B", "revision": "c" * 40},
        "files": {"model.safetensors": {"size": 5, "sha256": "a" * 64}},
    }
}


@pytest.fixture(scope="session")
def base(toy_maker: Any, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy Llama with a tokenizer that transformers can open, under Meta's licence."""
    demo = repository / "examples" / "demo" / "base_model"
    folder: Path = toy_maker(tmp_path_factory.mktemp("release") / "base", vocab_size=2560)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, folder / name)
    (folder / "LICENSE").write_text(LLAMA3)
    return folder


@pytest.fixture
def source(base: Path, tmp_path: Path) -> Path:
    """A copy of the toy that a test may change."""
    return Path(shutil.copytree(base, tmp_path / "base"))


def write_state(checkpoint: Path, step: int, text: str = RUN) -> None:
    """``state.json`` of a run of ``text`` at a step, with the ledger that training would have written."""
    config_file = checkpoint.parent / "of_state.yaml"
    config_file.write_text(text)
    plan = plan_mixture(load_config(config_file))
    config_file.unlink()
    state = {"step": step, "consumed_samples": 16 * step, "consumed_tokens": 16 * 256 * step}
    content = {**STATE, "state": state, "data": make_ledger(plan, 16 * step, {})}
    (checkpoint / "state.json").write_text(json.dumps(content))


@pytest.fixture
def run_dir(base: Path, tmp_path: Path) -> Path:
    """A run folder, its weights kept as Hugging Face folders."""
    folder = tmp_path / "runs" / "syne"
    for step in (100, 300):
        checkpoint = folder / "checkpoints" / f"iter_{step:07d}"
        shutil.copytree(base, checkpoint)
        write_state(checkpoint, step)
    (folder / "checkpoints" / "iter_0000400.tmp").mkdir()
    (folder / "config.yaml").write_text(RUN)
    (folder / "shards").mkdir()
    (folder / "shards" / "certificate.json").write_text(json.dumps(ORIGIN))
    rows: list[dict[str, Any]] = [
        {"step": 100, "validation": {"en": 3.0}},
        {"step": 300, "loss": 2.5},
        {"step": 300, "validation": {"en": 2.0, "zh_web": 1.5}},
        {"step": 320, "validation": {"en": 9.0}},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines + '{"step": 330, "validation": {"en"')
    return folder


def release(source: Path, out: Path, **options: Any) -> Path:
    """Plan and publish with the usual name."""
    publish(plan_release(source, **{"name": "Llama-3-Toy"} | options), out)
    return out


def card(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_complete_and_checkable(base: Path, tmp_path: Path) -> None:
    out = release(base, tmp_path / "out", max_shard_size="300KB", dtype="fp32")
    names = left(out)
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= set(names)
    assert {"LICENSE", "NOTICE", "README.md", "SHA256SUMS", "certificate.json"} <= set(names)
    assert len([name for name in names if name.endswith(".safetensors")]) > 1
    assert all((out / n).stat().st_size < 1_000_000 for n in names if n.endswith(".safetensors"))
    done = subprocess.run(
        ["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=out, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert {line.removesuffix(": OK") for line in done.stdout.splitlines()} == set(names) - {"SHA256SUMS"}
    assert left(tmp_path) == ["out"], "something was left beside it"


def test_transformers_loads_it(base: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    out = release(base, tmp_path / "out", dtype="bf16")
    ours, theirs = (AutoModelForCausalLM.from_pretrained(f, dtype="auto") for f in (out, base))
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    wanted = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, wanted[name].to(torch.bfloat16)), name
    text = "The release 发布"
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer(text).input_ids == AutoTokenizer.from_pretrained(base)(text).input_ids
    assert GenerationConfig.from_pretrained(out).eos_token_id == theirs.generation_config.eos_token_id


def test_front_matter_as_the_hub_reads_it(base: Path, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    options = {"base_model": "meta-llama/Meta-Llama-3-8B", "languages": ("en", "zh")}
    out = release(base, tmp_path / "out", **options)
    assert hub.ModelCard.load(out / "README.md").data.to_dict() == {
        "license": "llama3",
        "base_model": "meta-llama/Meta-Llama-3-8B",
        "language": ["en", "zh"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["megatron-core"],
    }


def test_a_base_that_is_no_hub_id_stays_out_of_the_front_matter(base: Path, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    out = release(base, tmp_path / "out", base_model="our base")
    assert "base_model" not in hub.ModelCard.load(out / "README.md").data.to_dict()
    assert "| Base model | our base |" in card(out)


def test_card_of_a_run(run_dir: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps({"C-Eval": {"accuracy": 0.5123, "shots": 5}, "MMLU": {"accuracy": 0.6}}))
    out = release(run_dir, tmp_path / "out", base_model="meta-llama/Meta-Llama-3-8B", evaluation=scores)
    text = card(out)
    # 1,000,000 and 400,000 tokens in batches of 16 x 256: 245 and 98 steps; of 300 done 55 are in stage 2
    first, second = 245 * 4096, 55 * 4096
    for line in (
        "**Built with Meta Llama 3**",
        "Llama-3-Toy is meta-llama/Meta-Llama-3-8B after continual pre-training on 1,228,800 tokens.",
        "| Licence | Meta Llama 3 Community License (text: [LICENSE](LICENSE)) |",
        f"1. bilingual_adaptation: {first:,} of {first:,} planned tokens",
        f"2. synthetic_enhancement: {second:,} of {98 * 4096:,} planned tokens",
        f"|  | zh_web | 14 % | {549 * 256:,} |",  # of 3,920 samples
        f"|  | zh_book | 5.99 % | {235 * 256:,} |",
        f"| bilingual_adaptation | en | 80 % | {3136 * 256:,} |",
        f"|  | qa | 20 % | {round(0.2 * second):,} |",
        "| Tokens | 1,228,800 |",
        "| Optimizer steps | 300 of 343 planned |",
        "| Sequence length | 256 |",
        "| Global batch | 16 sequences = 4,096 tokens |",
        "| Optimizer | AdamW, beta 0.9 and 0.95, epsilon 1e-08, weight decay 0.1, gradient norm clipped to 1 |",
        "| Learning rate | from 1e-05 to 0.001 over the first 40,000 tokens, then constant at 0.001, then minus_sqrt "
        "decay to 0.0001 over the 90 steps before the last step planned (WSD) |",
        "| Precision | bf16 with fp32 master weights, gradients accumulated in fp32 |",
        "| Layout | TP 2 x PP 2 x CP 1 x DP 3, distributed optimizer |",
        "| Hardware | not recorded |",
        "sources, at step 300,",
        f"| en | 2.0000 | {math.exp(2):.2f} |",
        f"| zh_web | 1.5000 | {math.exp(1.5):.2f} |",
        "| C-Eval | accuracy | 0.5123 |",
        "|  | shots | 5 |",
        "- converted from: Hugging Face folder `iter_0000300`, step 300 of the run",
        "- the run started from: `shards`",
        f"- which was made from: Hugging Face folder `Meta-Llama-3-8B` (meta-llama/Meta-Llama-3-8B at revision "
        f"`{'c' * 40}` of the hub)",
        f"    - `model.safetensors` SHA-256 `{'a' * 64}`",
    ):
        assert line in text, f"{line}\n\nnot in\n\n{text}"
    assert "continual-pretraining" in text
    whole = b"".join(path.read_bytes() for path in out.iterdir() if path.suffix != ".safetensors").decode()
    assert str(tmp_path) not in whole and "0123456789abcdef0123456789abcdef01234567" not in whole


def test_card_of_an_earlier_checkpoint(run_dir: Path, tmp_path: Path) -> None:
    text = card(release(run_dir / "checkpoints" / "iter_0000100", tmp_path / "out"))
    assert "| Optimizer steps | 100 of 343 planned |" in text
    assert "sources, at step 100," in text and "| en | 3.0000 | 20.09 |" in text
    assert f"2. synthetic_enhancement: 0 of {98 * 4096:,} planned tokens" in text


def test_what_is_unknown_is_not_made_up(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "metrics.jsonl").unlink()
    shutil.rmtree(run_dir / "shards")
    file = run_dir / "checkpoints" / "iter_0000300" / "state.json"
    state = json.loads(file.read_text())
    state["layout"]["data_parallel_size"] = None
    file.write_text(json.dumps(state))
    text = card(release(run_dir, tmp_path / "out"))
    assert "| Layout | TP 2 x PP 2 x CP 1 x DP not recorded, distributed optimizer |" in text
    assert "## Evaluation\n\nNot recorded." in text
    assert "| Base model | not recorded |" in text and "| Languages | not recorded |" in text
    assert "- which was made from: not recorded" in text


def test_card_of_scaled_rope(toy_maker: Any, tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    source = toy_maker(tmp_path / "base", rope_scaling=scaling, tie_word_embeddings=True)
    text = card(release(source, tmp_path / "out", licence="mit"))
    said = "500000, Llama-3.1's scaling: factor 32, low 1, high 4, original length 64"
    assert f"| Rotary base | {said} |" in text
    assert "| Vocabulary | 131, embedding and output layer tied |" in text
    config = json.loads((source / "config.json").read_text())
    numbers = 40 * (131 + 1) + 4 * (40 * (2 * 8 + 2 * 4) * 6 + 3 * 40 * 72 + 2 * 40)
    assert config["num_hidden_layers"] == 4 and f"| Parameters | {numbers:,} |" in text


def test_card_of_weights_without_a_run(base: Path, tmp_path: Path) -> None:
    text = card(release(base, tmp_path / "out"))
    assert text.count("\n\nNot recorded.\n") == 3  # data, procedure, evaluation
    assert "How they were trained is not recorded here." in text


def test_the_same_card_twice(run_dir: Path, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    first, second = (release(run_dir, tmp_path / name / "out") for name in "ab")
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {
        p.name: p.read_bytes() for p in second.iterdir()
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "SynE-8B"}, ["name: 'SynE-8B'", "begins with “Llama 3”", "Llama-3-SynE-8B", "--own-terms"]),
        (
            {"licence": "apache-2.0"},
            ["contradict each other", "apache-2.0 (given)", "llama3 (the text in LICENSE)"],
        ),
        ({"base_model": "meta-llama/Llama-3.1-8B"}, ["llama3.1 (of meta-llama/Llama-3.1-8B)"]),
        ({"licence": "My Licence"}, ["is no identifier of the hub"]),
        ({"name": "org/Llama-3"}, ["without the organisation"]),
        ({"languages": ("english",)}, ["language: 'english'"]),
        ({"name": "x", "languages": ("english",)}, ["name: 'x'", "language: 'english'"]),
    ],
)
def test_options_that_cannot_be(
    base: Path, tmp_path: Path, options: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        release(base, tmp_path / "out", **options)
    assert all(word in str(caught.value) for word in words), caught.value
    assert left(tmp_path) == []


def test_metas_licence_must_travel(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "llama3.txt"
    text.write_text(LLAMA3)
    (source / "LICENSE").unlink()
    options: dict[str, Any] = {"base_model": "meta-llama/Meta-Llama-3-8B"}
    with pytest.raises(ConfigError, match=r"must travel with the weights \(section 1.b.i\)"):
        release(source, tmp_path / "out", **options)
    out = release(source, tmp_path / "out", licence_file=text, **options)
    assert (out / "LICENSE").read_text() == LLAMA3
    assert (out / "NOTICE").read_text(encoding="utf-8") == NOTICE + "\n"


def test_no_licence_is_told(source: Path, tmp_path: Path) -> None:
    (source / "LICENSE").unlink()
    with pytest.raises(ConfigError, match="licence: not given"):
        release(source, tmp_path / "out")
    out = release(source, tmp_path / "out", licence="mit", name="Toy")
    assert "NOTICE" not in left(out) and "Built with" not in card(out)


def test_own_terms(base: Path, tmp_path: Path) -> None:
    plan = plan_release(base, name="SynE", own_terms=True)
    assert len(plan.warnings) == 1 and "begins with" in plan.warnings[0]
    publish(plan, tmp_path / "out")


def test_a_notice_that_is_there_is_kept(source: Path, tmp_path: Path) -> None:
    (source / "NOTICE").write_text("Ours.\n")
    out = release(source, tmp_path / "out")
    assert (out / "NOTICE").read_text(encoding="utf-8") == f"Ours.\n\n{NOTICE}\n"
    again = release(out, tmp_path / "again")
    assert (again / "NOTICE").read_bytes() == (out / "NOTICE").read_bytes()


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        (
            "generation_config.json",
            f'{{\n "token": "{TOKEN}"\n}}',
            "generation_config.json:2: a Hugging Face token",
        ),
        ("tokenizer_config.json", '{"x": "/data/me/model"}', "tokenizer_config.json:1: an absolute path"),
        ("tokenizer_config.json", '{"x": "\\/home\\/me\\/x"}', "tokenizer_config.json:1: a home directory"),
        (
            "chat_template.jinja",
            "\n{# https://me:pass@host/ #}",
            "chat_template.jinja:2: a URL with a password",
        ),
        ("LICENSE", LLAMA3 + "-----BEGIN RSA PRIVATE KEY-----\n", "LICENSE:4: a private key"),
    ],
)
def test_private_things_are_found(source: Path, tmp_path: Path, file: str, text: str, found: str) -> None:
    (source / file).write_text(text)
    with pytest.raises(SecurityRefusal) as caught:
        release(source, tmp_path / "out")
    assert found in str(caught.value)
    assert TOKEN not in str(caught.value) and "pass@" not in str(caught.value), "repeated in the message"
    assert left(tmp_path) == ["base"]


def test_private_things_in_the_run_are_found(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", "zh-book-5931")
    text = RUN.replace("zh_book", "zh-book-5931")
    (run_dir / "config.yaml").write_text(text)
    write_state(run_dir / "checkpoints" / "iter_0000300", 300, text)
    with pytest.raises(SecurityRefusal, match=r"README.md:\d+: the value of \$MY_API_KEY"):
        release(run_dir, tmp_path / "out")


def test_where_a_file_was_loaded_from_is_dropped(source: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        values = json.loads((source / name).read_text())
        values |= {"_name_or_path": "../secret_project/base", "name_or_path": "/home/me/base"}
        if name == "tokenizer_config.json":
            values["special_tokens_map_file"] = "/home/me/.cache/x.json"
        (source / name).write_text(json.dumps(values))
    out = release(source, tmp_path / "out")
    for name in ("config.json", "tokenizer_config.json"):
        assert not {"_name_or_path", "name_or_path", "special_tokens_map_file"} & set(
            json.loads((out / name).read_text())
        )


def test_bad_evaluation_file(base: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores.json"
    scores.write_text('{"MMLU": 0.5}')
    with pytest.raises(DataError, match="MMLU: expected an object of metric to number"):
        release(base, tmp_path / "out", evaluation=scores)
    with pytest.raises(MissingInput):
        release(base, tmp_path / "out", evaluation=tmp_path / "none.json")


@pytest.mark.parametrize("content", ['{"state": {"step": 1}}', '{"state": [], "layout": {}}', "{", "[]"])
def test_bad_state(run_dir: Path, tmp_path: Path, content: str) -> None:
    (run_dir / "checkpoints" / "iter_0000300" / "state.json").write_text(content)
    with pytest.raises(DataError, match=r"state\.json"):
        release(run_dir, tmp_path / "out")


def test_a_run_without_a_checkpoint(run_dir: Path, tmp_path: Path) -> None:
    shutil.rmtree(run_dir / "checkpoints")
    with pytest.raises(MissingInput, match="no checkpoint"):
        release(run_dir, tmp_path / "out")


def test_hostile_names_stay_in_their_cells(run_dir: Path, tmp_path: Path) -> None:
    text = RUN.replace("bilingual_adaptation", '"a | b\\n# Heading <script>"')
    (run_dir / "config.yaml").write_text(text)
    write_state(run_dir / "checkpoints" / "iter_0000300", 300, text)
    lines = card(release(run_dir, tmp_path / "out")).splitlines()
    assert "# Heading" not in "".join(line for line in lines if line.startswith("#"))
    assert any(line.startswith("| a \\| b # Heading &lt;script> | en |") for line in lines)


def test_a_training_checkpoint_of_megatron(run_dir: Path, base: Path, tmp_path: Path) -> None:
    """The same run with its newest checkpoint as training leaves it: torch_dist, with the documents in hf/."""
    torch_dist = pytest.importorskip("megatron_syne.convert.formats.torch_dist")
    checkpoint = run_dir / "checkpoints" / "iter_0000300"
    shutil.rmtree(checkpoint)
    weights = open_weights(base)
    convert(weights, torch_dist.plan_torch_dist(weights), checkpoint)
    weights.close()
    write_state(checkpoint, 300)
    out = release(run_dir, tmp_path / "out", dtype="fp32")
    assert "- converted from: torch_dist checkpoint `iter_0000300`, step 300 of the run" in card(out)
    first, second = open_weights(base), open_weights(out)
    for name, shape in first.shapes.items():
        rows = shape[0]
        ours, theirs = (np.empty((rows, w.row_bytes(name)), np.uint8) for w in (second, first))
        second.read(name, (0, rows), ours)
        first.read(name, (0, rows), theirs)
        assert np.array_equal(ours, theirs), name
    first.close()
    second.close()


def test_verify(base: Path, tmp_path: Path) -> None:
    out = release(base, tmp_path / "out", dtype=None)
    assert verify(out, base).kind == "hf"
    sums = out / "SHA256SUMS"
    lines = sums.read_text().splitlines(keepends=True)
    sums.write_text("".join(lines[1:]))
    with pytest.raises(DataError, match="SHA256SUMS"):
        verify(out)
    sums.write_text("0" * 64 + lines[0][64:] + "".join(lines[1:]))
    with pytest.raises(DataError, match="SHA256SUMS"):
        verify(out)


def test_existing_output(base: Path, tmp_path: Path) -> None:
    out = release(base, tmp_path / "out")
    before = (out / "README.md").read_bytes()
    with pytest.raises(CannotCreate, match="exists already"):
        release(base, out, name="Llama-3-Other")
    assert (out / "README.md").read_bytes() == before
    publish(plan_release(base, name="Llama-3-Other"), out, overwrite=True)
    assert "# Llama-3-Other" in card(out) and left(tmp_path) == ["out"]
    with pytest.raises(CannotCreate, match="source is never written to"):
        release(out, out / "inside")
    with pytest.raises(CannotCreate, match="cannot be made"):
        release(base, tmp_path / "absent" / "out")


@pytest.mark.parametrize("moment", ["before it was published", "in the middle of taking the old one's place"])
def test_killed_at_the_end(base: Path, tmp_path: Path, moment: str) -> None:
    whole = release(base, tmp_path / "whole")
    work = tmp_path / ".out.release"
    work.mkdir()
    shutil.copytree(whole, work / "out")
    (work / "out" / "SHA256SUMS").write_text("half a li")
    if moment.startswith("in the middle"):
        shutil.copytree(whole, work / "out.old")
    out = release(base, tmp_path / "out")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in whole.iterdir()
    }
    assert left(tmp_path) == ["out", "whole"]


def test_bad_values_leave_nothing(source: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 1e6)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match="fp16 cannot hold"):
        release(source, tmp_path / "out", dtype="fp16")
    assert left(tmp_path) == ["base"]


def test_two_at_once(base: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.release").mkdir()
    lock = os.open(tmp_path / ".out.release", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(CannotCreate, match="another process is making this release"):
        release(base, tmp_path / "out")
    os.close(lock)
    release(base, tmp_path / "out")


def test_no_torch(base: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path\n"
        "from megatron_syne.release.folder import plan_release, publish\n"
        f"publish(plan_release(Path({str(base)!r}), name='Llama-3-Toy'), Path({str(tmp_path / 'out')!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
