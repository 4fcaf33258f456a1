"""A plain torch.compile Llama beside ours, as torchtitan trains on one GPU: the same shape, tokens and batch.

    python benchmarks/gpu/peer_compiled.py --case NAME --output DIR [--rehearse]

A case in bf16 tries weights in bf16 and in fp32 under autocast; a case in any FP8 recipe tries float8 layers,
tensorwise and rowwise, with torchao's too where it is installed. Attention is the fastest of torch's kernels for the
shape, measured alone first. Nothing is recomputed where that fits; else selectively, else fully. In a rehearsal
compilation is off, unless the case's ``engine`` has ``("compile", True)``. Not run on a GPU yet.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

import compiled_llama
import peer_steps
import torch
from cases import Case
from peer_steps import Model, Search, Variant, record_of
from process import Options, run_case, shape_of
from record import Record

RECOMPUTE = ("none", "selective", "full")
"""In this order: the next is tried where with the one before nothing runs and something has run out of memory."""
TORCHAO = "torchao "
"""Before a recipe's name: its layers in place of ours."""


def build_model(
    shape: dict[str, int],
    device: torch.device,
    weights: torch.dtype,
    products: str,
    repeat_keys: bool,
    recompute: str,
    compiled: bool,
) -> Model:
    """Random weights, made on the device. Compiled code of other variants is dropped first."""
    torch.compiler.reset()
    torch.manual_seed(peer_steps.SEED)
    own = "bf16" if products.startswith(TORCHAO) else products
    with torch.device(device):
        model = compiled_llama.Llama(shape, own, repeat_keys, recompute)
    model.to(weights)
    if own != products:
        torchao_layers(model, products.removeprefix(TORCHAO))
    if compiled:
        model.compile_parts()
    return Model(model.loss, list(model.parameters()))


def torchao_layers(model: compiled_llama.Llama, recipe: str) -> None:
    """torchao's float8 layers in place of ours, those of the layers alone. Not run yet: it is not installed there."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    for layer in model.layers:
        for name in ("qkv", "out", "gate_up", "down"):
            mine = getattr(layer, name).weight
            theirs = torch.nn.Linear(mine.shape[1], mine.shape[0], bias=False, device="meta")
            theirs.weight = mine
            setattr(layer, name, theirs)
        convert_to_float8_training(layer, config=Float8LinearConfig.from_recipe_name(recipe))


def variants(
    case: Case,
    shape: dict[str, int],
    device: torch.device,
    attention: str | None,
    recompute: str,
    compiled: bool,
) -> Iterator[Variant]:
    """Every format of weights and products to be tried; ``attention`` of ``peer_steps.best_attention``."""
    kernel, _, repeated = (attention or "").partition(" ")
    formats = [("bf16", "bf16"), ("fp32", "bf16")]
    if case.precision != "bf16":
        recipes = ["tensorwise", "rowwise"]
        theirs = [TORCHAO + each for each in recipes] if importlib.util.find_spec("torchao") else []
        formats = [("bf16", each) for each in recipes + theirs]
    for weights, products in formats:
        dtype = torch.bfloat16 if weights == "bf16" else torch.float32

        def build(dtype: torch.dtype = dtype, products: str = products) -> Model:
            return build_model(shape, device, dtype, products, bool(repeated), recompute, compiled)

        parts = [
            "bf16 weights" if weights == "bf16" else "fp32 weights, autocast",
            *([f"float8 {products}"] if products != "bf16" else []),
            *([f"{recompute} recompute"] if recompute != "none" else []),
            f"{attention or 'any'} attention",
        ]
        yield Variant(", ".join(parts), build, autocast=weights == "fp32", attention=kernel or None)


def measure(case: Case, options: Options) -> Record:
    """Attention alone, then the variants, then the fastest in full."""
    shape, device = shape_of(case, options.rehearse), peer_steps.pick_device(options.rehearse)
    compiled = bool(dict(case.engine).get("compile", not options.rehearse))
    torch.set_float32_matmul_precision("high")
    rows = peer_steps.token_rows(case, options, device)
    times = peer_steps.attention_times(case, shape, device)
    attention = peer_steps.best_attention(times)
    search = Search(case, rows)
    for kernel in (attention, None):  # torch's own choice where none runs with the fastest
        for recompute in RECOMPUTE:
            if search.best is None:
                before = set(search.tried)
                search.attempt(variants(case, shape, device, kernel, recompute, compiled))
                if not search.out_of_memory(before):
                    break
    name, timed = search.measure()
    found: dict[str, Any] = {
        "best": name,
        "variants": search.tried,
        "attention": attention,
        "attention_seconds": times,
        "compiled": compiled,
        "absent": [each for each in ("torchao", "torchtitan") if importlib.util.find_spec(each) is None],
    }
    return record_of(case, options, timed, found)


if __name__ == "__main__":
    sys.exit(run_case(measure, __doc__))
