"""One ``config.json`` for transformers 4.x and 5.x: both read what we write, we read what both write.

4.x reading a file in 5.x's form alone takes a rope base of 10000 and drops the scaling, without any error:
the writer must put down both forms. Version 5 lies in a folder of its own (``make probes``).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_syne.config.schema import ModelConfig
from megatron_syne.models.config import resolve_model
from megatron_syne.models.hf_config import hf_config_from_model, model_config_from_hf
from megatron_syne.models.json_file import read_json

PROBE = Path(__file__).with_name("transformers_probe.py")
PLAIN = ModelConfig(
    model_type="llama",
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    vocab_size=64,
    max_position_embeddings=131072,
    layernorm_epsilon=1e-5,
    rotary_base=500000.0,
    share_embeddings_and_output_weights=False,
    init_method_std=0.2,  # large, so that attention is far from uniform and positions matter
)
SCALED = {"rope_scaling_factor": 8.0, "rope_low_freq_factor": 2.0, "rope_high_freq_factor": 3.0}
MODELS = {
    name: resolve_model(replace(PLAIN, **changes))
    for name, changes in {
        "plain": {},
        "llama3-scaled": {"rope_scaling_factor": 8.0},
        "scaled-otherwise": SCALED | {"rope_original_max_position_embeddings": 512},
        "tied": {"share_embeddings_and_output_weights": True},
        "wide-heads": {"kv_channels": 32, "rotary_base": 10000.0},
        "mistral": {"model_type": "mistral"},
        "mistral-window": {"model_type": "mistral", "window_size": 5},
        "qwen2": {"model_type": "qwen2", "share_embeddings_and_output_weights": True},
    }.items()
}


@dataclass
class Answers:
    """What both versions said."""

    four: dict[str, Any]
    five: dict[str, Any]
    saved_by_5: dict[str, Path]


def probe(request: dict[str, Any], python_path: Path | None) -> dict[str, Any]:
    """Run the probe under the environment's transformers, or under the one in ``python_path``."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if python_path is not None:
        env["PYTHONPATH"] = str(python_path)
    done = subprocess.run(
        [sys.executable, str(PROBE)],
        input=json.dumps(request),
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def write_model(folder: Path, model: ModelConfig) -> None:
    """Random weights under transformers' names, and our ``config.json``."""
    ours = hf_config_from_model(model, "float32", bos_token_id=1, eos_token_id=2)
    torch.manual_seed(7)
    built = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**ours))
    built.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(ours), encoding="utf-8")


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """Both versions on every model of ours, and on one whose file has 5.x's form alone."""
    five = Path(os.environ.get("MEGATRON_SYNE_TRANSFORMERS5") or Path(sys.prefix) / "transformers5")
    if not (five / "transformers").is_dir():
        pytest.skip(f"transformers 5 is absent from {five}: run `make probes`")
    folder = tmp_path_factory.mktemp("models")
    for name, model in MODELS.items():
        write_model(folder / name, model)
    logits = {name: str(folder / name) for name in MODELS}
    for name in ("plain", "llama3-scaled"):
        new = folder / f"{name}, 5.x form alone"
        write_model(new, MODELS[name])
        config = read_json(new / "config.json")
        (new / "config.json").write_text(json.dumps(without(config, "rope_theta", "rope_scaling")))
        logits[new.name] = str(new)
    saved = {name: folder / f"{name}-saved-by-5" for name in MODELS}
    save = {name: [str(folder / name), str(path)] for name, path in saved.items()}
    return Answers(
        four=probe({"logits": logits}, None),
        five=probe({"logits": logits, "save": save}, five),
        saved_by_5=saved,
    )


def difference(a: list[float], b: list[float]) -> float:
    """Largest absolute difference of two lists of logits."""
    assert len(a) == len(b) > 0
    return (torch.tensor(a) - torch.tensor(b)).abs().max().item()


def test_the_two_versions_are_what_they_claim(answers: Answers) -> None:
    assert answers.four["version"].startswith("4.")
    assert answers.five["version"].startswith("5.")
    assert answers.four["file"] != answers.five["file"]


@pytest.mark.parametrize("name", MODELS)
def test_both_versions_give_the_same_logits(answers: Answers, name: str) -> None:
    assert difference(answers.four["logits"][name], answers.five["logits"][name]) <= 1e-6


@pytest.mark.parametrize("name", ["plain", "llama3-scaled"])
def test_the_comparison_sees_a_lost_rope(answers: Answers, name: str) -> None:
    """5.x reads its own form alone; 4.x does not, and the logits show it: why both forms are written."""
    other = f"{name}, 5.x form alone"
    assert difference(answers.five["logits"][name], answers.five["logits"][other]) <= 1e-6
    assert difference(answers.four["logits"][name], answers.four["logits"][other]) > 1e-2


def test_scaling_and_plain_differ(answers: Answers) -> None:
    """The same weights: only the scaling tells the two models apart."""
    assert difference(answers.five["logits"]["plain"], answers.five["logits"]["llama3-scaled"]) > 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_we_read_what_version_5_writes(answers: Answers, name: str) -> None:
    path = answers.saved_by_5[name] / "config.json"
    config = read_json(path)
    assert config["transformers_version"].startswith("5.")
    assert "rope_theta" not in config  # in 5.x's form, or the test proves nothing
    assert model_config_from_hf(config, str(path)) == MODELS[name]


def test_a_real_model_is_read_alike(answers: Answers, shared_data: Path, tmp_path: Path) -> None:
    """The 260K Llama from outside: original, saved again by 5.x, and with our ``config.json``."""
    source, saved, ours = shared_data / "stories260k", tmp_path / "saved-by-5", tmp_path / "ours"
    five = Path(answers.five["file"]).parents[1]
    model = model_config_from_hf(read_json(source / "config.json"), "stories260k")
    ours.mkdir()
    (ours / "model.safetensors").symlink_to(source / "model.safetensors")
    config = hf_config_from_model(model, "float32", bos_token_id=1, eos_token_id=2)
    (ours / "config.json").write_text(json.dumps(config))
    folders = {"original": str(source), "ours": str(ours)}
    by_5 = probe({"logits": folders, "save": {"saved": [str(source), str(saved)]}}, five)["logits"]
    by_4 = probe({"logits": folders}, None)["logits"]
    for name in ("original", "ours"):
        assert difference(by_4["original"], by_4[name]) <= 1e-6
        assert difference(by_4[name], by_5[name]) <= 1e-6
    assert model_config_from_hf(read_json(saved / "config.json"), "saved by 5.x") == model
