"""The batch script and what is refused before anything is submitted; no Slurm needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_syne.config.loader import load_config
from megatron_syne.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(REPOSITORY / "launch"))

import script  # noqa: E402
import slurm  # noqa: E402

EVIL = [
    "$(touch CANARY)",
    "`touch CANARY`",
    "x; touch CANARY",
    "a' b",
    'a" b',
    "x & y | z > CANARY",
    "# x",
    "*",
]


def h100(folder: Path, **launch: Any) -> Path:
    """Llama-3-8B on 4 nodes of 8 H100."""
    config = {
        "run_dir": str(folder / "run"),
        "platform": "cuda",
        "model": {"preset": "llama3_8b"},
        "parallel": {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2},
        "data": {"seq_length": 8192, "mock": True},
        "train": {"global_batch_size": 128, "train_iters": 1000},
        "launch": {"nodes": 4, "cpus_per_task": 12, "partition": "gpu", "account": "lab", **launch},
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def run_cli(*arguments: str, path: str = "/usr/bin:/bin") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "launch" / "slurm.py"), *arguments]
    env = {"PATH": path}  # neither the package on the path nor the caller's Slurm
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=env)


def assert_bash_accepts(text: str) -> None:
    checked = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_script_of_an_h100_run(tmp_path: Path) -> None:
    file = h100(
        tmp_path, setup_lines=["module load cuda"], sbatch_args=["--exclusive"], env={"NCCL_DEBUG": "WARN"}
    )
    text = script.render(load_config(file))
    assert_bash_accepts(text)
    directives = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert directives == [
        "--job-name=syne",
        "--nodes=4",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--cpus-per-task=12",
        "--time=24:00:00",
        "--partition=gpu",
        "--account=lab",
        "--signal=B:USR1@300",
        f"--chdir={tmp_path}/run",
        f"--output={tmp_path}/run/logs/slurm-%j.log",
        "--open-mode=append",
        "--requeue",
        "--exclusive",
    ]
    for line in (
        "export CUDA_DEVICE_MAX_CONNECTIONS=1",
        "export OMP_NUM_THREADS=1",
        "export NCCL_DEBUG=WARN",
        "export SRUN_CPUS_PER_TASK=12",
        "export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))",
        "module load cuda",
        f"    python3 -m megatron_syne.train --config {tmp_path}/run/config.yaml",
    ):
        assert line in text.splitlines()


def test_no_gpus_are_asked_for_on_the_cpu_platform(tmp_path: Path) -> None:
    text = script.render(load_config(h100(tmp_path), ["platform=cpu", "launch.gpus_per_node=0"]))
    assert "--gpus" not in text


def test_environment_is_what_was_given(tmp_path: Path) -> None:
    """Run the exports for real: every value comes out as written, and nothing of it is executed."""
    values = {f"VALUE_{n}": text for n, text in enumerate(EVIL)}
    text = script.render(load_config(h100(tmp_path, env=values, setup_lines=["shown=yes"])))
    body = (
        text[: text.index("hosts=$(")]
        + 'printf "%s\\n" "$shown" '
        + " ".join(f'"${name}"' for name in values)
    )
    done = subprocess.run(["bash", "-c", body], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["yes", *EVIL]
    assert not (tmp_path / "CANARY").exists()


@pytest.mark.parametrize("evil", EVIL)
def test_values_stay_one_word_each(tmp_path: Path, evil: str) -> None:
    """Run the last command for real, with a program that shows its arguments in place of job.py."""
    folder = tmp_path / "x"
    folder.mkdir()
    config = load_config(
        h100(folder, python=evil, srun_args=[evil], job_name=evil, sbatch_args=[f"--comment={evil}"])
    )
    config.run_dir = str(folder / evil)
    text = script.render(config)
    assert_bash_accepts(text)
    body = text[text.index('exec "$python"') :].replace('exec "$python"', "printf '%s\\n'", 1)
    done = subprocess.run(["bash", "-c", body], cwd=tmp_path, capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    assert words[words.index("srun") + 4 :][:4] == [evil, evil, "-m", "megatron_syne.train"]
    assert words[-1] == f"{folder}/{evil}/config.yaml"
    assert words[2] == f"{folder}/{evil}"
    assert not (tmp_path / "CANARY").exists()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ('launch.job_name="a\\n#SBATCH --uid=0"', "launch.job_name"),
        ('launch.env.X="a\\nb"', "launch.env.X"),
        ('launch.env={"A B": "1"}', "A B"),
        ('launch.partition="a\\\\b"', "launch.partition"),
        ('launch.srun_args=["a\\nb"]', "launch.srun_args.0"),
        ("launch.sbatch_args=[--exclude n1]", "--exclude n1"),
        ("launch.sbatch_args=[rm]", "rm"),
        ("launch.time=tomorrow", "launch.time"),
        ("launch.time='6'", "launch.signal_lead_seconds"),  # 360 s: 60 s more than the lead, and not more
        ("launch.ntasks_per_node=4", "launch.gpus_per_node"),
        ("parallel.data_parallel_size=3", "launch.nodes"),
        ("launch.max_no_progress=0", "launch.max_no_progress"),
        ("resilience.exit_signals=[SIGTERM]", "SIGUSR1"),
    ],
)
def test_refused_with_64_and_nothing_written(tmp_path: Path, override: str, says: str) -> None:
    file = h100(tmp_path)
    done = run_cli("--config", str(file), override, "--no-submit")
    assert (done.returncode, done.stdout) == (64, "")
    assert says in done.stderr and "Traceback" not in done.stderr
    assert [each.name for each in tmp_path.iterdir()] == [file.name]


def test_short_lead_warns(tmp_path: Path) -> None:
    assert script.check_values(load_config(h100(tmp_path))) == []
    (warning,) = script.check_values(load_config(h100(tmp_path, signal_lead_seconds=60)))
    assert "signal_lead_seconds = 60" in warning


def test_print_writes_nothing(tmp_path: Path) -> None:
    file = h100(tmp_path)
    done = run_cli("--config", str(file), "launch.nodes=2", "--print")
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --nodes=2\n" in done.stdout
    assert [each.name for each in tmp_path.iterdir()] == [file.name]


def test_no_submit_writes_the_run_folder(tmp_path: Path) -> None:
    done = run_cli("--config", str(h100(tmp_path)), "train.train_iters=7", "--no-submit")
    assert done.returncode == 0, done.stderr
    run_dir = tmp_path / "run"
    assert sorted(each.name for each in run_dir.iterdir() if not each.name.startswith(".")) == [
        "config.yaml",
        "logs",
        "status.json",
        "submit.sbatch",
    ]
    assert load_config(run_dir / "config.yaml").train.train_iters == 7
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["job_id"]) == ("INIT", None)
    assert status["code"]["package"]
    shown = run_cli("--status", str(run_dir))
    assert shown.returncode == 0 and "INIT" in shown.stdout


def test_status_of_no_run_is_66(tmp_path: Path) -> None:
    assert run_cli("--status", str(tmp_path)).returncode == 66


def test_without_slurm_says_so(tmp_path: Path) -> None:
    done = run_cli("--config", str(h100(tmp_path)), path=str(tmp_path))
    assert done.returncode == 66 and "sbatch is not here" in done.stderr


def test_package_of_the_checkout_is_used_without_torch(tmp_path: Path) -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import slurm; print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, str(REPOSITORY / "launch")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "False"
    assert slurm.REPOSITORY == REPOSITORY


def test_check_values_raises_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_no_progress"):
        script.check_values(load_config(h100(tmp_path, max_no_progress=0)))
