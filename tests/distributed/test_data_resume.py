"""Every token once: what the ranks were given is looked up in the text, whatever was killed or changed between."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_syne.errors import ConfigError, DataError

from .conftest import Bench
from .ranks import logs_of, run_ranks, start_ranks, wait_ranks
from .test_stopping import wait_for_step

pytestmark = pytest.mark.slow


def command(bench: Bench, witness: Path, run: Path, *overrides: str) -> list[str]:
    base = [
        "-m",
        "distributed.recording_train",
        str(witness),
        "--config",
        str(bench.config),
        f"run_dir={run}",
    ]
    return [*base, *overrides]


def rows_given(witness: Path, last_step: int) -> list[list[int]]:
    """Samples of all ranks up to a step that was kept."""
    found = []
    for file in sorted(witness.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            step = json.loads(line)
            found += step["rows"] if step["step"] <= last_step else []
    return found


def last_checkpoint(run: Path) -> tuple[int, dict[str, Any]]:
    folder = max((run / "checkpoints").glob("iter_???????"))
    return int(folder.name[5:]), json.loads((folder / "state.json").read_text())["data"]


def stream(bench: Bench, name: str) -> np.ndarray:
    """One epoch of a source in the order in which a run reads it: one long sample of a run of it alone."""
    from megatron_syne.config.schema import DataConfig, RunConfig, SourceConfig, StageConfig, TrainConfig
    from megatron_syne.data.build import training_dataset
    from megatron_syne.data.mixture.planning import plan_mixture

    size = (bench.folder / f"{name}.bin").stat().st_size // 2
    data = DataConfig(
        seq_length=size - 1,
        sources={name: SourceConfig(str(bench.folder / name))},
        stages=[StageConfig("all", 1, {name: 1.0})],
    )
    config = RunConfig(data=data, train=TrainConfig(global_batch_size=1))
    return training_dataset(config, plan_mixture(config), 2560, None)[0].tokens


def check_exactly_once(bench: Bench, rows: list[list[int]], consumed: dict[str, int]) -> None:
    """The rows are the first ``consumed`` tokens of each source cut without gap or overlap, and nothing else."""
    left = Counter(tuple(row) for row in rows)
    for name, tokens in consumed.items():
        text, at = stream(bench, name).tolist(), 0
        while at < tokens:
            fitting = [n for n in (64, 32) if left[tuple(text[at : at + n + 1])]]
            assert fitting, f"{name}: no sample begins at token {at} of {tokens}"
            left[tuple(text[at : at + fitting[0] + 1])] -= 1
            at += fitting[0]
        assert at == tokens
    assert not +left, f"{left.total()} samples were read twice, or are in no source"


def test_killed_resized_and_changed_on_the_way(bench: Bench, tmp_path: Path) -> None:
    """Two ranks killed; one goes on with another batch and mixture; two end it with another sequence length and a
    batch that grows."""
    run = tmp_path / "run"
    ranks = start_ranks(2, command(bench, tmp_path / "w1", run, "checkpoint.save_interval=3"))
    wait_for_step(run, 4)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGKILL)
    wait_ranks(ranks)
    killed_at, _ = last_checkpoint(run)
    assert killed_at >= 3
    rows = rows_given(tmp_path / "w1", killed_at)

    changed = ["train.global_batch_size=4", "train.micro_batch_size=1",
               "data.stages.0.mixture={en: 0.25, zh: 0.75}"]  # fmt: skip
    ranks = start_ranks(
        1, command(bench, tmp_path / "w2", run, *changed, f"train.exit_interval={killed_at + 7}")
    )
    assert wait_ranks(ranks) == [75], logs_of(ranks[0])[-3000:]
    told = logs_of(ranks[0])
    assert f"resuming at step {killed_at}: " in told and "0.25" in told
    stopped_at, ledger = last_checkpoint(run)
    assert stopped_at == killed_at + 7 and ledger["consumed_samples"] == killed_at * 8 + 7 * 4
    rows += rows_given(tmp_path / "w2", stopped_at)

    third = [
        "train.global_batch_size=12",
        "data.stages.0.mixture={en: 0.25, zh: 0.75}",
        "data.stages.1.seq_length=32",
        "data.stages.1.rampup_batch_size=[4, 4, 24]",
    ]
    run_ranks(2, command(bench, tmp_path / "w3", run, *third))
    done_at, ledger = last_checkpoint(run)
    rows += rows_given(tmp_path / "w3", done_at)

    assert len(rows) == ledger["consumed_samples"]
    assert {len(row) for row in rows} == {65, 33}
    grown = [each["global_batch_size"] for each in ledger["plan"]["segments"] if each["stage"] == "two"]
    assert grown == [4, 8, 12]
    totals = {
        name: sum(stage.get(name, {"tokens": 0})["tokens"] for stage in ledger["counters"].values())
        for name in ("en", "zh")
    }
    assert sum(totals.values()) >= 6144 + 4096
    check_exactly_once(bench, rows, totals)
    assert len({change["step"] for change in ledger["changes"]}) == 2
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {name: lines[-1][f"tokens/{name}"] for name in totals} == totals


@pytest.fixture(scope="module")
def saved(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that was stopped after two steps."""
    run = tmp_path_factory.mktemp("saved") / "run"
    bench.train(1, {"saved": [f"run_dir={run}", "train.exit_interval=2"]})
    return run


def resume(bench: Bench, checkpoint: Path, *overrides: str) -> Any:
    """The training batches of a run that goes on from a checkpoint, as ``train.py`` makes them."""
    from megatron_syne.assembly import plan_of
    from megatron_syne.config.loader import load_config
    from megatron_syne.data.loader import build_training_data

    config = load_config(str(bench.config), list(overrides))
    plan, ledger, changes = plan_of(config, checkpoint, tell=False)
    return build_training_data(config, plan, 2560, 0, 1, resumed_from=ledger, changes=changes)


def test_changed_files_are_refused(bench: Bench, saved: Path, tmp_path: Path) -> None:
    checkpoint = saved / "checkpoints" / "iter_0000002"
    for suffix in ("bin", "idx", "json"):
        shutil.copy(bench.folder / f"en.{suffix}", tmp_path)
    own = f"data.sources.en.path={tmp_path / 'en'}"
    assert resume(bench, checkpoint, own).plan.num_samples == 160  # the same text may lie elsewhere
    for suffix in ("bin", "idx", "json"):
        shutil.copy(bench.folder / f"zh.{suffix}", tmp_path / f"en.{suffix}")
    with pytest.raises(DataError, match=r"changed since its checkpoint(.|\n)*data\.sources\.en: bin_sha256"):
        resume(bench, checkpoint, own)
    with pytest.raises(ConfigError, match=r"data\.sources\.en\.order: shuffled -> ordered"):
        resume(bench, checkpoint, "data.sources.en.order=ordered")


def test_a_checkpoint_of_the_version_before_is_told_apart(bench: Bench, saved: Path, tmp_path: Path) -> None:
    from megatron_syne.training.state import TrainState

    state = json.loads((saved / "checkpoints" / "iter_0000002" / "state.json").read_text())
    del state["data"], state["state"]["evaluated_step"]
    (tmp_path / "state.json").write_text(json.dumps({**state, "data_fingerprint": "0" * 64}))
    with pytest.raises(ConfigError, match=r"checkpoint\.initialize_from"):
        resume(bench, tmp_path)
    assert TrainState.from_dict(state["state"]).evaluated_step == 2  # none is owed
