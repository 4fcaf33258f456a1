"""The whole road on a model from outside: Hugging Face -> shards -> training checkpoint -> Hugging Face.

With a learning rate below the last bit of any weight nothing may change on the way: the exported folder holds
the bits of the source, whatever the layout, also with tied embeddings and uneven stages.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import REPOSITORY
from .ranks import run_ranks
from .test_layouts import PP2, SP, TP2
from .test_logits import FIRST3, PP5, TP4, VPP2_UNEVEN

pytestmark = pytest.mark.slow

ROADS = {
    "tp2_pp2_3_and_2": (4, [TP2, PP2, FIRST3, SP]),
    "tp4": (4, [TP4]),
    "pp5": (5, [PP5]),
    "tp2_pp2_vpp2": (4, [TP2, PP2, *VPP2_UNEVEN]),
}

CONFIG = """
run_dir: {folder}/run
platform: cpu
model: {{hf_path: {source}}}
data: {{seq_length: 32, mock: true}}
optimizer: {{lr: 1.0e-30}}
precision: {{params_dtype: fp32}}
train: {{micro_batch_size: 1, global_batch_size: 4, train_iters: 2}}
checkpoint: {{initialize_from: {folder}/shards}}
monitor: {{progress: false}}
"""


@pytest.mark.parametrize("road", ROADS)
def test_stories260k_comes_back_to_the_bit(shared_data: Path, tmp_path: Path, road: str) -> None:
    from safetensors.torch import load_file

    source = shared_data / "stories260k"
    world_size, layout = ROADS[road]
    (tmp_path / "run.yaml").write_text(CONFIG.format(folder=tmp_path, source=source))
    convert = [sys.executable, str(REPOSITORY / "tools/convert_checkpoint.py")]
    options = []
    for override in layout:
        key, value = override.removeprefix("parallel.").split("=", 1)
        if key != "sequence_parallel":
            options += [f"--{key.replace('_', '-')}", value.strip("'")]
    shards = [*convert, "import", "--from", str(source), "--out", str(tmp_path / "shards"), *options]
    subprocess.run(shards, check=True)
    run_ranks(
        world_size,
        ["-m", "megatron_syne.train", "--config", str(tmp_path / "run.yaml"), *layout],
        timeout=600,
    )
    checkpoint = tmp_path / "run" / "checkpoints" / "iter_0000002"
    out = tmp_path / "exported"
    subprocess.run([*convert, "export", "--from", str(checkpoint), "--out", str(out)], check=True)
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and tensor.equal(after[name]), name
    assert (out / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    subprocess.run([*convert, "verify", str(out)], check=True)
