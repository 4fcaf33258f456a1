"""The batch scripts of a corpus, and what is refused before anything is submitted; no Slurm needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_syne.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(REPOSITORY / "launch"))

import array_script  # noqa: E402
import array_state  # noqa: E402
import prepare  # noqa: E402


@pytest.fixture
def corpus(tmp_path: Path) -> list[str]:
    """Arguments that name an input, a tokenizer and a prefix which are there."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"text": "some words"}\n')
    (tmp_path / "tokenizer").mkdir()
    return [
        "--input", str(tmp_path / "in"), "--tokenizer", str(tmp_path / "tokenizer"),
        "--output-prefix", str(tmp_path / "out" / "en"), "--shards", "64",
    ]  # fmt: skip


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, where no Slurm is to be found."""
    command = [sys.executable, str(REPOSITORY / "launch" / "prepare.py"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=60, env={"PATH": "/nonexistent"}
    )


@settings(deadline=None, max_examples=50)
@given(st.sets(st.integers(0, 70), min_size=1))
def test_array_spec_names_each_task_once(indices: set[int]) -> None:
    named = []
    for part in array_script.array_spec(indices, None).split(","):
        first, _, last = part.partition("-")
        named += range(int(first), int(last or first) + 1)
    assert named == sorted(indices)
    assert array_script.array_spec({0, 1, 2, 7}, 8) == "0-2,7%8"


def test_print_shows_two_scripts_and_writes_nothing(corpus: list[str], tmp_path: Path) -> None:
    more = [
        "--cpus-per-task",
        "16",
        "--partition",
        "cpu",
        "--json-key",
        "a b",
        "--setup-line",
        "module load x",
    ]
    done = run_cli(*corpus, *more, "--print")
    assert (done.returncode, done.stderr) == (0, "")
    for line in (
        "#SBATCH --cpus-per-task=16",
        "#SBATCH --cpus-per-task=1",
        "#SBATCH --partition=cpu",
        f"#SBATCH --output={tmp_path}/out/en.slurm/logs/shard-%a.log",
        "module load x",
    ):
        assert done.stdout.splitlines().count(line) == (
            2 if "partition" in line or "module" in line else 1
        ), line
    tool = str(REPOSITORY / "tools" / "prepare_data.py")
    assert "--json-key 'a b' --workers 16 --shard \"$SLURM_ARRAY_TASK_ID/64\"\n" in done.stdout
    assert f"{tool} --merge {tmp_path}/out/en --shards 64\n" in done.stdout
    checked = subprocess.run(["bash", "-n"], input=done.stdout, text=True, capture_output=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert not (tmp_path / "out").exists()


def test_without_slurm_it_says_so(corpus: list[str]) -> None:
    done = run_cli(*corpus)
    assert done.returncode == 66
    assert "squeue is not here" in done.stderr


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--shard", "0/2"], 64, "shard"),
        (["--overwrite"], 64, "--overwrite: not for an array"),
        (["--over"], 64, "--overwrite: not for an array"),
        (["--no-such-option"], 64, "--no-such-option"),
        (["--min-tokens", "few"], 64, "--min-tokens"),
        (["--shards", "0"], 64, "--shards"),
        (["--sbatch-arg=mem=3G"], 64, "--name=value"),
        (["--partition", "a\n#SBATCH --uid=0"], 64, "no line break"),
        (["--job", "a", "b"], 64, "--job goes without --input"),
        (["--valid-prefix", "x"], 64, "--valid-suffix"),
        (["--valid-suffix", ""], 64, "given twice"),
        (["--tokenizer", "absent"], 66, "absent"),
    ],
)
def test_refused_at_once(
    corpus: list[str], more: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        result = prepare.run_cli(lambda: prepare.main([*corpus, *more]))
    except SystemExit as error:
        result = int(error.code or 0)
    assert (result, said in capsys.readouterr().err) == (code, True)


def test_one_prefix_given_twice_is_refused(corpus: list[str]) -> None:
    jobs = ["--job", corpus[1], "x", "--job", corpus[1], "./x"]
    with pytest.raises(ConfigError, match="given twice"):
        prepare.main([*jobs, *corpus[2:4], *corpus[6:]])


def test_job_name_is_of_the_prefix_alone() -> None:
    names = {array_script.Source((), prefix).job_name for prefix in ("/a/en", "/b/en", "/a/e,n", "/a/e n")}
    assert len(names) == 4
    assert all(name.startswith("prepare-e") and name.isascii() and "," not in name for name in names)


@pytest.mark.parametrize("damage", ["none", "bin short", "no idx", "no manifest", "manifest cut"])
def test_a_shard_is_finished_when_its_manifest_stands_and_fits(tmp_path: Path, damage: str) -> None:
    prefix = array_state.shard_prefix(str(tmp_path / "en"), 3, 64)
    assert prefix.endswith("en.shard-00003-of-00064")
    Path(f"{prefix}.bin").write_bytes(b"1234" if damage != "bin short" else b"123")
    if damage != "no idx":
        Path(f"{prefix}.idx").write_bytes(b"12")
    text = json.dumps({"files": {"bin": {"bytes": 4}, "idx": {"bytes": 2}}})
    if damage != "no manifest":
        Path(f"{prefix}.json").write_text(text if damage != "manifest cut" else text[:-3])
    assert array_state.is_whole(prefix) == (damage == "none")
    assert array_state.missing_shards(array_script.Source((), str(tmp_path / "en")), 64)[:4] == (
        [0, 1, 2, 3] if damage != "none" else [0, 1, 2, 4]
    )


def test_half_merged_pair_lacks_only_the_other_half(tmp_path: Path) -> None:
    """Training documents merged (their shards are gone), the merge killed before the held-out ones."""
    source = array_script.Source((), str(tmp_path / "en"), str(tmp_path / "valid"))
    shards = [array_state.shard_prefix(str(tmp_path / "valid"), index, 2) for index in range(2)]
    for prefix in (source.prefix, *shards):
        Path(f"{prefix}.bin").write_bytes(b"1234")
        Path(f"{prefix}.idx").write_bytes(b"12")
        Path(f"{prefix}.json").write_text('{"files": {"bin": {"bytes": 4}, "idx": {"bytes": 2}}}')
    assert array_state.unmerged(source) == [str(tmp_path / "valid")]
    assert array_state.missing_shards(source, 2) == []
    Path(f"{source.prefix}.json").unlink()
    assert array_state.missing_shards(source, 2) == [0, 1]


def test_inputs_differ_by_name_and_size(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("12345")
    (tmp_path / "notes.md").write_text("not an input")
    seen = [array_state.describe_inputs([str(tmp_path)])]
    assert (seen[0]["count"], seen[0]["bytes"]) == (1, 5)
    (tmp_path / "a.jsonl").write_text("1234567")
    seen.append(array_state.describe_inputs([str(tmp_path)]))
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    seen.append(array_state.describe_inputs([str(tmp_path)]))
    assert len({each["digest"] for each in seen}) == 3
