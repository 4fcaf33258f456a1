"""Settings with which megatron-core trains wrongly without a word: none can be made, and each is what it is
said to be.

The second half forces a setting on the engine behind the rules' back, to see that the losses do go wrong: what a
later engine has mended need not be forbidden any more.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_syne.config.loader import load_config
from megatron_syne.errors import ConfigError
from megatron_syne.models.config import resolve_model
from megatron_syne.preflight.rules import check

from .conftest import Bench
from .test_layouts import CP2, NO_SAVE, OVERLAP, PP2, TOLERANCE, TP2, VPP2, loss_and_norm

RIGHT_ENGINE = {"calculate_per_token_loss": True, "cross_entropy_loss_fusion": False}
"""Fields of ``TransformerConfig`` that no option sets, whatever the layout."""

INTERLEAVED = [PP2, VPP2]
# trap -> layout, fields of TransformerConfig before DDP is built, fields after
TRAPS: dict[str, tuple[list[str], dict[str, bool], dict[str, bool]]] = {
    "output freed while gloo sends it": (INTERLEAVED, {"deallocate_pipeline_outputs": True}, {}),
    "messages of two chunks swapped": (
        INTERLEAVED,
        {"overlap_p2p_comm": False, "batch_p2p_comm": True},
        {},
    ),
    "loss per token told after DDP": (
        [],
        {"calculate_per_token_loss": False},
        {"calculate_per_token_loss": True},
    ),
    "loss per token told after DDP, CP": (
        [CP2],
        {"calculate_per_token_loss": False},
        {"calculate_per_token_loss": True},
    ),
}


# --- none can be made --------------------------------------------------------------------------------------

MODEL = """
model: {num_layers: 4, hidden_size: 64, ffn_hidden_size: 192, num_attention_heads: 8, num_query_groups: 4,
  kv_channels: 8, vocab_size: 512, max_position_embeddings: 128, layernorm_epsilon: 1e-5, rotary_base: 500000,
  share_embeddings_and_output_weights: false}
run_dir: out
data: {seq_length: 64, mock: true}
train: {train_iters: 20}
"""


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ([*INTERLEAVED, "parallel.deallocate_pipeline_outputs=true"], "silently wrong"),
        ([*INTERLEAVED, "parallel.overlap_p2p_comm=false"], "silently wrong"),
        *(([f"{section}.{name}=false"], name) for section in ("parallel", "train") for name in RIGHT_ENGINE),
    ],
)
def test_the_wrong_setting_is_refused(tmp_path: Path, overrides: list[str], part: str) -> None:
    (tmp_path / "run.yaml").write_text(MODEL)
    with pytest.raises(ConfigError, match=part):
        config = load_config(str(tmp_path / "run.yaml"), overrides)
        check(config, resolve_model(config.model), 4, "cpu")


SNIPPET = """
import json, sys
from megatron_syne.platform.base import select
platform = select("cpu")
from megatron_syne.config.loader import load_config
from megatron_syne.models.config import resolve_model
from megatron_syne.models.engine_options import engine_config
answers = []
for overrides in json.loads(sys.argv[2]):
    config = load_config(sys.argv[1], overrides)
    engine = engine_config(config, resolve_model(config.model), platform)
    answers.append({name: getattr(engine, name) for name in json.loads(sys.argv[3])})
print(json.dumps(answers))
"""


def test_the_engine_is_told_the_right_values_whatever_the_layout(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(MODEL)
    layouts = [[], [TP2], INTERLEAVED, [CP2], OVERLAP, ["precision.params_dtype=fp32"]]
    names = [*RIGHT_ENGINE, "deallocate_pipeline_outputs", "overlap_p2p_comm", "batch_p2p_comm"]
    done = subprocess.run(
        [sys.executable, "-c", SNIPPET, str(tmp_path / "run.yaml"), json.dumps(layouts), json.dumps(names)],
        capture_output=True,
        text=True,
        check=True,
    )
    for layout, found in zip(layouts, json.loads(done.stdout.splitlines()[-1]), strict=True):
        chunks = layout == INTERLEAVED
        assert found == {
            **RIGHT_ENGINE,
            "deallocate_pipeline_outputs": not chunks,
            "overlap_p2p_comm": chunks,
            "batch_p2p_comm": not chunks,
        }


# --- each is what it is said to be -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trapped(bench: Bench) -> dict[str, list[tuple[float, float]]]:
    """Loss and gradient norm of each step with each trap sprung, and without any."""
    jobs = {name: layout for name, (layout, _, _) in TRAPS.items()}
    options = {
        name: {**NO_SAVE, "engine": early, "late_engine": late} for name, (_, early, late) in TRAPS.items()
    }
    jobs |= {"right": [], "fused loss": []}
    options |= {"right": NO_SAVE, "fused loss": {**NO_SAVE, "engine": {"cross_entropy_loss_fusion": True}}}
    return {name: loss_and_norm(result) for name, result in bench.train(2, jobs, options).items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAPS)
def test_the_trap_is_real(trapped: dict[str, list[tuple[float, float]]], name: str) -> None:
    right, wrong = trapped["right"], trapped[name]
    difference = max(abs(a - b) for (a, _), (b, _) in zip(right, wrong, strict=False))
    print(f"{name}: the loss is wrong by {difference:.1e} after {len(wrong)} steps")
    assert difference > 100 * TOLERANCE["fp32"] or len(wrong) < len(right)  # not finite: seen by the trainer


@pytest.mark.slow
def test_fused_cross_entropy_rounds_the_gradient_in_fp32(
    trapped: dict[str, list[tuple[float, float]]],
) -> None:
    pairs = list(zip(trapped["right"], trapped["fused loss"], strict=True))
    difference = max(abs(a / b - 1) for (_, a), (_, b) in pairs)
    print(f"fused cross-entropy: the gradient norm is wrong by {difference:.1e} of it")
    assert difference > 1e-4
