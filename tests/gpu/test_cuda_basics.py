"""The CUDA platform starts, and Transformer Engine's model computes what the CPU platform's and transformers' do.

Not run on a GPU yet. The judge is fp32 on a CPU. Tolerances: fp32 products in fp32 (``NVIDIA_TF32_OVERRIDE=0``) 1e-4 of
a logit, as between ``transformers`` and the CPU platform; as a run has them, in TF32 (10 bits), 1 % of the norm; bf16
(8 bits, logits rounded to it) 2 % of the norm, and no more than twice what the CPU's own bf16 is off.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_syne.config.loader import load_config
from megatron_syne.errors import ConfigError
from megatron_syne.models.config import resolve_model
from megatron_syne.preflight.rules import check

from .lab import Lab
from .plan import DOCUMENTS, RECIPES, fp8, rows

pytestmark = pytest.mark.gpu

EXACT, TF32, BF16 = 1e-4, 0.01, 0.02
MODELS = ("demo", "stories")


def logits(lab: Lab, group: str, name: str) -> Any:
    """What a job left, [rows, seq, vocabulary], fp32."""
    from safetensors.torch import load_file

    if name.startswith("stories"):
        lab.needs_stories()
    return load_file(lab.result(group, name)["file"])["logits"]


def apart(found: Any, expected: Any) -> float:
    """Relative difference of the norms."""
    return float((found - expected).norm() / expected.norm())


def test_it_starts_and_says_what_it_is(lab: Lab) -> None:
    found = lab.result("main", "machine")
    lab.figure("describe", **found)
    assert found["line"].startswith(f"{lab.platform}: ")
    assert lab.rehearse or (
        found["device_name"] in found["line"] and "Transformer Engine 2." in found["line"]
    )


@pytest.mark.parametrize("model", MODELS)
def test_fp32_logits_are_the_cpus(lab: Lab, model: str) -> None:
    """Of the same weights, in the local layers on the CPU and in Transformer Engine's."""
    expected, found = (logits(lab, group, f"{model}.fp32") for group in ("reference", "exact"))
    largest, far = float((found - expected).abs().max()), apart(found, expected)
    lab.figure("fp32 logits", model=model, largest=largest, relative=far, scale=float(expected.abs().max()))
    assert found.shape == expected.shape
    assert largest <= EXACT


@pytest.mark.parametrize("model", MODELS)
def test_fp32_logits_in_tf32_are_near(lab: Lab, model: str) -> None:
    """Without the variable Transformer Engine's fp32 products are cuBLAS's TF32."""
    far = apart(logits(lab, "main", f"{model}.fp32"), logits(lab, "reference", f"{model}.fp32"))
    lab.figure("fp32 logits as a run has them", model=model, relative=far)
    assert far <= TF32


@pytest.mark.parametrize("model", MODELS)
def test_bf16_logits_are_near(lab: Lab, model: str) -> None:
    expected = logits(lab, "reference", f"{model}.fp32")
    ours = apart(logits(lab, "main", f"{model}.bf16"), expected)
    cpus = apart(logits(lab, "reference", f"{model}.bf16"), expected)
    chosen = logits(lab, "main", f"{model}.bf16").argmax(-1) == expected.argmax(-1)
    lab.figure(
        "bf16 logits", model=model, relative=ours, cpu_relative=cpus, same_token=float(chosen.float().mean())
    )
    assert 0 < ours <= min(BF16, 2 * cpus)


@pytest.mark.parametrize("model", MODELS)
def test_transformers_agrees(lab: Lab, model: str) -> None:
    """On the CPU in fp32, from the same Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM

    found = logits(lab, "exact", f"{model}.fp32")
    source = lab.needs_stories() if model == "stories" else Path(load_config(lab.config).model.hf_path or "")
    judge = AutoModelForCausalLM.from_pretrained(source, torch_dtype=torch.float32).eval()
    with torch.no_grad():
        expected = judge(torch.tensor(rows(model, *found.shape[:2]))).logits
    largest = float((found - expected).abs().max())
    lab.figure("fp32 logits beside transformers", model=model, largest=largest)
    assert largest <= EXACT


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_documents_of_a_sample_keep_to_themselves(lab: Lab, dtype: str) -> None:
    """Transformer Engine's packed (THD) attention and the CPU platform's mask: the same logits."""
    group, tolerance = ("exact", 1e-5) if dtype == "fp32" else ("main", BF16)
    expected, found = (
        logits(lab, each, f"documents.{kind}") for each, kind in (("reference", "fp32"), (group, dtype))
    )
    first = DOCUMENTS[0]
    far, of_first = apart(found, expected), apart(found[:, :first], expected[:, :first])
    lab.figure("document mask", dtype=dtype, relative=far, of_first_document=of_first)
    assert found.shape[1] == sum(DOCUMENTS)
    assert 0 <= far <= tolerance


@pytest.mark.parametrize("recipe", RECIPES)
def test_stories260k_in_fp8_is_refused_and_told_why(lab: Lab, recipe: str) -> None:
    """Its feed-forward width of 172 is no multiple of 16: FP8 products cannot take it."""
    stories = lab.needs_stories()
    config = load_config(lab.config, [f"model.hf_path={stories}", f"platform={lab.platform}", fp8(recipe)])
    with pytest.raises(ConfigError, match="ffn_hidden_size / TP = 172 must be a multiple of 16"):
        check(config, resolve_model(config.model), 1, lab.platform)  # type: ignore[arg-type]


def test_stories260k_trains_as_on_the_cpu(lab: Lab) -> None:
    """bf16, random tokens, 20 steps: within 1 % of the loss at each."""
    lab.needs_stories()
    found, expected = lab.losses("main", "stories"), lab.losses("reference", "stories")
    gaps = [abs(a / b - 1) for a, b in zip(found, expected, strict=True)]
    lab.figure("stories260k, bf16", first=found[0], last=found[-1], largest_relative_gap=max(gaps))
    assert len(found) == 20 and found[-1] < found[0]
    assert max(gaps) < 0.01
