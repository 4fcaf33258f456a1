"""Norms of the gradients by layer and of the parameters, each counted once over all ranks.

The gradients are the engine's own, reduced and not clipped: the root of the sum of the squares over all groups is
the ``grad_norm`` of the step. With the distributed optimizer each rank counts the shard whose reduced gradients it
holds; without it the first of each data-parallel group counts. What all TP ranks hold alike (norms) is counted by
the first, and the last pipeline stage's copy of a tied embedding not at all: the engine's rules.

The parameters are those that the step's gradients were computed with, before its update: whole on every rank then,
also where the engine gathers updated weights only in the next forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.nn.functional import one_hot

from megatron_syne.models.gpt import named_parameters

_ENDS = {
    "embedding.": "embedding",
    "decoder.final_layernorm.": "final_norm",
    "output_layer.": "output_layer",
}


def group_names(num_layers: int) -> list[str]:
    """What the gradients are told apart by: ``layer_0`` and so on, ``embedding``, ``final_norm``, ``output_layer``."""
    return [f"layer_{n}" for n in range(num_layers)] + list(_ENDS.values())


def group_of(name: str) -> str:
    """Group of a parameter by its name under global layer numbers; raises KeyError for one that has none."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        return f"layer_{parts[2]}"
    for beginning, group in _ENDS.items():
        if name.startswith(beginning):
            return group
    raise KeyError(name)


@torch.no_grad()
def sums_of_squares(
    chunks: Sequence[Any], optimizer: Any, num_layers: int, device: torch.device
) -> torch.Tensor:
    """This rank's part, to be summed over the world: float64 [2 x groups + 1], on the device; nothing waits for it.

    Per group the sum of squares of its gradients, then per group how many values that is, at last the sum of squares
    of all parameters, frozen ones too. To be called between the backward pass and the optimizer's step.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
    from megatron.core.transformer.module import param_is_not_shared

    column = {name: number for number, name in enumerate(group_names(num_layers))}
    first = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    optimizers = getattr(optimizer, "chained_optimizers", [optimizer])
    norms: list[torch.Tensor] = []  # at once: a copy of an FP8 parameter in fp32 must not wait for the others
    places: list[int] = []
    counts = [0.0] * len(column)
    for chunk in chunks:
        sharded = chunk.ddp_config.use_distributed_optimizer
        for name, parameter in named_parameters(chunk):
            if not (param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter)):
                continue
            if parameter.requires_grad and sharded:
                held = _shard(parameter, optimizers)
            else:
                held = slice(None) if first else None
            if held is None:
                continue
            if parameter.requires_grad:
                buffer: Any = parameter
                gradient = buffer.main_grad.view(-1)[held]
                norms.append(torch.linalg.vector_norm(gradient, dtype=torch.float32))
                places.append(column[group_of(name)])
                counts[places[-1]] += gradient.numel()
            norms.append(torch.linalg.vector_norm(_values(parameter)[held], dtype=torch.float32))
            places.append(2 * len(column))
    result = torch.zeros(2 * len(column) + 1, dtype=torch.float64, device=device)
    if norms:
        # the host's two small lists go over without waiting for the device
        where = torch.tensor(places).to(device, non_blocking=True)
        squares = torch.stack(norms).double() ** 2
        result += squares @ one_hot(where, len(result)).double()  # index_add_ has no fixed order on a GPU
        numbers = torch.tensor(counts, dtype=torch.float64).to(device, non_blocking=True)
        result[len(column) : -1] = numbers
    return result


def as_metrics(sums: Sequence[float], num_layers: int) -> dict[str, float]:
    """``param_norm``, and ``grad_norm/<group>`` of each group that has parameters which train, of the sums over all
    ranks."""
    names = group_names(num_layers)
    squares, counts = sums[: len(names)], sums[len(names) : -1]
    found = {
        f"grad_norm/{name}": math.sqrt(square)
        for name, square, count in zip(names, squares, counts, strict=True)
        if count
    }
    return {"param_norm": math.sqrt(sums[-1]), **found}


def _shard(parameter: torch.nn.Parameter, optimizers: Iterable[Any]) -> slice | None:
    """The part of a parameter that this rank's distributed optimizer updates, None where it has none of it."""
    for part in optimizers:
        if parameter in getattr(
            part, "model_param_gbuf_map", {}
        ):  # a stage without trained parameters has no map
            own = part._get_model_param_range_map(parameter)["param"]
            return slice(own.start, own.end)
    return None


def _values(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The parameter as plain numbers in a row; Transformer Engine's FP8 ones must be unpacked."""
    plain = parameter.detach()
    return (plain if type(plain) in (torch.Tensor, torch.nn.Parameter) else plain.float()).reshape(-1)
