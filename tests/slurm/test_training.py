"""The real trainer under a real Slurm: 2 nodes x 2 ranks over gloo, stopped by a signal, requeued, resumed.

The losses must be, digit for digit, those of a run on one machine that nobody disturbed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cluster import Cluster, wait_until
from submitted import REPOSITORY, launch, submit_run

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron.core") is None, reason="needs megatron-core"
)

STEPS = 30


def write_training(folder: Path) -> Path:
    """A tiny Llama from scratch (TP 2 x PP 2, fp32) on the text that ships with the demo."""
    demo = REPOSITORY / "examples" / "demo"
    subprocess.run(
        [sys.executable, str(REPOSITORY / "tools" / "prepare_data.py"), "--tokenizer", str(demo / "base_model"),
         "--input", str(demo / "texts" / "en_web.valid.jsonl"), "--output-prefix", str(folder / "en")],
        check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    vocab_size = json.loads((demo / "base_model" / "config.json").read_text())["vocab_size"]
    config = {
        "run_dir": "undisturbed",
        "platform": "cpu",
        "model": {
            "num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 192, "num_attention_heads": 8,
            "num_query_groups": 4, "kv_channels": 8, "vocab_size": vocab_size, "model_type": "llama",
            "layernorm_epsilon": 1e-5, "rotary_base": 500000.0, "init_method_std": 0.02,
            "share_embeddings_and_output_weights": False, "max_position_embeddings": 256,
        },
        "parallel": {
            "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True,
        },
        "data": {
            "seq_length": 64,
            "sources": {"en": {"path": "en"}},
            "stages": [{"name": "only", "tokens": STEPS * 8 * 64, "mixture": {"en": 1.0}}],
        },
        "schedule": {"lr_decay_style": "cosine", "lr_warmup_iters": 3},
        "optimizer": {"lr": 3e-3},
        "precision": {"params_dtype": "fp32"},
        "train": {"global_batch_size": 8},
        "monitor": {"progress": False, "tensorboard": False},
        "launch": {
            "nodes": 2, "ntasks_per_node": 2, "gpus_per_node": 0, "time": "20", "python": sys.executable,
            "env": {"TORCH_COMPILE_DISABLE": "1", "GLOO_SOCKET_IFNAME": "lo"},
        },
    }  # fmt: skip
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def losses(run_dir: Path) -> dict[int, str]:
    """Loss of every step as written, by step; a step may not be there twice with different losses."""
    result: dict[int, str] = {}
    path = run_dir / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        row = json.loads(line)
        if "loss" in row:
            assert result.setdefault(row["step"], repr(row["loss"])) == repr(row["loss"])
    return result


def test_signalled_and_requeued_run_has_the_losses_of_an_undisturbed_one(
    cluster: Cluster, tmp_path: Path
) -> None:
    config = write_training(tmp_path)
    undisturbed = subprocess.run(
        [str(REPOSITORY / "launch" / "local.sh"), str(config)],
        env={**os.environ, "PYTHON": sys.executable, "TORCH_COMPILE_DISABLE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert undisturbed.returncode == 0, undisturbed.stderr[-3000:]
    expected = losses(tmp_path / "undisturbed")
    assert sorted(expected) == list(range(1, STEPS + 1))

    run = submit_run(cluster, config, f"run_dir={tmp_path / 'slurm'}")
    wait_until(lambda: len(losses(run.run_dir)) >= 3, "three steps", 300)
    run.signal()
    cluster.release(run.number, timeout=300)
    assert (run.status["state"], run.status["reason"]) == ("REQUEUED", "stopped cleanly"), (
        run.log_path.read_text()
    )
    stopped = run.status["last_saved_iteration"]
    assert 3 <= stopped < STEPS
    assert sorted(losses(run.run_dir)) == list(range(1, stopped + 1))  # not a step is lost

    cluster.wait_state(run.number, "COMPLETED", timeout=300)
    assert cluster.job(run.number)["Restarts"] == "1"
    assert losses(run.run_dir) == expected
    assert run.status["last_saved_iteration"] == STEPS
    assert "COMPLETED" in launch(cluster, "--status", str(run.run_dir)).stdout
