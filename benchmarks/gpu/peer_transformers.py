"""Llama-3-SynE's way beside ours: transformers' Llama with AdamW, the same shape, tokens and batch.

    python benchmarks/gpu/peer_transformers.py --case NAME --output DIR [--rehearse]

Llama-3-SynE trained with ``transformers.Trainer``, ``bf16: true`` (weights in fp32 under autocast) and gradient
checkpointing. That is tried, and what is faster: weights in bf16, no checkpointing, each attention that can be had
(torch's kernels one by one, flash-attn where it is installed). The Trainer itself is left out, and with it its costs.
Not run on a GPU yet; rehearsed with transformers 4.57.6 and 5.17.0.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import peer_steps
import torch
from cases import Case
from peer_steps import BACKENDS, LossOf, Model, Search, Variant, record_of
from process import Options, run_case, shape_of
from record import Record

SYNE = "fp32 autocast, checkpointing, sdpa"
"""Llama-3-SynE's own way."""

PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
"""transformers' name of an attention, and what must be importable for it."""


def llama_config(shape: dict[str, int]) -> Any:
    """transformers' configuration of the shape; Llama-3's base of the rotary embedding and epsilon."""
    from importlib import import_module

    transformers: Any = import_module("transformers")
    given = {
        "vocab_size": shape["vocab_size"],
        "hidden_size": shape["hidden_size"],
        "intermediate_size": shape["ffn_hidden_size"],
        "num_hidden_layers": shape["num_layers"],
        "num_attention_heads": shape["num_attention_heads"],
        "num_key_value_heads": shape["num_query_groups"],
        "max_position_embeddings": shape["seq_length"],
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "use_cache": False,
    }
    if int(transformers.__version__.split(".")[0]) >= 5:
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
        return transformers.LlamaConfig(**given, **rope)
    return transformers.LlamaConfig(**given, rope_theta=500000.0)


def build_model(
    shape: dict[str, int], device: torch.device, dtype: torch.dtype, attention: str, checkpointing: bool
) -> Model:
    """Random weights, made on the device."""
    import transformers

    auto: Any = transformers.AutoModelForCausalLM
    torch.manual_seed(peer_steps.SEED)
    with torch.device(device):
        model = auto.from_config(llama_config(shape), dtype=dtype, attn_implementation=attention)
    model.to(device).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Model(loss_of(model), list(model.parameters()))


def loss_of(model: Any) -> LossOf:
    """Its loss of the labels given, as they stand: transformers would shift them by one."""

    def loss(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = model(
            input_ids=tokens, labels=labels, shift_labels=labels, use_cache=False
        ).loss
        return result

    return loss


def variant(
    shape: dict[str, int],
    device: torch.device,
    weights: str = "bf16",
    checkpointing: bool = False,
    attention: str = "sdpa",
) -> Variant:
    """``weights``: ``bf16``, or ``fp32`` under autocast. ``attention``: transformers' name, or ``sdpa`` and a kernel
    (``sdpa cudnn``)."""
    name, _, kernel = attention.partition(" ")
    autocast = weights == "fp32"
    dtype = torch.float32 if autocast else torch.bfloat16
    parts = [
        "fp32 autocast" if autocast else "bf16",
        *(["checkpointing"] if checkpointing else []),
        attention,
    ]
    return Variant(
        name=", ".join(parts),
        build=lambda: build_model(shape, device, dtype, name, checkpointing),
        autocast=autocast,
        attention=kernel or None,
    )


def attentions() -> list[str]:
    """What attention may be had here: torch's kernels, and flash-attn's where it can be imported."""
    packages = [name for name, module in PACKAGES.items() if importlib.util.find_spec(module)]
    return ["sdpa", *(f"sdpa {kernel}" for kernel in BACKENDS), *packages]


def measure(case: Case, options: Options) -> Record:
    """Attention first, with bf16 weights; then with the fastest the weights in fp32 and checkpointing."""
    shape, device = shape_of(case, options.rehearse), peer_steps.pick_device(options.rehearse)
    rows = peer_steps.token_rows(case, options, device)
    search = Search(case, rows)

    def attention_of(best: Variant | None) -> str:
        return "sdpa" if best is None else best.name.split(", ")[-1]

    # Llama-3-SynE's own way is never left out for want of time
    search.attempt([variant(shape, device, "fp32", True)])
    best = search.attempt([variant(shape, device, attention=each) for each in attentions()])
    attention = attention_of(best)
    search.attempt(
        [
            variant(shape, device, "fp32", attention=attention),
            variant(shape, device, "bf16", True, attention=attention),
        ]
    )
    name, timed = search.measure()
    found = {
        "best": name,
        "variants": search.tried,
        "llama_3_syne": SYNE,
        "absent": [module for module in PACKAGES.values() if importlib.util.find_spec(module) is None],
    }
    return record_of(case, options, timed, found)


if __name__ == "__main__":
    sys.exit(run_case(measure, __doc__))
