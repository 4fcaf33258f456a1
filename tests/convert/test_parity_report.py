"""The probes of a comparison and its report, without any engine; and the reference's streamed model alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from megatron_syne.config.schema import ModelConfig
from megatron_syne.errors import ConfigError, DataError, SecurityRefusal
from megatron_syne.parity.filling import Lender
from megatron_syne.parity.probes import FAR_RUN, Probe, far_runs, make_probes
from megatron_syne.parity.reference import Reference
from megatron_syne.parity.report import Comparison, Report
from megatron_syne.parity.tensors import open_tensors


def model(positions: int, original: int | None = None) -> ModelConfig:
    return ModelConfig(
        vocab_size=100,
        max_position_embeddings=positions,
        rope_scaling_factor=None if original is None else 8.0,
        rope_original_max_position_embeddings=original,
    )


def test_far_positions() -> None:
    """Plain: the start and the last positions claimed. Scaled: also just beyond the original context."""
    assert far_runs(model(4096)) == ((0, FAR_RUN), (4096 - FAR_RUN, FAR_RUN))
    assert far_runs(model(131072, 8192)) == ((0, FAR_RUN), (8192, FAR_RUN), (131072 - FAR_RUN, FAR_RUN))
    # a file that claims no more than the original context is still compared beyond it
    assert far_runs(model(8192, 8192))[-1] == (2 * 8192 - FAR_RUN, FAR_RUN)
    assert far_runs(model(40)) == ((0, FAR_RUN),), "no room for a second run"
    assert [str(probe) for probe in make_probes(model(40), [1, 5, 5])] == ["1 token", "5 tokens"]


def test_probes_of_given_tokens() -> None:
    short, far = make_probes(model(4096), [5], tokens=[7, 8, 9])
    assert short.tokens.tolist() == [7, 8, 9, 7, 8] and short.positions().tolist() == [0, 1, 2, 3, 4]
    assert far.tokens.tolist()[:4] == [7, 8, 9, 7] and len(far.tokens) == 2 * FAR_RUN
    assert far.positions().tolist()[FAR_RUN - 1 : FAR_RUN + 1] == [FAR_RUN - 1, 4096 - FAR_RUN]
    assert str(far) == "64 tokens at positions 0-31, 4064-4095"


def test_bad_probes_are_refused_together() -> None:
    with pytest.raises(ConfigError, match=r"lengths: 0 is below 1; tokens: \[-1, 100\]"):
        make_probes(model(4096), [0, 3], tokens=[5, 100, -1])
    with pytest.raises(ConfigError, match="tokens: none"):
        make_probes(model(4096), [3], tokens=[])
    with pytest.raises(ConfigError, match="lengths: none"):
        make_probes(model(16), [])


def test_slices_add_up() -> None:
    """Seen in slices of the channels or whole: the same difference, by the definitions."""
    torch.manual_seed(0)
    theirs = torch.randn(6, 40)
    ours = theirs + 0.01 * torch.randn(6, 40)
    ours[4] = theirs[4].flip(0)  # another first choice
    whole, sliced = Comparison(6), Comparison(6)
    whole.add(ours, theirs)
    for start in range(0, 40, 13):
        sliced.add(ours[:, start : start + 13], theirs[:, start : start + 13])
    apart = (ours - theirs).abs()
    rms = theirs.square().mean(-1).sqrt()
    for found in (whole.result(), sliced.result()):
        assert found.largest == apart.max().item()
        assert math.isclose(found.mean, apart.mean().item(), rel_tol=1e-6)
        assert math.isclose(found.relative, (apart.amax(-1) / rms).max().item(), rel_tol=1e-6)
        assert (found.same_choice, found.positions) == (5, 6)


def difference(scale: float) -> Any:
    comparison = Comparison(2)
    comparison.add(torch.full((2, 4), 1 + scale), torch.ones(2, 4))
    return comparison.result()


def report(*scales: float) -> Report:
    return Report(
        "a against b",
        ["1 token", "5 tokens"],
        1e-3,
        stages={f"layer {index}": [difference(0.0), difference(scale)] for index, scale in enumerate(scales)},
    )


@pytest.mark.parametrize("fault", [0.5, math.nan, math.inf])
def test_the_first_stage_out_is_named(fault: float) -> None:
    good, bad = report(1e-5, 1e-4), report(1e-5, fault, 2.0)
    good.check()
    assert list(good.lines())[-1] == "tolerance 1e-03 relative: the models agree"
    with pytest.raises(DataError, match=r"^a against b: layer 1 differs: 5 tokens: .*; layer 0 still agrees"):
        bad.check()
    lines = list(bad.lines())
    assert lines[-1].endswith("layer 1 is the first that is out")
    assert [line.split()[1] for line in lines if line.endswith("<- out")] == ["1", "2"]


def save(folder: Path, kind: str, **changes: Any) -> Any:
    """A random model of transformers, saved and as it is."""
    torch.manual_seed(3)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 67,
        "initializer_range": 0.2,
    }
    config = getattr(transformers, f"{kind}Config")(**sizes | changes)
    built = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    built.save_pretrained(folder, max_shard_size="20KB")
    return built


SCALED = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Llama", {"rope_scaling": SCALED, "max_position_embeddings": 2048}),
        ("Llama", {"tie_word_embeddings": True}),
        ("Mistral", {"sliding_window": 7}),
        ("Qwen2", {}),
    ],
    ids=["llama-scaled", "llama-tied", "mistral-window", "qwen2"],
)
def test_the_streamed_reference_is_the_model_of_transformers(
    tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    """Layer by layer, with masks and angles written down beforehand: logits of the plain forward pass."""
    built = save(tmp_path / "m", kind, **changes)
    tokens = torch.arange(40) * 11 % 67
    probes = [Probe(tokens, ((0, 40),)), Probe(tokens, ((0, 20), (900, 20)))]
    with torch.no_grad():
        reference = Reference(open_tensors(tmp_path / "m"))
        hidden = [reference.embedding(0, 67)[tokens] for _ in probes]
        lender = Lender()
        calls = [reference.prepare(probe) for probe in probes]
        for index in range(reference.num_layers):
            run = reference.layer(index, [call[index] for call in calls], lender)
            hidden = [run(at, states) for at, states in enumerate(hidden)]
        run = reference.final_norm(lender)
        hidden = [run(at, states) for at, states in enumerate(hidden)]
        for probe, states in zip(probes, hidden, strict=True):
            plain = built(
                tokens[None], position_ids=probe.positions()[None], attention_mask=torch.ones(1, 40)
            ).logits[0]
            assert (states @ reference.output(0, 67).T - plain).abs().max() < 1e-5 * plain.abs().max()


def test_a_family_without_a_class_in_transformers(tmp_path: Path) -> None:
    save(tmp_path / "m", "Llama")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"model_type": "inflm"}))
    with pytest.raises(ConfigError, match=r"'inflm': transformers .* has no class of its own"):
        Reference(open_tensors(tmp_path / "m"))


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) >= 5, reason="version 5 reads its own form")
@pytest.mark.parametrize("changes", [{"rope_theta": 5e5}, {"rope_scaling": SCALED}], ids=["base", "scaling"])
def test_the_form_of_version_5_alone_is_refused_by_version_4(tmp_path: Path, changes: dict[str, Any]) -> None:
    """transformers 4 would compute something else without a word, and the blame would fall on us."""
    save(tmp_path / "m", "Llama", **changes)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    theta, scaling = config.pop("rope_theta"), config.pop("rope_scaling") or {}
    config["rope_parameters"] = {"rope_theta": theta, "rope_type": "default", **scaling}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="install transformers 5"):
        Reference(open_tensors(tmp_path / "m"))


def test_bad_reference(tmp_path: Path) -> None:
    """Missing tensors are listed; nothing outside the folder is read; a broken file is no crash."""
    save(tmp_path / "m", "Llama")
    index = tmp_path / "m" / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    lacking = json.loads(index.read_text())
    for name in ("model.norm.weight", "lm_head.weight"):
        del lacking["weight_map"][name]
    index.write_text(json.dumps(lacking))
    with pytest.raises(DataError, match=r"not there: model\.norm\.weight, lm_head\.weight"):
        Reference(open_tensors(tmp_path / "m"))
    save_file({"model.norm.weight": torch.ones(32)}, tmp_path / "outside.safetensors")
    listed["weight_map"]["model.norm.weight"] = "../outside.safetensors"
    index.write_text(json.dumps(listed))
    with pytest.raises(SecurityRefusal):
        open_tensors(tmp_path / "m").whole("model.norm.weight")
    listed["weight_map"]["model.norm.weight"] = "broken.safetensors"
    index.write_text(json.dumps(listed))
    (tmp_path / "m" / "broken.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(DataError, match=r"broken\.safetensors: the safetensors library says"):
        open_tensors(tmp_path / "m").whole("model.norm.weight")
