"""A family's toy in the engine against transformers: logits, and the gradient of every tensor.

The weights go through our tables into megatron-core on CPU ranks, cut in every layout that is asked for; the
gradients come back through the same tables, so that each tensor is compared under Hugging Face's name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from distributed.ranks import run_ranks
from safetensors.torch import load_file
from torch import nn

from megatron_syne.convert.pieces import Kind, matrix, pieces
from megatron_syne.convert.table import entries, hf_tensors
from megatron_syne.models.hf_config import model_config_from_hf
from megatron_syne.models.json_file import read_json

WORKER = Path(__file__).with_name("family_worker.py")
TOLERANCE = 1e-4

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 96,  # divisible by every TP size here: rows of padding would count in the loss
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.15,  # large, so that attention is far from uniform and positions matter
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
TP2: dict[str, dict[str, Any]] = {
    "whole": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2_sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
}


def shaken(model: nn.Module) -> nn.Module:
    """The model with norms and biases at random: as they start, they could be lost or exchanged unnoticed."""
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.data = 1 + 0.2 * torch.randn_like(parameter)
        elif name.endswith("bias"):
            parameter.data = 0.3 * torch.randn_like(parameter)
    return model.float().eval()


def tokens_of(length: int, vocab_size: int = SIZES["vocab_size"]) -> torch.Tensor:
    """``[1, length + 1]``: the last one is a label only."""
    return torch.randint(vocab_size, (1, length + 1), generator=torch.Generator().manual_seed(3))


def judged(model: nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """transformers' logits, and the gradients of the summed loss."""
    model.zero_grad()
    logits: torch.Tensor = model(tokens[:, :-1]).logits
    nn.functional.cross_entropy(logits[0], tokens[0, 1:], reduction="sum").backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def in_engine(
    folder: Path, tokens: torch.Tensor, world_size: int, layouts: dict[str, dict[str, Any]]
) -> dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """By layout: megatron-core's logits, and the gradients as Hugging Face tensors."""
    work = folder.parent / f"{folder.name}-engine"
    work.mkdir(exist_ok=True)
    request = {"folder": str(folder), "tokens": tokens.tolist(), "layouts": layouts, "out": str(work)}
    (work / "request.json").write_text(json.dumps(request))
    run_ranks(world_size, [str(WORKER), str(work / "request.json")])
    found = {}
    for name, layout in layouts.items():
        tp = layout.get("tensor_model_parallel_size", 1)
        ranks = [load_file(work / f"{name}.{rank}.safetensors") for rank in range(tp)]
        found[name] = (ranks[0].pop("logits"), as_hugging_face(folder, ranks))
    return found


def as_hugging_face(folder: Path, ranks: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The parameters of all TP ranks as Hugging Face tensors; every element must be given."""
    model = model_config_from_hf(read_json(folder / "config.json"), "the toy")
    whole = {name: torch.full(matrix(shape), torch.nan) for name, shape in hf_tensors(model).items()}
    for entry in entries(model):
        for tp_rank, parameters in enumerate(ranks):
            local = parameters[entry.megatron].view(matrix(tuple(parameters[entry.megatron].shape)))
            for piece in pieces(entry, model, tp_rank, len(ranks)):
                (top, bottom), (left, right), (down, across) = piece.rows, piece.cols, piece.at
                part = local[down : down + bottom - top, across : across + right - left]
                target = whole[piece.source][top:bottom, left:right]
                if entry.kind is Kind.DIRECT and tp_rank:
                    torch.testing.assert_close(part, target)  # the ranks' copies agree
                else:
                    assert target.isnan().all(), piece
                    target.copy_(part)
    shapes = hf_tensors(model)
    return {name: tensor.view(shapes[name]) for name, tensor in whole.items()}


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference; NaN counts as infinite."""
    assert a.shape == b.shape
    return (a - b).abs().nan_to_num(torch.inf).max().item()


def assert_agrees(
    model: nn.Module,
    folder: Path,
    length: int = 96,
    world_size: int = 2,
    layouts: dict[str, dict[str, Any]] | None = None,
) -> None:
    """In every layout the engine has transformers' logits (1e-4) and gradients (1e-4 of the tensor's largest)."""
    tokens = tokens_of(length)
    logits, gradients = judged(model, tokens)
    for layout, (ours, our_gradients) in in_engine(folder, tokens, world_size, layouts or TP2).items():
        largest = difference(ours, logits)
        print(f"{folder.name} {layout}: largest logit difference {largest:.2e}")
        assert largest <= TOLERANCE, layout
        assert set(our_gradients) == set(gradients)
        for name, gradient in gradients.items():
            scale = max(1.0, gradient.abs().max().item())
            assert difference(our_gradients[name], gradient) <= TOLERANCE * scale, f"{layout}: {name}"
