"""Emulated FP8 trains as bf16 does: 300 steps of the demo model with each recipe, and resume to the bit.

Loss per step swings by the batch, alike in all runs: what is held is the mean of 20 steps, at the end and in every
window of the run. Measured at the end and at most: delayed 0.10 and 0.32 %, tensorwise (E4M3 alone) 0.07 and
0.28 %, blockwise 0.05 and 0.31 %, of a loss that falls from 7.64 to 4.01.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import DEMO, REPOSITORY
from .fp8_runs import train_fp8

pytestmark = pytest.mark.slow

STEPS, HALF_WAY, WINDOW = 300, 150, 20
LIMIT = 0.01
SOURCES = ("en_web", "en_code", "en_math", "zh_web", "zh_book", "synth_qa")
RUNS = {
    "bf16": [],
    "delayed": ["precision.fp8=delayed"],
    "tensorwise": ["precision.fp8=tensorwise", "precision.fp8_format=e4m3"],
    "blockwise": ["precision.fp8=blockwise"],
    "first_last": ["precision.fp8=tensorwise", "precision.first_last_layers_bf16=true"],
}
RECIPES = ("delayed", "tensorwise", "blockwise")
# The demo's mixture, stages and schedule (examples/demo/demo.yaml), 512 tokens a step in place of 4096.
CONFIG = """
run_dir: {folder}/run
platform: cpu
model: {{hf_path: {demo}/base_model}}
data:
  seq_length: 128
  sources: {{{sources}}}
  stages:
    - name: bilingual_adaptation
      tokens: 112_640
      mixture:
        zh: {{share: 0.2, of: {{zh_web: 0.7, zh_book: 0.3}}}}
        en: {{share: 0.8, of: {{en_web: 0.7, en_math: 0.15, en_code: 0.15}}}}
    - name: synthetic_enhancement
      tokens: 40_960
      mixture:
        zh: {{share: 0.1, of: {{zh_web: 0.7, zh_book: 0.3}}}}
        en: {{share: 0.7, of: {{en_web: 0.7, en_math: 0.15, en_code: 0.15}}}}
        synth_qa: 0.2
optimizer: {{lr: 1.0e-3, min_lr: 1.0e-4, weight_decay: 0.1}}
schedule:
  lr_decay_style: WSD
  lr_warmup_init: 1.0e-5
  lr_warmup_iters: 10
  lr_wsd_decay_iters: 75
  lr_wsd_decay_style: minus_sqrt
precision: {{params_dtype: bf16}}
train: {{micro_batch_size: 4, global_batch_size: 4}}
checkpoint: {{initialize_from: {demo}/base_model, save_interval: {half_way}}}
monitor: {{tensorboard: false, progress: false}}
"""


def prepared(folder: Path) -> Path:
    """The demo's texts as tokens, and the configuration of a run on them."""
    jobs = [
        word
        for source in SOURCES
        for word in ("--job", str(DEMO / f"texts/{source}.train.jsonl"), str(folder / source))
    ]
    subprocess.run(
        [sys.executable, str(REPOSITORY / "tools/prepare_data.py"), "--tokenizer", str(DEMO / "base_model"),
         "--min-tokens", "10", *jobs],
        check=True,
    )  # fmt: skip
    sources = ", ".join(f"{s}: {{path: {folder / s}, max_epochs: .inf}}" for s in SOURCES)
    config = folder / "run.yaml"
    config.write_text(CONFIG.format(folder=folder, demo=DEMO, sources=sources, half_way=HALF_WAY))
    return config


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """By run the loss of each step, ``float.hex``: the whole runs, and each recipe's from its half on."""
    folder = tmp_path_factory.mktemp("fp8_training")
    jobs = {name: [*how, f"run_dir={folder / name}"] for name, how in RUNS.items()}
    jobs |= {f"{name}_resumed": RUNS[name] for name in RECIPES}
    options: dict[str, dict] = {"bf16": {"saves": False}, "first_last": {"saves": False}}
    for name in RECIPES:
        options[f"{name}_resumed"] = {
            "goes_on_from": [str(folder / name), HALF_WAY],
            "abandon_at": HALF_WAY + WINDOW,
        }
    results = train_fp8(folder, prepared(folder), 1, jobs, options)
    return {name: [row["loss"] for row in result["steps"]] for name, result in results.items()}


def means(found: list[str]) -> list[float]:
    """Mean loss of each window of the run."""
    values = [float.fromhex(loss) for loss in found]
    return [sum(values[i : i + WINDOW]) / WINDOW for i in range(len(values) - WINDOW + 1)]


def test_bf16_learns(losses: dict[str, list[str]]) -> None:
    """Else FP8 would follow it by standing still."""
    bf16 = means(losses["bf16"])
    assert len(losses["bf16"]) == STEPS and bf16[-1] < 0.8 * float.fromhex(losses["bf16"][0])


@pytest.mark.parametrize("name", [name for name in RUNS if name != "bf16"])
def test_the_loss_is_within_one_percent_of_bf16(losses: dict[str, list[str]], name: str) -> None:
    assert len(losses[name]) == STEPS and losses[name] != losses["bf16"]
    gaps = [abs(fp8 / bf16 - 1) for fp8, bf16 in zip(means(losses[name]), means(losses["bf16"]), strict=True)]
    assert gaps[-1] < LIMIT
    assert max(gaps) < LIMIT


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_goes_on_from_its_half_to_the_bit(losses: dict[str, list[str]], name: str) -> None:
    assert losses[f"{name}_resumed"] == losses[name][HALF_WAY : HALF_WAY + WINDOW]
