"""``launch/slurm.py`` and ``launch/job.py`` on a real Slurm, with a stand-in for the trainer."""

from __future__ import annotations

import re
import time
from pathlib import Path

from cluster import Cluster
from submitted import launch, submit_run, write_config


def test_two_nodes_run_two_tasks_each(cluster: Cluster) -> None:
    body = "echo $SLURM_PROCID $SLURM_LOCALID $(hostname) $(getent hosts $(hostname) | cut -d' ' -f1)"
    out = cluster.client("srun", "-N2", "--ntasks-per-node=2", "bash", "-c", body)
    assert sorted(out.splitlines()) == [
        "0 0 n1 127.0.0.1",
        "1 1 n1 127.0.0.1",
        "2 0 n2 127.0.0.1",
        "3 1 n2 127.0.0.1",
    ]


def test_signal_saves_requeues_resumes_and_completes(cluster: Cluster, tmp_path: Path) -> None:
    run = submit_run(cluster, write_config(tmp_path, "run", env={"FAKE_STEPS": "60"}))
    run.wait_log("start 0 at step 0", count=4)
    run.signal()
    cluster.release(run.number)
    assert run.status["state"] == "REQUEUED"
    assert run.status["reason"] == "stopped cleanly"
    saved = run.saved()
    assert 0 < saved < 60

    assert cluster.wait_state(run.number, "COMPLETED") == "COMPLETED"
    log = run.log_path.read_text()
    assert log.count("start 0 at step 0") == 4  # all ranks, and the first start's lines are still there
    assert log.count(f"start 1 at step {saved}") == 4
    assert len(re.findall(r"exit 75 after 1 signals", log)) == 4  # each rank was signalled exactly once
    assert len(re.findall(r"exit 0 after 0 signals at step 60", log)) == 4
    status = run.status
    states = [event["state"] for event in status["history"]]
    assert states == ["INIT", "PENDING", "RUNNING", "REQUEUED", "RUNNING", "COMPLETED"]
    assert (status["job_id"], status["restarts"], status["last_saved_iteration"]) == (run.number, 1, 60)
    assert "COMPLETED" in launch(cluster, "--status", str(run.run_dir)).stdout


def test_requeue_of_a_complete_run_exits_at_once(cluster: Cluster, tmp_path: Path) -> None:
    run = submit_run(cluster, write_config(tmp_path, "run", env={"FAKE_STEPS": "1"}))
    cluster.wait_state(run.number, "COMPLETED")
    cluster.client("scontrol", "requeue", str(run.number))
    cluster.release(run.number)
    run.wait_log("this run is complete; nothing to do")
    cluster.wait_state(run.number, "COMPLETED")
    assert run.log_path.read_text().count("rank 0: start") == 1


def test_requeue_by_slurm_resumes_without_a_second_requeue(cluster: Cluster, tmp_path: Path) -> None:
    run = submit_run(cluster, write_config(tmp_path, "run", env={"FAKE_STEPS": "100"}, max_no_progress=1))
    run.wait_log("start 0 at step 0", count=4)
    cluster.client("scontrol", "requeue", str(run.number))  # as an administrator or a preemption does
    cluster.release(run.number)
    assert (run.status["state"], run.status["reason"]) == ("REQUEUED", "requeued by Slurm")
    cluster.wait_state(run.number, "COMPLETED")
    assert cluster.job(run.number)["Restarts"] == "1"


def test_stops_when_nothing_new_is_saved(cluster: Cluster, tmp_path: Path) -> None:
    options = {"env": {"FAKE_SAVES": "0"}, "max_no_progress": 2}
    run = submit_run(cluster, write_config(tmp_path, "run", **options))
    run.wait_log("start 0 at step 0", count=4)
    run.signal()
    cluster.release(run.number)
    run.wait_log("start 1 at step 0", count=4)
    run.signal()
    cluster.wait_state(run.number, "FAILED")
    assert cluster.job(run.number)["ExitCode"] == "70:0"
    assert "no progress: 2 starts in a row saved no new checkpoint" in run.log_path.read_text()
    assert run.status["state"] == "FAILED"


def test_killed_rank_is_requeued(cluster: Cluster, tmp_path: Path) -> None:
    options = {"env": {"FAKE_KILL": "1"}, "max_no_progress": 2, "srun_args": ["--wait=1"]}
    run = submit_run(cluster, write_config(tmp_path, "run", **options))
    cluster.release(run.number)
    assert (run.status["state"], run.status["reason"]) == ("REQUEUED", "killed by SIGKILL")
    cluster.wait_state(run.number, "FAILED")  # it kills itself again: nothing new was saved twice in a row
    assert cluster.job(run.number)["ExitCode"] == "70:0"


def test_other_exit_codes_fail_with_that_code(cluster: Cluster, tmp_path: Path) -> None:
    options = {"env": {"FAKE_EXIT": "0:65"}, "srun_args": ["--wait=1"]}
    run = submit_run(cluster, write_config(tmp_path, "run", **options))
    cluster.wait_state(run.number, "FAILED")
    job = cluster.job(run.number)
    assert (job["ExitCode"], job["Restarts"]) == ("65:0", "0")  # though srun killed the peers: 137
    assert (run.status["state"], run.status["exit_code"]) == ("FAILED", 65)


def test_cancel_does_not_requeue_and_a_new_submission_resumes(cluster: Cluster, tmp_path: Path) -> None:
    config = write_config(tmp_path, "run", env={"FAKE_STEPS": "100"})
    run = submit_run(cluster, config)
    run.wait_log("start 0 at step 0", count=4)

    refused = launch(cluster, "--config", str(config))  # the folder is taken
    assert refused.returncode == 73
    assert f"held by job {run.number}" in refused.stderr

    cluster.client("scancel", str(run.number))
    cluster.wait_state(run.number, "CANCELLED")
    time.sleep(cluster.kill_wait + 2)
    job = cluster.job(run.number)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
    assert [event["state"] for event in run.status["history"]] == ["INIT", "PENDING", "RUNNING", "STOPPED"]

    (run.run_dir / "run.lock").write_text(
        f'{{"host": "n9", "pid": 1, "job": "{run.number}"}}'
    )  # killed with it
    again = submit_run(cluster, config)
    assert again.number != run.number
    cluster.wait_state(again.number, "COMPLETED")
    assert run.saved() == 100
    assert f"start 0 at step {run.saved()}" not in again.log_path.read_text()
    assert not (run.run_dir / "run.lock").exists()
    assert run.log_path.exists() and again.log_path.exists()


def test_shell_metacharacters_do_not_execute(cluster: Cluster, tmp_path: Path) -> None:
    evil = "$(touch {0}) `touch {0}` ; touch {0} & | > {0} '\" # %j ${{HOME}} *".format("CANARY")
    config = write_config(
        tmp_path / "conf $(touch CANARY)",
        run_dir=str(tmp_path / f"run {evil}".replace("$", "")),
        job_name=evil,
        env={"FAKE_STEPS": "1", "EVIL": evil},
        sbatch_args=[f"--comment={evil}", "--exclude="],
        srun_args=[f"--job-name={evil}"],
    )
    run = submit_run(cluster, config)
    cluster.wait_state(run.number, "COMPLETED")
    assert run.log_path.read_text().count("exit 0") >= 4
    shown = cluster.client("squeue", "-h", "-t", "all", "-j", str(run.number), "-o", "%j").strip()
    assert shown == evil
    left = [each.name for folder in (tmp_path, Path.cwd(), run.run_dir) for each in folder.iterdir()]
    assert "CANARY" not in left
