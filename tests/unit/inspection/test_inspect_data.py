"""What ``inspect_data`` shows is what the files hold, what training reads, and what a checkpoint says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_syne.checkpoint.folder import checkpoint_path, seal
from megatron_syne.config.loader import load_config
from megatron_syne.data.batches import BatchBuilder, BatchForm
from megatron_syne.data.build import training_dataset
from megatron_syne.data.mixture.ledger import make_ledger
from megatron_syne.data.mixture.planning import plan_mixture
from megatron_syne.data.tokenizer import load_tokenizer
from megatron_syne.data.tokens.reader import IndexedReader
from megatron_syne.errors import EXIT_CONFIG, EXIT_DATA, EXIT_NO_INPUT, run_cli
from megatron_syne.inspection.samples import opened, sample_lines
from tools import inspect_data, prepare_data

ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "examples" / "demo"
MODEL = DEMO / "base_model"
SOURCES = ("en_web", "zh_web", "zh_book")

CONFIG = """
run_dir: {folder}/run
platform: cpu
model: {{hf_path: {model}}}
data:
  seq_length: 256
  tokenizer_path: {model}
  sources:
    en_web: {{path: {folder}/en_web, max_epochs: 5}}
    zh_web: {{path: {folder}/zh_web, max_epochs: 5}}
    zh_book: {{path: {folder}/zh_book}}
  stages:
    - name: bilingual
      tokens: 30000
      mixture: {{en_web: 0.8, zh: {{share: 0.2, of: {{zh_web: 0.7, zh_book: 0.3}}}}}}
    - {{name: synthetic, tokens: 10000, mixture: {{en_web: 0.5, zh_book: 0.5}}, seq_length: 128}}
train: {{micro_batch_size: 1, global_batch_size: 4}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three prepared sources, ``run.yaml``."""
    folder = tmp_path_factory.mktemp("inspect")
    for name in SOURCES:
        arguments = ["--input", DEMO / f"texts/{name}.valid.jsonl", "--tokenizer", MODEL]
        assert prepare_data.main([*map(str, arguments), "--output-prefix", str(folder / name)]) == 0
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder, model=MODEL))
    return folder


def show(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What the command prints."""
    capsys.readouterr()
    assert run_cli(lambda: inspect_data.main(list(map(str, arguments)))) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], code: int, *arguments: str | Path) -> str:
    """What it says when it ends with ``code``."""
    capsys.readouterr()
    assert run_cli(lambda: inspect_data.main(list(map(str, arguments)))) == code
    return capsys.readouterr().err


def test_documents_are_the_texts_that_were_prepared(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [
        json.loads(line)["text"] for line in (DEMO / "texts/zh_web.valid.jsonl").read_text().splitlines()
    ]
    out = show(
        capsys, "documents", place / "zh_web", "--tokenizer", MODEL, "--index", 5, 0, "--characters", 0
    )
    summary, fifth, first = out.split("── document ")
    assert fifth.partition("\n")[2].strip() == f"{texts[5]}<|end_of_text|>"
    assert first.partition("\n")[2].strip() == f"{texts[0]}<|end_of_text|>"
    reader = IndexedReader(place / "zh_web")
    assert f"{len(texts)} documents, {reader.num_tokens:,} tokens" in summary
    assert reader.manifest is not None and reader.manifest["tokenizer"]["fingerprint"][:16] in summary
    assert "dropped too short 0" in summary and "zh_web.valid.jsonl" in summary
    assert (
        f"5 of {len(texts)}: {reader.document_lengths[5]:,} tokens, from token {reader.document_start(5):,}"
        in fifth
    )


def test_documents_without_tokenizer_manifest_or_sense(place: Path, tmp_path: Path, shared_data: Path,
                                                       capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    ids = IndexedReader(place / "en_web").document(0).tolist()
    for suffix in (".bin", ".idx"):
        (tmp_path / f"foreign{suffix}").write_bytes((place / f"en_web{suffix}").read_bytes())
    out = show(capsys, "documents", tmp_path / "foreign", "--index", 0, "--characters", 0)
    assert " ".join(map(str, ids)) in out and "no manifest" in out
    other = shared_data / "stories260k"
    assert "another tokenizer" in refused(
        capsys, EXIT_DATA, "documents", place / "en_web", "--tokenizer", other
    )
    assert "of 52 documents" in refused(capsys, EXIT_CONFIG, "documents", place / "en_web", "--index", 52)
    refused(capsys, EXIT_NO_INPUT, "documents", place / "absent")


def test_a_document_cannot_steer_the_terminal(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "Ordinary words and then \x1b[2J\x1b]0;title\x07 and \u202eturned round\u202c, to the end of it."
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": evil}) + "\n")
    arguments = ["--input", tmp_path / "in.jsonl", "--tokenizer", MODEL, "--output-prefix", tmp_path / "evil"]
    assert prepare_data.main(list(map(str, arguments))) == 0
    out = show(capsys, "documents", tmp_path / "evil", "--tokenizer", MODEL)
    assert "\\x1b[2J" in out and not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]", out)


@pytest.mark.parametrize("options", [[], ["data.eod_mask_loss=true"], ["data.packing=best_fit"],
                                     ["data.packing=best_fit", "data.eod_mask_loss=true"]])  # fmt: skip
def test_samples_are_what_training_reads(options: list[str], place: Path) -> None:
    """Text, marks and boundaries, held to the batch that the loader makes."""
    config = load_config(place / "run.yaml", options)
    dataset, tokenizer = opened(config, None), load_tokenizer(MODEL)
    judge = training_dataset(config, plan_mixture(config), 2560)
    marks = 0
    for index in [*range(0, 40), 150]:
        batch = BatchBuilder(judge, 1, 1, form=BatchForm.of(config.data)).micro_batch(index)
        tokens, mask = batch["tokens"][0], batch["loss_mask"][0]
        head, *parts = "\n".join(sample_lines(dataset, index, config, tokenizer, None)).split("\n── ")
        where = judge.where(index)
        assert f"stage {where.stage}, source {where.source}, epoch {where.epoch};" in head
        assert f"step {index // 4 + 1}, " in head and f"{int(mask.sum())} predicted" in head
        documents = [part for part in parts if part.startswith("document ")]
        at = 0
        for part, (document, start, stop) in zip(documents, where.ranges, strict=True):
            title, _, text = part.partition("\n")
            assert title.startswith(f"document {document}, tokens {start:,} to {stop:,}, ")
            assert ("to its end" in title) == (
                stop == judge.streams[where.source].documents.reader.document_lengths[document]
            )
            ids = tokens[at : at + stop - start]
            # position i of the batch predicts token i + 1
            hidden = [int(token) for n, token in enumerate(ids, at) if n and mask[n - 1] == 0]
            assert re.sub("[⟪⟫]", "", text) == tokenizer.decode(ids.tolist()) or hidden
            assert [tokenizer.decode([token]) for token in hidden] == re.findall("⟪(.*?)⟫", text, re.DOTALL)
            marks += len(hidden)
            at += stop - start
        padding = [part for part in parts if part.startswith("padding")]
        assert padding == ([f"padding: {len(tokens) - at} tokens"] if at < len(tokens) else [])
    assert (marks > 0) == ("data.eod_mask_loss=true" in options)


def test_a_step_is_its_global_batch(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = show(capsys, "samples", "--config", place / "run.yaml", "--step", 32).splitlines()
    config = load_config(place / "run.yaml")
    dataset = opened(config, None)
    assert lines[0] == "step 32: samples 124 to 127, stage synthetic"
    for index, line in zip(range(124, 128), lines[1:], strict=True):
        where = dataset.where(index)
        assert line.split()[:4] == [str(index), f"{where.source},", "epoch", f"{where.epoch},"]
    assert "of 50 iterations" in refused(
        capsys, EXIT_CONFIG, "samples", "--config", place / "run.yaml", "--step", 51
    )
    assert "of 200 samples" in refused(
        capsys, EXIT_CONFIG, "samples", "--config", place / "run.yaml", "--index", 200
    )


@pytest.fixture
def run_dir(place: Path, tmp_path: Path) -> Path:
    """A run that was re-weighted at sample 20 and has a checkpoint after sample 40, and an older one."""
    config = load_config(place / "run.yaml")
    plan = plan_mixture(config)
    facts = training_dataset(config, plan, 2560).source_facts()
    changed = plan.with_shares(20, {"zh_web": 0.06, "zh_book": 0.14}, "reweighting zh")
    changes = [{"sample": 20, "step": 5, "reason": "reweighting zh", "detail": {"zh_web": [0.14, 0.06]}}]
    for step, now, told in ((5, plan, []), (10, changed, changes)):
        folder = checkpoint_path(tmp_path / "run" / "checkpoints", step)
        folder.mkdir(parents=True)
        state = {"step": step, "consumed_samples": 4 * step}
        ledger = make_ledger(now, 4 * step, facts, told)
        (folder / "state.json").write_text(json.dumps({"state": state, "data": ledger}))
        seal(folder, {})
    (tmp_path / "run" / "config.yaml").write_text((place / "run.yaml").read_text())
    return tmp_path / "run"


def test_a_run_under_way_is_shown_as_it_went(
    run_dir: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Samples after the re-weighting are those of the ledger's plan, not the configuration's."""
    config = load_config(place / "run.yaml")
    fresh = opened(config, None)
    ledger = json.loads((run_dir / "checkpoints/iter_0000010/state.json").read_text())["data"]
    assert ledger["plan"] != json.loads(json.dumps(plan_mixture(config).to_dict()))
    moved = opened(config, str(run_dir))
    differing = [n for n in range(120) if moved.where(n) != fresh.where(n)]
    assert differing and min(differing) >= 20
    out = show(capsys, "samples", "--run", run_dir, "--index", differing[0])
    where = moved.where(differing[0])
    assert f"source {where.source}, epoch 0;" in out and f"document {where.ranges[0].document}," in out


def test_consumed(run_dir: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Counted anew, sample by sample."""
    from PIL import Image

    picture = run_dir / "consumed.png"
    out = show(capsys, "consumed", run_dir, "--output", picture)
    dataset = opened(load_config(place / "run.yaml"), str(run_dir))
    samples = {name: sum(dataset.where(n).source == name for n in range(40)) for name in SOURCES}
    assert "step 10 of 50, 40 of 200 samples" in out
    block = out.split("\nall ")[1]
    for name in SOURCES:
        found = re.search(rf"^  {name} +(\S+) +(\S+) +(\S+) +(\S+)$", block, re.MULTILINE)
        assert found is not None, out
        tokens = samples[name] * 256
        assert found.groups() == (
            str(samples[name]), f"{tokens:,}", f"{samples[name] / 40:.4f}",
            f"{tokens / IndexedReader(place / name).num_tokens:.3f}",
        )  # fmt: skip
    assert 'changed at sample 20, step 5: reweighting zh, {"zh_web": [0.14, 0.06]}' in out.replace("'", '"')
    with Image.open(picture) as image:
        assert image.size == (1500, 600) and (255, 0, 0) in set(image.convert("RGB").getdata()), (
            "where it stands"
        )


def test_consumed_of_damaged_and_missing_runs(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no checkpoint" in refused(capsys, EXIT_NO_INPUT, "consumed", tmp_path)
    state = run_dir / "checkpoints/iter_0000010/state.json"
    text = state.read_text().replace('"consumed_samples": 40', '"consumed_samples": 41')  # of the same size
    state.write_text(text.replace('"consumed_samples": 41', '"consumed_samples": 40', 1))
    assert "state.json: data.consumed_samples" in refused(capsys, EXIT_DATA, "consumed", run_dir)


def test_plan(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    out = show(capsys, "plan", "--config", place / "run.yaml", "--output", tmp_path / "m.png")
    assert re.search(r"^stage bilingual +120 +30,720 ", out, re.MULTILINE)
    assert re.search(r"^  zh_web +0.1400 +17 +4,352 +0.22 +0.22$", out, re.MULTILINE)
    with Image.open(tmp_path / "m.png") as image:
        assert image.size == (1500, 600) and len(set(image.convert("RGB").getdata())) > 10
    show(capsys, "plan", "--config", place / "run.yaml", "--output", tmp_path / "m.html")
    assert "zh_web: %{y:.2%} of the samples, 0.22" in (tmp_path / "m.html").read_text(encoding="utf-8")
    short = ["data.sources.zh_book.max_epochs=0.01"]
    assert "note: data.sources.zh_book" in show(capsys, "plan", "--config", place / "run.yaml", *short)


def test_histogram(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    prefixes = [place / name for name in SOURCES]
    out = show(capsys, "histogram", *prefixes, "--output", tmp_path / "l.png")
    for name in SOURCES:
        reader = IndexedReader(place / name)
        lengths = np.array(reader.document_lengths)
        assert re.search(rf"^{name} +{len(lengths):,} +{lengths.sum():,} .* {lengths.min():,} +.* {lengths.max():,}$",
                         out, re.MULTILINE)  # fmt: skip
        column = SOURCES.index(name)
        for low, high in ((64, 127), (128, 255), (256, 511), (512, 1023)):
            row = re.search(rf"^ *{low:,} to {high:,} +(.*)$", out, re.MULTILINE)
            assert row is not None
            assert int(row[1].split()[column]) == ((lengths >= low) & (lengths <= high)).sum()
    with Image.open(tmp_path / "l.png") as image:
        assert image.size == (1400, 500) and len(set(image.convert("RGB").getdata())) > 10
    assert "given twice" in refused(capsys, EXIT_CONFIG, "histogram", prefixes[0], prefixes[0])
    assert "as .png" in refused(capsys, EXIT_CONFIG, "histogram", prefixes[0], "--output", tmp_path / "x.jpg")


def test_text_needs_neither_torch_nor_matplotlib(place: Path, run_dir: Path) -> None:
    commands = [
        ["documents", str(place / "en_web"), "--tokenizer", str(MODEL)],
        ["histogram", str(place / "en_web")],
        ["plan", "--config", str(place / "run.yaml")],
        ["samples", "--config", str(place / "run.yaml"), "--index", "7"],
        ["consumed", str(run_dir)],
    ]
    code = (
        "import sys\n"
        "for name in ('torch', 'matplotlib', 'transformers', 'megatron'): sys.modules[name] = None\n"
        "from tools import inspect_data\n"
        f"for command in {commands!r}: assert inspect_data.main(command) == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_reader_that_leaves(place: Path) -> None:
    """``| head`` ends it quietly."""
    options = f"{place}/zh_web --count 88 --characters 0"
    command = f"{sys.executable} {ROOT}/tools/inspect_data.py documents {options} | head -1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.count("\n") == 1
