"""A seed checkpoint, tokenised text and a run configuration for the layout tests."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from distributed.ranks import run_ranks

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO = REPOSITORY / "examples" / "demo"

CONFIG = """
run_dir: {folder}/run
platform: cpu
model: {{hf_path: {folder}/seed}}
data:
  seq_length: 64
  sources: {{en: {{path: {folder}/en}}, zh: {{path: {folder}/zh}}}}
  validation: {{en: {{path: {folder}/zh}}}}
  stages:
    - {{name: one, tokens: 6144, mixture: {{en: 0.75, zh: 0.25}}}}
    - {{name: two, tokens: 4096, mixture: {{en: 0.5, zh: 0.5}}}}
optimizer: {{lr: 3.0e-3}}
schedule: {{lr_decay_style: cosine, lr_warmup_init: 1.0e-3, lr_warmup_iters: 4}}
precision: {{params_dtype: fp32}}
train: {{micro_batch_size: 2, global_batch_size: 8}}
checkpoint: {{initialize_from: {folder}/seed}}
monitor: {{tensorboard: false, progress: false}}
"""


@dataclass
class Bench:
    """A folder with everything that a short training needs."""

    folder: Path

    @property
    def config(self) -> Path:
        """The YAML of the run."""
        return self.folder / "run.yaml"

    def train(
        self, world_size: int, jobs: dict[str, list[str]], options: dict[str, dict] | None = None
    ) -> dict[str, dict]:
        """Train each named list of overrides, one after the other, in one world of ``world_size``.

        ``options``: by name, what else ``worker.py`` knows of a job.
        """
        where = self.folder / f"jobs_{len(list(self.folder.glob('jobs_*')))}"
        where.mkdir()
        listed = [
            {
                "name": name,
                "config": str(self.config),
                "overrides": [f"run_dir={where / name}", *overrides],
                **(options or {}).get(name, {}),
            }
            for name, overrides in jobs.items()
        ]
        (where / "jobs.json").write_text(json.dumps(listed))
        run_ranks(world_size, ["-m", "distributed.worker", str(where / "jobs.json")], timeout=1800)
        return json.loads((where / "results.json").read_text())


def make_seed(folder: Path, family: str = "Llama", **changes: object) -> Path:
    """A random Llama-3-shaped Hugging Face folder: GQA, RMSNorm, SwiGLU, RoPE 500000, untied.

    ``family``: as transformers names its classes, of the same parameters (``Mistral`` has a sliding window).
    """
    import torch
    import transformers

    shape = {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 2560,
        "max_position_embeddings": 256,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        **changes,
    }
    torch.manual_seed(0)
    configuration = getattr(transformers, f"{family}Config")(**shape)
    model = getattr(transformers, f"{family}ForCausalLM")(configuration).float()
    with torch.no_grad():  # norms of one would hide a norm that is not loaded
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.8, 1.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Seed weights, two tokenised sources and the configuration."""
    folder = tmp_path_factory.mktemp("bench")
    make_seed(folder / "seed")
    for name, text in (("en", "en_web"), ("zh", "zh_web")):
        subprocess.run(
            [sys.executable, str(REPOSITORY / "tools/prepare_data.py"), "--tokenizer", str(DEMO / "base_model"),
             "--input", str(DEMO / f"texts/{text}.valid.jsonl"), "--output-prefix", str(folder / name)],
            check=True,
        )  # fmt: skip
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder))
    return Bench(folder)
