"""The dry run: everything is in it, quickly, without torch and without the data being there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_syne.config.loader import load_config
from megatron_syne.errors import ConfigError
from megatron_syne.models.config import resolve_model
from megatron_syne.preflight.manifests import source_token_counts
from megatron_syne.preflight.report import dry_run_report
from megatron_syne.preflight.rules import check

RUN = """\
run_dir: out
platform: cpu
model: {preset: llama3_8b}
parallel: {tensor_model_parallel_size: 2, pipeline_model_parallel_size: 2, sequence_parallel: true}
schedule: {lr_warmup_init: 1e-7, lr_warmup_tokens: 10_000_000_000, lr_wsd_decay_iters: 800}
data:
  seq_length: 8192
  sources: {en: {path: en}, zh: {path: zh}, syn: {path: syn}, math: {path: math}}
  validation: {en: {path: en_valid}}
  stages:
  - {name: bilingual, tokens: 92_500_000_000, mixture: {zh: 0.2, en: 0.8}}
  - {name: synthetic, tokens: 7_500_000_000, mixture: {zh: 0.1, en: 0.7, syn: 0.2}}
train: {global_batch_size: 1024}
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


def report(path: Path, *overrides: str, world_size: int | None = None) -> str:
    config = load_config(path, overrides)
    model = resolve_model(config.model)
    check(config, model, world_size, "cpu")
    return dry_run_report(config, model, "cpu", world_size)


def section(text: str, title: str) -> list[str]:
    return text.split(f"== {title} ==\n")[1].split("\n\n== ")[0].splitlines()


def test_report_shows_configuration_grid_batch_plan_and_schedule(run_file):
    text = report(run_file, world_size=8)
    resolved = section(text, "resolved configuration")
    assert "  num_layers: 32" in resolved and "  seq_length: 8192" in resolved
    assert section(text, "choices") == [
        "platform: cpu",
        "parallel.overlap_p2p_comm: false (chosen)",
        "parallel.deallocate_pipeline_outputs: true (chosen)",
    ]
    assert "parameters: 8,030,261,248" in section(text, "model")  # as Meta's release has
    assert len(section(text, "rank grid")) == 9
    assert section(text, "batch") == [
        "global batch 1024 samples = micro batch 1 x DP 2 x 512 micro-batches",
        "tokens per step: 1024 x 8192 = 8,388,608",
    ]
    assert any("11,922 iterations" in line for line in section(text, "tokens"))
    rates = [line.split() for line in section(text, "learning rate") if " iteration " in line]
    assert [line[-1] for line in rates[:3]] == ["1e-07", "1e-05", "1e-05"]
    assert rates[-1][:2] == ["last", "step"] and rates[-1][-2] == "11921"
    assert "- data.sources.math is not used: it stands in no mixture" in section(text, "notes")
    assert any("data.validation is not used" in line for line in section(text, "notes"))


def test_resolved_configuration_of_the_report_loads_again(run_file, tmp_path):
    text = report(run_file)
    copy = tmp_path / "elsewhere" / "copy.yaml"
    copy.parent.mkdir()
    copy.write_text("\n".join(section(text, "resolved configuration")))
    again = load_config(copy)
    assert again.data == load_config(run_file).data
    assert again.model.num_layers == 32


def test_without_world_size_the_configured_one_is_shown(run_file):
    assert len(section(report(run_file, "parallel.data_parallel_size=4"), "rank grid")) == 17


def test_large_worlds_show_one_replica(run_file):
    lines = section(report(run_file, world_size=1024), "rank grid")
    assert len(lines) == 6
    assert lines[-1] == "(of 1024 ranks only the first of 256 replicas is shown)"


def test_mock_run(run_file):
    text = report(run_file, "data.mock=true", "train.train_iters=5", "schedule.lr_warmup_tokens=null",
                  "schedule.lr_wsd_decay_iters=null")  # fmt: skip
    assert section(text, "tokens")[-1].split() == ["run", "5,120", "41,943,040", "5", "iterations"]
    assert "- data.stages is not used: data.mock is on" in section(text, "notes")


def test_one_step_and_no_rate_at_the_start(run_file):
    text = report(run_file, "data.mock=true", "train.train_iters=1", "schedule.lr_warmup_tokens=null",
                  "schedule.lr_wsd_decay_iters=null", "schedule.lr_warmup_init=0")  # fmt: skip
    assert any("1e-05" in line for line in section(text, "learning rate"))


def test_manifests_give_epochs_and_absent_ones_are_said(run_file, tmp_path):
    (tmp_path / "en.json").write_text(json.dumps({"counts": {"tokens": 10_000_000_000}}))
    (tmp_path / "zh.json").write_text("{")
    (tmp_path / "syn.json").write_text(json.dumps({"counts": []}))
    counts, remarks = source_token_counts(load_config(run_file))
    assert counts == {"en": 10_000_000_000}
    assert [remark.split(":")[0] for remark in remarks] == ["zh", "syn", "math"]
    assert "not valid JSON" in remarks[0]
    assert f"no manifest {tmp_path / 'math.json'}" in remarks[2]
    table = section(report(run_file, "data.sources.en.max_epochs=.inf"), "tokens")
    assert any("7.40" in line and "repeats" in line for line in table)  # 74 of 10 billion tokens
    assert remarks[2] in table


def test_subsets_shrink_what_there_is(run_file, tmp_path):
    (tmp_path / "en.json").write_text(json.dumps({"counts": {"tokens": 1000}}))
    for overrides, tokens in (
        (["data.sources.en.first_tokens=300"], 300),
        (["data.sources.en.first_tokens=3000"], 1000),
        (["data.sources.en.top_fraction=0.25", "data.sources.en.top_by=score"], 250),
    ):
        assert source_token_counts(load_config(run_file, overrides))[0] == {"en": tokens}


def test_a_source_that_runs_dry_is_refused_with_what_would_fit(run_file, tmp_path):
    for name, tokens in (("en", 70_000_000_000), ("syn", 10**9), ("zh", 10**12)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"counts": {"tokens": tokens}}))
    with pytest.raises(ConfigError, match="2 problems") as caught:
        report(run_file)
    text = str(caught.value)
    assert "data.sources.en (run.yaml" in text.replace(str(tmp_path) + "/", "")
    assert "has 70,000,000,000 an epoch: 1.13 epochs, max_epochs is 1;" in text
    assert "set data.sources.en.max_epochs to 2 or .inf" in text
    assert "data.sources.syn" in text and "data.sources.zh" not in text
    fits = re.search(r"sources.en .*?fits: ([\d,]+) of", text)
    assert fits and 0.88e11 < int(fits.group(1).replace(",", "")) < 0.9e11  # 70 of 79.25 billion
    report(run_file, "data.sources.en.max_epochs=1.2", "data.sources.syn.max_epochs=.inf")
    (tmp_path / "out" / "checkpoints" / "step_1").mkdir(parents=True)  # a begun run is checked as it goes on
    assert any("has begun" in line for line in section(report(run_file), "notes"))


def test_stages_of_other_lengths_are_shown(run_file):
    text = report(run_file, "data.stages.1.seq_length=4096")
    assert section(text, "batch")[1:] == [
        "tokens per step: 1024 x 8192 = 8,388,608",
        "tokens per step: 1024 x 4096 = 4,194,304",
    ]
    assert any("1,789 iterations of sequences of 4,096" in line for line in section(text, "tokens"))


def test_report_for_thousands_of_ranks_needs_no_torch(run_file, repository):
    code = (
        "import sys\n"
        "from megatron_syne.config.loader import load_config\n"
        "from megatron_syne.models.config import resolve_model\n"
        "from megatron_syne.preflight.report import dry_run_report\n"
        "from megatron_syne.preflight.rules import check\n"
        f"config = load_config({str(run_file)!r}); model = resolve_model(config.model)\n"
        "check(config, model, None, 'cpu'); dry_run_report(config, model, 'cpu', 4096)\n"
        "assert 'torch' not in sys.modules and 'megatron' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=repository)
    assert done.returncode == 0, done.stderr
