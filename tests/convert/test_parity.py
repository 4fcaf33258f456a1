"""Megatron-core against transformers, both real, layer by layer: what is right agrees, what is wrong is named.

The comparisons run in one other process, since megatron-core on the CPU changes torch for good in its own.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_syne.config.schema import ParallelConfig
from megatron_syne.convert.engine import convert
from megatron_syne.convert.formats.detect import open_weights
from megatron_syne.convert.formats.shards import plan_shards
from megatron_syne.convert.pieces import local_shape, pieces
from megatron_syne.convert.table import find
from megatron_syne.errors import DataError
from megatron_syne.models.hf_config import model_config_from_hf
from megatron_syne.parity.compare import TOLERANCE, compare, compare_source
from megatron_syne.parity.report import Report

LENGTHS = (1, 17, 100)

TOY: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 131,  # prime: padded in every layout
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,  # large, so that attention is far from uniform and positions matter
}
SCALED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,  # not the constants that megatron-core has built in
}
TOYS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("Llama", {"head_dim": 10, "rope_theta": 500000.0, "rms_norm_eps": 1e-5}),
    "tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 8}),
    "scaled": ("Llama", {"head_dim": 32, "rope_theta": 10000.0, "rope_scaling": SCALED}),
    "mistral": ("Mistral", {"sliding_window": 13, "head_dim": 6}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": False}),
}


def save(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A random model made and saved by transformers, in several files."""
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(**TOY | changes)
    built = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, parameter in built.named_parameters():
        if "norm" in name or "bias" in name:  # ones and zeros from the start: exchanged without being noticed
            parameter.data = ("norm" in name) + 0.3 * torch.randn_like(parameter)
    built.to(dtype).save_pretrained(folder, max_shard_size="100KB")
    return folder


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("toys")
    return {name: save(folder / name, kind, **changes) for name, (kind, changes) in TOYS.items()}


class Loaded:
    """A Hugging Face folder as a source of Megatron's parameters, to be spoilt; no part of ours reads it."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        self.model = replace(model_config_from_hf(config, str(folder)), make_vocab_size_divisible_by=48)
        self.tensors = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}

    def parameter(self, name: str, tp_rank: int, tp_size: int) -> torch.Tensor:
        entry = find(name, self.model)
        out = torch.zeros(local_shape(entry, self.model, tp_size))
        rows = out.view(len(out), -1)
        for piece in pieces(entry, self.model, tp_rank, tp_size):
            part = self.tensors[piece.source]
            part = part.view(len(part), -1)[slice(*piece.rows), slice(*piece.cols)]
            down, right = piece.at
            rows[down : down + part.shape[0], right : right + part.shape[1]] = part
        return out

    def layer(self, index: int, name: str) -> torch.Tensor:
        return self.tensors[f"model.layers.{index}.{name}"]

    def exchange(self, one: str, other: str) -> None:
        tensors = self.tensors
        tensors[one], tensors[other] = tensors[other], tensors[one]

    def set(self, **fields: Any) -> None:
        self.model = replace(self.model, **fields)


def exchange_layers(source: Loaded) -> None:
    for name in [name for name in source.tensors if name.startswith("model.layers.1.")]:
        source.exchange(name, name.replace(".1.", ".2."))


def permute_groups(source: Loaded) -> None:
    """Key/value heads 1 and 2 of layer 2 exchanged, their queries not."""
    for name in ("k_proj", "v_proj"):
        heads = source.layer(2, f"self_attn.{name}.weight").view(4, -1, TOY["hidden_size"])
        heads[[1, 2]] = heads[[2, 1]]


def exchange_query_and_key(source: Loaded) -> None:
    """The first group's, as a wrong order of the fused rows would."""
    query, key = (source.layer(1, f"self_attn.{name}.weight")[:10] for name in ("q_proj", "k_proj"))
    kept = query.clone()
    query.copy_(key)
    key.copy_(kept)


def pad_inside(name: str) -> Callable[[Loaded], None]:
    """A row of zeros in the middle of the vocabulary: padding that was not cut off when ranks were joined."""

    def spoil(source: Loaded) -> None:
        rows = source.tensors[name]
        source.tensors[name] = torch.cat([rows[:66], torch.zeros(1, rows.shape[1]), rows[66:-1]])

    return spoil


def not_a_number(source: Loaded) -> None:
    source.layer(3, "mlp.down_proj.weight")[5, 7] = torch.nan


def rounded(source: Loaded) -> None:
    """One tensor of fp32 through fp16 and back."""
    source.layer(3, "self_attn.o_proj.weight").copy_(source.layer(3, "self_attn.o_proj.weight").half())


# name -> (toy, what is done to the Megatron side, the stage that must be named)
FAULTS: dict[str, tuple[str, Callable[[Loaded], Any], str]] = {
    "query and key exchanged": ("plain", exchange_query_and_key, "layer 1"),
    "key and value exchanged": (
        "plain",
        lambda s: s.exchange(*(f"model.layers.1.self_attn.{x}_proj.weight" for x in "kv")),
        "layer 1",
    ),
    "gate and up exchanged": (
        "plain",
        lambda s: s.exchange(*(f"model.layers.2.mlp.{x}_proj.weight" for x in ("gate", "up"))),
        "layer 2",
    ),
    "groups permuted": ("plain", permute_groups, "layer 2"),
    "layers exchanged": ("plain", exchange_layers, "layer 1"),
    "rope base": ("plain", lambda s: s.set(rotary_base=10000.0), "layer 0"),
    "epsilon": ("plain", lambda s: s.set(layernorm_epsilon=1e-6), "layer 0"),
    "rounded to fp16": ("plain", rounded, "layer 3"),
    "not a number": ("plain", not_a_number, "layer 3"),
    "final norm lost": ("plain", lambda s: s.tensors["model.norm.weight"].fill_(1.0), "final norm"),
    "padding in the embedding": ("plain", pad_inside("model.embed_tokens.weight"), "embedding"),
    "padding in the output layer": ("plain", pad_inside("lm_head.weight"), "logits"),
    "tied and is not": (
        "plain",
        lambda s: s.set(share_embeddings_and_output_weights=True),
        "logits",
    ),
    "bias lost": ("qwen2", lambda s: s.layer(1, "self_attn.q_proj.bias").zero_(), "layer 1"),
    "window lost": ("mistral", lambda s: s.set(window_size=None), "layer 0"),
    "window one too long": ("mistral", lambda s: s.set(window_size=14), "layer 0"),
}


def run(folder: Path, spoil: str | None = None, **options: Any) -> Report:
    """In the other process: a folder against itself, the Megatron side spoilt or not."""
    source = Loaded(folder)
    if spoil is not None:
        (SCALING if spoil in SCALING else FAULTS)[spoil][1](source)
    return compare_source(source, folder, folder, **{"lengths": LENGTHS} | options)


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Callable[..., Report]]:
    """Calls a function in the other process."""
    environment = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("SLURM")}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield lambda function, *args, **options: pool.submit(function, *args, **options).result(300)
    os.environ.update(environment)


@pytest.mark.parametrize("toy", TOYS)
def test_they_agree(elsewhere: Callable[..., Report], toys: dict[str, Path], toy: str) -> None:
    """Every family, through a padded vocabulary, near and far."""
    report = elsewhere(run, toys[toy])
    report.check()
    assert list(report.stages) == ["embedding", *(f"layer {i}" for i in range(4)), "final norm", "logits"]
    assert [str(len(found)) for found in report.stages.values()] == ["4"] * 7
    logits = report.stages["logits"]
    assert [d.positions for d in logits[:3]] == list(LENGTHS)
    assert all(d.same_choice == d.positions for d in logits)
    assert max(d.largest for d in logits) > 0 and 0 < max(d.relative for d in logits) < TOLERANCE / 5
    assert not report.notes


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found_where_they_are(
    elsewhere: Callable[..., Report], toys: dict[str, Path], fault: str
) -> None:
    toy, _, stage = FAULTS[fault]
    report = elsewhere(run, toys[toy], fault)
    found = report.first_out()
    assert found is not None and found[0] == stage
    with pytest.raises(DataError, match=f"{stage} differs"):
        report.check()


SCALING: dict[str, tuple[str, Callable[[Loaded], Any]]] = {
    "dropped": ("scaled", lambda s: s.set(rope_scaling_factor=None)),
    "megatron-core's constants": ("scaled", lambda s: s.set(rope_original_max_position_embeddings=8192)),
    "another factor": ("scaled", lambda s: s.set(rope_scaling_factor=32.0)),
}


@pytest.mark.parametrize("fault", SCALING)
def test_wrong_scaling_shows_at_far_positions(
    elsewhere: Callable[..., Report], toys: dict[str, Path], fault: str
) -> None:
    report = elsewhere(run, toys["scaled"], fault, lengths=[17])
    near, far = report.stages["logits"]
    assert report.probes[1] == "96 tokens at positions 0-31, 1024-1055, 4064-4095"
    assert far.relative > 100 * TOLERANCE and far.relative > 3 * near.relative
    with pytest.raises(DataError, match="layer 0 differs: 96 tokens at positions 0-31, 1024-1055, 4064-4095"):
        report.check()


def test_a_trained_model(elsewhere: Callable[..., Report], shared_data: Path) -> None:
    """Through the readers that training uses, beyond the context that it claims too."""
    report = elsewhere(compare, shared_data / "stories260k", lengths=(1, 17, 512, 700))
    report.check()
    assert report.probes[-1] == "64 tokens at positions 0-31, 480-511"


def test_window_out_of_reach_is_said(
    elsewhere: Callable[..., Report], toys: dict[str, Path], tmp_path: Path
) -> None:
    kind, changes = TOYS["mistral"]
    wide = save(tmp_path / "wide", kind, **changes | {"sliding_window": 4096})
    (note,) = elsewhere(run, wide, lengths=[5, 13], tokens=[3, 1, 4]).notes
    assert "window of 4096 tokens is not reached" in note


def test_other_sizes_are_refused(
    elsewhere: Callable[..., Report], toys: dict[str, Path], tmp_path: Path
) -> None:
    other = save(tmp_path / "other", "Llama", num_hidden_layers=3, vocab_size=132)
    with pytest.raises(DataError, match="num_layers 4 against 3, vocab_size 131 against 132"):
        elsewhere(compare, toys["plain"], other)


def test_shards_against_their_source(
    elsewhere: Callable[..., Report], toys: dict[str, Path], tmp_path: Path
) -> None:
    """Converted for real, from bf16: against the source, and without one against what they hold themselves."""
    half = save(tmp_path / "half", *TOYS["qwen2"][:1], torch.bfloat16, **TOYS["qwen2"][1])
    weights = open_weights(half)
    layout = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    convert(weights, plan_shards(weights, layout, make_vocab_size_divisible_by=16), tmp_path / "shards")
    weights.close()
    for reference in (half, None):
        report = elsewhere(compare, tmp_path / "shards", reference, lengths=LENGTHS)
        report.check()
        assert report.first_out() is None
    with pytest.raises(DataError, match="embedding differs"):
        elsewhere(
            compare, tmp_path / "shards", toys["qwen2"], lengths=[5]
        ).check()  # the same before rounding


def peak(folder: Path) -> int:
    """In a process of its own: largest resident memory of a comparison, in bytes."""
    compare(folder, lengths=(64,)).check()
    # not getrusage: that begins with the resident memory of the process that started this one
    (line,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")
    )
    return int(line.split()[1]) * 1024


def test_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    """Eight more layers, 268 MB of fp32 on the two sides, take less than one more."""
    found = []
    for layers in (2, 10):
        sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": layers}
        folder = save(tmp_path / str(layers), "Llama", torch.bfloat16, **sizes)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found.append(pool.submit(peak, folder).result(300))
    assert found[1] - found[0] < 16_000_000, found
