"""With ``reset_attention_mask`` a document in a sample is what it is alone, in every layout."""

from __future__ import annotations

import json

import pytest

from .conftest import Bench
from .ranks import run_ranks
from .test_layouts import CP2, PP2, SP, TP2

pytestmark = pytest.mark.slow

DOCUMENTS = [list(range(7, 7 + 2 * n)) for n in (10, 1, 14, 7)]  # even lengths: SP cuts a sequence in two


@pytest.fixture(scope="module")
def logits(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    from safetensors.torch import load_file

    folder = tmp_path_factory.mktemp("document_mask")
    layouts = {"single": [], "tp2_sp": [TP2, SP], "pp2": [PP2]}  # single: two replicas that do the same
    jobs = [
        {"config": str(bench.config), "overrides": layout, "documents": DOCUMENTS,
         "out": str(folder / f"{name}.safetensors")}
        for name, layout in layouts.items()
    ]  # fmt: skip
    (folder / "jobs.json").write_text(json.dumps(jobs))
    run_ranks(2, ["-m", "distributed.document_mask_worker", str(folder / "jobs.json")])
    return {name: load_file(folder / f"{name}.safetensors") for name in layouts}


@pytest.mark.parametrize("layout", ["single", "tp2_sp", "pp2"])
def test_a_document_in_a_sample_is_as_alone(logits: dict[str, dict], layout: str) -> None:
    import torch

    found = logits[layout]
    assert found["with"].shape == found["alone"].shape == (1, 64, 2560)
    torch.testing.assert_close(found["with"], found["alone"], rtol=0, atol=1e-5)
    torch.testing.assert_close(found["with"], logits["single"]["with"], rtol=0, atol=1e-5)


def test_without_the_option_they_see_each_other(logits: dict[str, dict]) -> None:
    first = len(DOCUMENTS[0])
    found = logits["single"]
    difference = (found["without"] - found["alone"]).abs().amax(dim=(0, 2))
    assert difference[:first].max() < 1e-5  # nothing stands before the first
    assert difference[first:].min() > 1e-3


def test_training_with_the_options_runs_alike_in_every_layout(bench: Bench) -> None:
    """Loss and gradients, the stage in the middle of PP included; and the options do change the loss."""
    options = ["data.reset_attention_mask=true", "data.reset_position_ids=true", "data.eod_mask_loss=true",
               "train.exit_interval=3"]  # fmt: skip
    results = bench.train(
        2,
        {
            "plain": options[3:],
            "dp2": options,
            "pp2": [*options, PP2],
            "tp2": [*options, TP2, SP],
            "cp2": [*options, CP2],
        },
    )
    losses = {n: [float.fromhex(row["loss"]) for row in result["steps"]] for n, result in results.items()}
    for name in ("pp2", "tp2", "cp2"):
        assert losses[name] == pytest.approx(losses["dp2"], abs=5e-6)
        norms = [row["grad_norm"] for row in results[name]["steps"]]
        assert norms == pytest.approx([row["grad_norm"] for row in results["dp2"]["steps"]], abs=1e-4)
    differences = [abs(a - b) for a, b in zip(losses["plain"], losses["dp2"], strict=True)]
    print(
        f"largest and least difference that the options make: {max(differences):.1e}, {min(differences):.1e}"
    )
    assert min(differences) > 2e-5  # the layouts are within 5e-6
